"""group_norm_act of a tensor that is cut across processes: the result and the gradients of one process, with gloo.

This file is a program too: `python tests/test_sharded.py FILE` goes through all cases in four processes, of which a
group of two takes part in some. It imports torch once and forks, before anything has started a thread.
"""

import copy
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import forked
import pytest
import torch
import torch.distributed as dist
from oracle import GRADIENTS, assert_within_bound, laid_out, make_case
from torch import nn

import ldm_fused

ROOT = Path(__file__).resolve().parents[1]
WORLD = 4
SIZES = {2: [(5, 3), (8, 0)], 4: [(2, 2, 2, 2), (0, 5, 1, 2)]}  # of the ranks' parts of eight rows


# ---- What each process does --------------------------------------------------------------------------------------


def part_of(case, sizes, rank, layout="contiguous"):
    """The rank's part of x and dy, and parameters, of which each wants its gradient."""
    x, dy = (laid_out(t.split(sizes, 2)[rank].clone(), layout) for t in (case.x, case.dy))
    leaves = {"x": x, **{name: getattr(case, name) for name in GRADIENTS[1:]}}
    return {name: t.clone().requires_grad_() for name, t in leaves.items() if t is not None}, dy


def assembled(t, group):
    """The parts of all ranks, which may have other sizes, along the rows."""
    parts = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, t.detach(), group=group)
    return torch.cat(parts, 2)


def added_up(t, group):
    total = t.double()
    dist.all_reduce(total, group=group)
    return total.to(t.dtype)


def check_case(group, rank, sizes, dtype, out_dtype, layout, **options):
    """Output and gradients are the oracle's of the whole."""
    case = make_case((2, 12, 8, 6), 3, dtype, layout, out_dtype=out_dtype, **options)
    leaves, dy = part_of(case, sizes, rank, layout)
    rest = dict(leaves)
    y = ldm_fused.functional.group_norm_act_as(
        out_dtype, rest.pop("x"), 3, rest.pop("weight", None), rest.pop("bias", None), case.eps,
        activation="silu" if case.silu else None, group=group, **rest)
    assert y.stride() == leaves["x"].stride()
    found = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy)))
    with torch.no_grad():  # by another way
        rest = dict(leaves)
        again = ldm_fused.functional.group_norm_act_as(
            out_dtype, rest.pop("x"), 3, rest.pop("weight", None), rest.pop("bias", None), case.eps,
            activation="silu" if case.silu else None, group=group, **rest)
    assert torch.equal(y, again)
    results = {name: added_up(g, group) for name, g in found.items() if name != "x"}
    results.update(y=assembled(y, group), x=assembled(found["x"], group))
    assert_within_bound(case, results)


def every_dtype(group, rank, sizes):
    for dtype, out_dtype in ((torch.float64, None), (torch.float32, None), (torch.bfloat16, None),
                             (torch.float16, torch.float32)):
        for layout in ("contiguous", "channels_last"):
            check_case(group, rank, sizes, dtype, out_dtype, layout)


def few_parameters(group, rank, sizes):
    check_case(group, rank, sizes, torch.float32, None, "contiguous", options=("weight", "bias"), silu=False)
    check_case(group, rank, sizes, torch.float32, None, "contiguous", options=())


def a_large_mean(group, rank, sizes):
    case = make_case((2, 12, 8, 6), 3, mean=1.5e4, options=("bias",))
    leaves, dy = part_of(case, sizes, rank)
    y = ldm_fused.group_norm_act(leaves["x"], 3, None, leaves["bias"], group=group)
    dx, = torch.autograd.grad(y, [leaves["x"]], dy)
    assert_within_bound(case, {"y": assembled(y, group), "x": assembled(dx, group)})


def the_same_bits_everywhere(group, rank, sizes):
    """One pixel more, the same on every rank, comes out the same."""
    case = make_case((2, 12, 8, 6), 3, options=())
    x = case.x.split(sizes, 2)[rank]
    y = ldm_fused.group_norm_act(torch.cat([x, torch.ones(2, 12, 1, 6)], 2), 3, group=group)
    assert all(torch.equal(y[:, :, -1], other) for other in
               assembled(y[:, :, -1:].contiguous(), group).unbind(2))


def second_derivatives(group, rank, sizes):
    case = make_case((2, 12, 8, 6), 3, torch.float64)
    leaves, dy = part_of(case, sizes, rank)

    def penalty(leaves, dy, **options):
        rest = dict(leaves)
        call = ldm_fused.group_norm_act if options else ldm_fused.reference.group_norm_act
        y = call(rest.pop("x"), 3, rest.pop("weight"), rest.pop("bias"), **rest, **options)
        first = torch.autograd.grad(y, list(leaves.values())[:1], dy, create_graph=True)
        return torch.autograd.grad(first[0].square().sum(), list(leaves.values()))

    found = dict(zip(leaves, penalty(leaves, dy, group=group)))
    whole, whole_dy = part_of(case, (8,), 0)
    want = dict(zip(whole, penalty(whole, whole_dy)))
    for name, g in found.items():
        g = assembled(g, group) if name == "x" else added_up(g, group)
        torch.testing.assert_close(g, want[name], rtol=1e-8, atol=1e-8, msg=lambda m: f"{name}: {m}")


def ops_are_off(group, rank, sizes):
    with ldm_fused.disabled():
        check_case_loosely(group, rank, sizes)


def compiled(group, rank, sizes):
    torch._dynamo.reset()
    check_case_loosely(group, rank, sizes, lambda f: torch.compile(f, backend="aot_eager"))


