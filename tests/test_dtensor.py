"""DTensors on two and four gloo processes: the ops, modules and patched models give what they give the whole tensors.

This file is a program too: `python tests/test_dtensor.py FILE` goes through all cases in four processes. It forks them
when it has imported torch, which takes longer than a case.
"""

import functools
import multiprocessing
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from patched import randomize
from read_models import models
from torch import nn
from watched import Calls

import ldm_fused
from ldm_fused import functional, reference

# What takes as long to import as torch, and nobody has asked for: functions import it here, not the file.
IMPORTED = {"torch._dynamo", "torch.distributed.tensor"} & sys.modules.keys()
ROOT = Path(__file__).resolve().parents[1]
WORLD = 4

# An op; a mesh, by the number of processes along each axis ("2": two pairs, each for itself); x's shape and groups;
# then the placements of x, of the vectors of the channels, and of the result. R is replicated, S0 cut along axis 0, P a
# sum's addends.
NORM, SHORTCUT, SUM = "group_norm_act", "group_norm_act_and_shortcut", "bias_add_residual"
CASES = [
    (NORM, "2", (4, 8, 3, 2), 4, "R", "R", "R"),
    (NORM, "4", (4, 8, 3, 2), 4, "S0", "R", "S0"),
    (NORM, "4", (3, 8, 5), 4, "S0", "S0", "S0"),  # the last process has no sample
    (NORM, "2", (2, 8, 3, 2), 4, "S1", "S0", "S1"),
    (NORM, "4", (2, 8, 3, 2), 4, "S1", "R", "S1"),
    (NORM, "4", (2, 14, 5), 7, "S1", "S0", "S1"),  # 4, 4, 4 and 2 channels
    (NORM, "4", (2, 6, 5), 3, "S1", "R", "S1"),  # 2, 2, 2 and none
    (NORM, "4", (2, 8), 2, "S1", "S0", "R"),  # groups are cut
    (NORM, "2", (2, 6, 5), 1, "S1", "R", "R"),
    (NORM, "4", (2, 8, 5, 3), 4, "S2", "R", "R"),
    (NORM, "2", (2, 8, 3, 2), 4, "P", "R", "R"),
    (NORM, "2x2", (4, 8, 3, 2), 4, "S0 S1", "R S0", "S0 S1"),
    (NORM, "2x2", (4, 8, 3, 2), 4, "S1 S1", "S0 R", "S1 S1"),
    (NORM, "2x2", (4, 8, 3, 2), 2, "S1 S1", "S0 S0", "S1 R"),  # halves of groups
    (NORM, "2x2", (3, 6, 3, 2), 3, "S0 S0", "S0 R", "S0 S0"),
    (NORM, "2x2", (4, 8, 3, 2), 4, "P S1", "R S0", "R S1"),
    (SHORTCUT, "4", (3, 8, 3, 2), 4, "S0", "R", "S0"),
    (SHORTCUT, "2", (2, 8, 3, 2), 4, "S1", "S0", "S1"),
    (SHORTCUT, "2", (2, 8, 3, 2), 4, "P", "R", "R"),
    (SUM, "2", (4, 8, 3, 2), None, "R", "S0", "R"),
    (SUM, "4", (3, 8, 5), None, "S0", "R", "S0"),
    (SUM, "4", (2, 6, 5), None, "S1", "S0", "S1"),
    (SUM, "2", (2, 8, 5), None, "S2", "R", "S2"),
    (SUM, "2x2", (4, 8, 5), None, "P S1", "R S0", "R S1"),
]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# ---- What each process runs --------------------------------------------------------------------------------------


@functools.cache
def mesh_of(name):
    shape = {"4": (4,), "2x2": (2, 2), "2": (2, 2)}[name]
    mesh = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=("first", "second")[:len(shape)])
    return mesh["second"] if name == "2" else mesh


def placements_of(text):
    from torch.distributed.tensor import Partial, Replicate, Shard

    return tuple({"R": Replicate, "P": Partial}[p]() if p in "RP" else Shard(int(p[1])) for p in text.split())