def check_case_loosely(group, rank, sizes, way=lambda f: f):
    case = make_case((2, 12, 8, 6), 3, options=("weight", "bias"))
    leaves, dy = part_of(case, sizes, rank)
    call = way(lambda x, weight, bias: ldm_fused.group_norm_act(x, 3, weight, bias, group=group))
    y = call(*leaves.values())
    found = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy)))
    whole, whole_dy = part_of(case, (8,), 0)
    want = ldm_fused.group_norm_act(*list(whole.values())[:1], 3, *list(whole.values())[1:])
    gradients = dict(zip(whole, torch.autograd.grad(want, list(whole.values()), whole_dy)))
    torch.testing.assert_close(assembled(y, group), want, rtol=1e-4, atol=1e-5)
    for name, g in found.items():
        g = assembled(g, group) if name == "x" else added_up(g, group)
        torch.testing.assert_close(g, gradients[name], rtol=1e-4, atol=1e-4, msg=lambda m: f"{name}: {m}")


def the_module(group, rank, sizes):
    norm = ldm_fused.GroupNormSiLU(3, 12)
    nn.init.normal_(norm.weight)
    x = make_case((2, 12, 8, 6), 3).x
    want = copy.deepcopy(norm)(x)
    norm.group = group
    for checkpointed in (False, True):
        part = x.split(sizes, 2)[rank].clone().requires_grad_()
        run = (lambda x: torch.utils.checkpoint.checkpoint(norm, x, use_reentrant=False)) if checkpointed else norm
        y = run(part)
        y.sum().backward()
        torch.testing.assert_close(assembled(y, group), want, rtol=1e-4, atol=1e-5)


def dropout(group, rank, sizes):
    case = make_case((2, 12, 8, 6), 3, options=("weight", "bias"))
    leaves, dy = part_of(case, sizes, rank)
    plain = ldm_fused.group_norm_act(*list(leaves.values())[:1], 3, leaves["weight"], leaves["bias"], group=group)
    torch.manual_seed(rank)
    y = ldm_fused.group_norm_act(leaves["x"], 3, leaves["weight"], leaves["bias"], group=group, dropout_p=0.3)
    kept = y != 0
    torch.testing.assert_close(y[kept], plain[kept] / 0.7, rtol=1e-5, atol=1e-6)
    dx, = torch.autograd.grad(y, [leaves["x"]], dy)
    want, = torch.autograd.grad(plain, [leaves["x"]], dy * kept / 0.7)
    torch.testing.assert_close(dx, want, rtol=1e-4, atol=1e-5)


def one_exchange_each_way(group, rank, sizes):
    """Forward an all-gather of three numbers a group, backward an all-reduce of two; and none where x needs none."""
    all_gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    calls, before = [], (getattr(dist, all_gather), dist.all_reduce)
    case = make_case((2, 12, 8, 6), 3, options=("weight", "bias"))
    leaves, dy = part_of(case, sizes, rank)
    try:
        setattr(dist, all_gather, lambda out, t, group: calls.append(t.numel()) or before[0](out, t, group=group))
        dist.all_reduce = lambda t, group: calls.append(t.numel()) or before[1](t, group=group)
        y = ldm_fused.group_norm_act(leaves["x"], 3, leaves["weight"], leaves["bias"], group=group)
        torch.autograd.grad(y, list(leaves.values()), dy)
        assert calls == [3 * 2 * 3, 2 * 2 * 3], calls
        y = ldm_fused.group_norm_act(leaves["x"].detach(), 3, leaves["weight"], group=group)
        torch.autograd.grad(y, [leaves["weight"]], dy)
        assert calls[2:] == [18], calls
    finally:
        setattr(dist, all_gather, before[0])
        dist.all_reduce = before[1]


CHECKS = [every_dtype, few_parameters, a_large_mean, the_same_bits_everywhere, second_derivatives, ops_are_off,
          compiled, the_module, dropout, one_exchange_each_way]
CASES = [(check.__name__, sizes) for check in CHECKS for all_sizes in SIZES.values() for sizes in all_sizes
         if check is not compiled or sizes == (5, 3)]  # which takes seconds


def main(rank, file):
    """Prints the cases that are right, and ends at the first that is not."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD,
                            timeout=timedelta(seconds=60))
    groups = {ranks: dist.new_group(range(ranks)) for ranks in SIZES}
    checks = {check.__name__: check for check in CHECKS}
    for name, sizes in CASES:
        if rank < len(sizes):
            torch.manual_seed(0)
            checks[name](groups[len(sizes)], rank, sizes)
            dist.barrier(groups[len(sizes)])
            if rank == 0:
                print(f"{name} {sizes} is right", flush=True)
    if rank == WORLD - 1:
        with pytest.raises(ValueError, match="that this process is in"):
            ldm_fused.group_norm_act(torch.randn(2, 12, 8, 6), 3, group=groups[2])
        print("a stranger is refused", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def fork(file):
    import torch._dynamo  # noqa: F401 - once for all processes

    return int(not forked.run(WORLD, lambda rank: main(rank, file)))


# ---- The tests ---------------------------------------------------------------------------------------------------

needs_distributed = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """What the processes print."""
    file = tmp_path_factory.mktemp("sharded") / "rendezvous"
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    run = subprocess.run([sys.executable, __file__, str(file)], env=environment, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True, timeout=300)
    return run.stdout


@needs_distributed
@pytest.mark.parametrize("name,sizes", CASES, ids=str)
def test_ranks_have_what_one_process_has(name, sizes, output):
    assert f"{name} {sizes} is right" in output, output


@needs_distributed
def test_a_process_outside_of_the_group_is_refused(output):
    assert "a stranger is refused" in output, output


if __name__ == "__main__":
    sys.exit(fork(sys.argv[1]))