def distributed(t, mesh, text):
    """A DTensor of the same values, a leaf."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    whole = distribute_tensor(t.detach(), mesh, placements_of(text.replace("P", "R")))
    part = whole.to_local()
    for axis, placement in enumerate(text.split()):
        if placement == "P":
            part = part * (0.25, 0.75)[mesh.get_local_rank(axis)]
    return DTensor.from_local(part, mesh, placements_of(text), shape=whole.shape,
                              stride=whole.stride()).requires_grad_(t.requires_grad)


def tensors_of(op, shape):
    """An op's arguments but the groups: tensors of x's shape, (N, C) and (C,)."""
    generator = torch.Generator().manual_seed(0)
    table, vector = shape[:2], shape[1:2]
    sizes = [shape, shape, vector, vector] if op == SUM else [shape, table, table, vector, vector, vector]
    return [torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes]


def ours(op, groups, x, *others):
    if op == SUM:
        residual, *biases = others
        return ldm_fused.bias_add_residual(x, residual, *biases, 0.5)
    scale, shift, weight, bias, pre_bias = others
    options = dict(pre_bias=pre_bias, scale=scale, shift=shift)
    if op == SHORTCUT:
        y, shortcut = functional.group_norm_act_and_shortcut(None, x, groups, weight, bias, 1e-5, **options)
        return y * shortcut
    return ldm_fused.group_norm_act(x, groups, weight, bias, **options)


def whole(op, groups, x, *others):
    if op == SUM:
        residual, *biases = others
        return reference.bias_add_residual(x, residual, *biases, 0.5)
    scale, shift, weight, bias, pre_bias = others
    y = reference.group_norm_act(x, groups, weight, bias, pre_bias=pre_bias, scale=scale, shift=shift)
    return y * x if op == SHORTCUT else y


def run_case(op, mesh, shape, groups, of_x, of_vectors, of_y):
    mesh, given = mesh_of(mesh), tensors_of(op, shape)
    of_tables = of_y if op == SUM else of_x.replace("P", "R").replace("S2", "R")
    parts = [distributed(t, mesh, of_x if t is given[0] else of_vectors if t.dim() == 1 else of_tables) for t in given]
    expected = whole(op, groups, *given)
    with Calls() as calls:
        y = ours(op, groups, *parts)
    assert set(calls.names) == {f"{SUM if op == SUM else NORM}.default"}
    assert y.placements == placements_of(of_y) and y.stride() == expected.stride()
    gathered = y.full_tensor()
    close(gathered, expected)
    with torch.no_grad():
        close(ours(op, groups, *parts).to_local(), y.to_local())
    dy = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).reshape(shape)
    gathered.backward(dy)
    close([t.grad.full_tensor() for t in parts], list(torch.autograd.grad(expected, given, dy)))


def channels_last(shape=(4, 8, 3, 2)):
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=torch.channels_last)
    part = distributed(x, mesh_of("4"), "S0")
    y = ldm_fused.group_norm_silu(part, 4)
    assert y.stride() == part.stride() == x.stride() and y.to_local().stride() == part.to_local().stride()
    close(y.full_tensor(), ldm_fused.group_norm_silu(x, 4))


def parameters_gradients():
    """Along the batch they are addends that nobody has added up yet; along the channels they are where they are."""
    for of_x, of_weight, of_gradient in (("S0 S1", "R S0", "P S0"), ("S0 R", "R R", "P R")):
        x, weight = torch.randn(4, 8, 3), torch.randn(8, requires_grad=True)
        x, weight = distributed(x, mesh_of("2x2"), of_x), distributed(weight, mesh_of("2x2"), of_weight)
        ldm_fused.group_norm_silu(x, 4, weight).sum().backward()
        assert weight.grad.placements == placements_of(of_gradient)


def placed_differently():
    for of_x, of_residual, of_y in (("R", "S1", "S1"), ("S0", "S1", "S0"), ("P", "S2", "S2"), ("R", "P", "R")):
        x, residual = torch.randn(2, 2, 8, 3)
        parts = distributed(x, mesh_of("2"), of_x), distributed(residual, mesh_of("2"), of_residual)
        y = ldm_fused.bias_add_residual(*parts)
        assert y.placements == placements_of(of_y)
        torch.testing.assert_close(y.full_tensor(), x + residual)


def second_derivatives():
    """Where x is replicated, its gradient comes as addends: from the columns that each process has of a matrix."""
    matrix = torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = second_derivative(tensors_of(NORM, (4, 8)), matrix)
    for of_x, of_matrix in (("S0", "R"), ("R", "S1")):
        parts = [distributed(t, mesh_of("4"), of_x if t.dim() == 2 else "R") for t in tensors_of(NORM, (4, 8))]
        found = second_derivative(parts, distributed(matrix, mesh_of("4"), of_matrix))
        close([t.full_tensor() for t in found], expected)


def second_derivative(given, matrix):
    y = ours(NORM, 4, *given) @ matrix
    [dx] = torch.autograd.grad(y.square().sum(), given[:1], create_graph=True)
    return list(torch.autograd.grad(dx.square().sum(), given))


def dropout():
    """The mask is PyTorch's, of DTensors."""
    torch.manual_seed(dist.get_rank())
    x = torch.randn(4, 8, 20, 20, dtype=torch.float64)
    dist.broadcast(x, 0)
    for placement in ("S0", "S1"):
        y = ldm_fused.group_norm_act(distributed(x, mesh_of("4"), placement), 4, dropout_p=0.4)
        assert y.placements == placements_of(placement)
        y, kept = y.full_tensor(), y.full_tensor() != 0
        assert 0.55 < kept.double().mean() < 0.65
        close(y[kept], (ldm_fused.group_norm_silu(x, 4) / 0.6)[kept])


def mesh_of_others():
    """Processes that have no part of the mesh get what PyTorch's functions give there."""
    mesh = dist.device_mesh.DeviceMesh("cpu", [0, 1])
    x, bias = torch.ones(2, 8, 3), torch.ones(8)
    y = ldm_fused.bias_add_residual(*(distributed(t, mesh, "S0") for t in (x, x)), distributed(bias, mesh, "R"))
    assert y.shape == x.shape
    assert torch.equal(y.to_local(), torch.full((1, 8, 3) if dist.get_rank() < 2 else (0,), 3.0))


def data_parallel(name):
    from torch.distributed.tensor import distribute_module

    torch.manual_seed(3)
    model, plain = models(name)
    model, plain = model.double(), plain.double()
    x = torch.randn(6, 3 if "UNet" in name else 8, 6, 5, dtype=torch.float64, requires_grad=True)
    model = distribute_module(model, mesh_of("4"))
    part = distributed(x, mesh_of("4"), "S0")
    compare(model, part, plain, x)


def compare(model, part, plain, x):
    with Calls() as calls:
        y = model(part)
    assert f"{NORM}.default" in calls.names
    expected = plain(x)
    dy = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    gathered = y.full_tensor()
    close(gathered, expected)
    gathered.backward(dy)
    expected.backward(dy)
    close(part.grad.full_tensor(), x.grad)
    close([p.grad.full_tensor() for p in model.parameters()], [p.grad for p in plain.parameters()])


def tensor_parallel(norm):
    """Channels are cut from the first layer to the last, and the norm's parameters with them."""
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def cut(name, module, mesh):
        for key, p in module.named_parameters(recurse=False):
            module.register_parameter(key, nn.Parameter(distribute_tensor(p, mesh, [Shard(0)])))

    torch.manual_seed(3)
    plain = randomize(nn.Sequential(nn.Linear(8, 24), nn.GroupNorm(12, 24), nn.SiLU(), nn.Linear(24, 8))).double()
    model = nn.Sequential(nn.Linear(8, 24), nn.GroupNorm(12, 24), nn.SiLU(), nn.Linear(24, 8)).double()
    if norm == "GroupNormSiLU":
        model[1], model[2] = ldm_fused.GroupNormSiLU(12, 24).double(), nn.Identity()
    else:
        ldm_fused.patch(model, strict=True)
    model.load_state_dict(plain.state_dict())
    parallelize_module(model, mesh_of("4"), {
        "0": ColwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "3": RowwiseParallel(output_layouts=Replicate(), use_local_output=False)})
    distribute_module(model[1], mesh_of("4"), cut)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    compare(model, distributed(x, mesh_of("4"), "R"), plain, x)


CHECKS = {
    **{" ".join(map(str, case)): functools.partial(run_case, *case) for case in CASES},
    "channels_last": channels_last, "parameters' gradients": parameters_gradients,
    "arguments placed differently": placed_differently, "second derivatives": second_derivatives, "dropout": dropout,
    "a mesh of others": mesh_of_others,
    **{f"data parallel {name}": functools.partial(data_parallel, name)
       for name in ("FusedResnetBlock", "patched UNet")},
    **{f"tensor parallel {name}": functools.partial(tensor_parallel, name)
       for name in ("GroupNormSiLU", "patched Sequential")},
}


def run(rank, file):
    """Prints the checks that pass, and ends at the first that does not."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD,
                            timeout=timedelta(seconds=100))
    for name, check in CHECKS.items():
        check()
        sys.stdout.write(f"{name} passes\n")  # in one piece, for four write
        sys.stdout.flush()
    dist.destroy_process_group()


def main(file):
    import torch._dynamo  # once for all processes, as the next: a DTensor's first op imports it
    import torch.distributed.tensor.parallel

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(rank, file), daemon=True) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


# ---- Tests -------------------------------------------------------------------------------------------------------


pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """What the processes print."""
    file = tmp_path_factory.mktemp("dtensor") / "rendezvous"
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run([sys.executable, __file__, str(file)], env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=300).stdout


@pytest.mark.parametrize("name", CHECKS)
def test_four_processes_have_what_one_has(name, output):
    assert output.splitlines().count(f"{name} passes") == WORLD, output


def test_the_package_does_not_import_what_compilers_and_dtensors_need(output):
    assert output.splitlines()[0] == "imported: []"


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_disabled_gives_pytorchs_functions(mesh):
    x, weight = distributed(torch.randn(2, 8, 3), mesh, "S0"), distributed(torch.randn(8), mesh, "R")
    with ldm_fused.disabled(), Calls() as calls:
        y = ldm_fused.group_norm_silu(x, 4, weight)
    assert calls.names == [] and torch.equal(y.full_tensor(), F.silu(F.group_norm(x, 4, weight)).full_tensor())


@pytest.mark.parametrize("is_x", [True, False])
def test_a_plain_tensor_beside_dtensors_is_what_it_is_to_pytorch(mesh, is_x):
    from torch.distributed.tensor.experimental import implicit_replication

    plain = torch.randn(2, 8, 3), torch.randn(8, requires_grad=True)
    x, weight = (distributed(t, mesh, "R") if (t is plain[0]) == is_x else t for t in plain)
    for function in (F.group_norm, ldm_fused.group_norm_silu):
        with pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor"):
            function(x, 4, weight)
    with implicit_replication():
        y = ldm_fused.group_norm_silu(x, 4, weight)
    torch.testing.assert_close(y.full_tensor(), ldm_fused.group_norm_silu(plain[0], 4, plain[1]))


@pytest.mark.parametrize("placement", ["S0", "S1"])
def test_compiled_in_one_graph(mesh, placement):
    torch._dynamo.reset()
    x, weight = torch.randn(2, 8, 3, requires_grad=True), torch.randn(8, requires_grad=True)
    parts = distributed(x, mesh, placement), distributed(weight, mesh, "R")
    run = torch.compile(lambda x, weight: ldm_fused.group_norm_silu(x, 4, weight), backend="aot_eager", fullgraph=True)
    y, expected = run(*parts), ldm_fused.group_norm_silu(x, 4, weight)
    y.full_tensor().square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close([y.full_tensor(), *(t.grad.full_tensor() for t in parts)],
                               [expected, x.grad, weight.grad])


if __name__ == "__main__":
    print(f"imported: {sorted(IMPORTED)}", flush=True)
    main(sys.argv[1])
