#!/usr/bin/env python3
"""Small calls that reach every CUDA kernel; `make gpu` runs them under each of compute-sanitizer's tools.

Tensors are made on the CPU and copied, and results are checked there: every kernel that the GPU runs is ours, so that
the tools can be told to leave out all others (--kernel-name kns=ldm_fused) and still see each write to our inputs. With
PYTORCH_NO_CUDA_MEMORY_CACHING=1 each tensor is an allocation of its own, whose bounds they know.

--instances runs more of them, in every pair of dtypes, and says which instances of the kernels that the library holds,
by their template arguments, have not run: none, or it fails.
"""

import argparse
import contextlib
import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from oracle import GRADIENTS, assert_within_bound, eager, make_case, oracle  # noqa: E402

from ldm_fused import _C, reference  # noqa: E402
from tools import instances  # noqa: E402
from tools.part import part  # noqa: E402

SHAPES = [
    ((2, 64, 8, 8), 32),  # a few threads a row, vectors
    ((3, 30, 7, 5), 3),  # nothing divides anything: single elements
    ((40, 4, 3), 2),
    ((2, 10), 2),  # one pixel
    ((1, 8, 50, 48), 2),  # a block a row
    ((1, 4, 65, 129), 2),  # the same in single elements
    ((2, 64, 64, 64), 8),  # groups of 64 KB in 16 bits
    ((1, 8192, 8), 1),  # rows: vectors, and too many channels for one read
    ((1, 512, 4, 4), 1),  # columns: the same
    ((1, 16, 160, 160), 1),  # 800 KB for a grid: in a tool with the dtypes of LARGE alone
]
DTYPES = [
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.bfloat16, torch.float32),
    (torch.float64, None),
]
LARGE = 10**5, DTYPES[:2]
EVERY_PAIR = DTYPES + [
    (torch.float16, None),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]


def cases(shapes, every_pair=False):
    for shape, num_groups in shapes:
        few = LARGE[1] if math.prod(shape) > LARGE[0] else DTYPES
        for dtype, out_dtype in EVERY_PAIR if every_pair else few:
            for layout in ("contiguous", "channels_last"):
                case = make_case(shape, num_groups, dtype, layout, out_dtype=out_dtype)
                if case is not None:
                    yield case


def on(device, case, offset=0):
    """The case there; x and dy begin `offset` elements after the start of their memory."""
    moved = {}
    for name in ("x", "dy"):
        t = getattr(case, name)
        memory = torch.zeros(t.numel() + offset, dtype=t.dtype)
        memory[offset:].as_strided(t.shape, t.stride()).copy_(t)
        moved[name] = memory.to(device)[offset:].as_strided(t.shape, t.stride())
    return replace(case.to(device), **moved)


def run(case, dropout=()):
    """``dropout`` is a seed on the case's device and a probability."""
    y, mean, rstd = torch.ops.ldm_fused.group_norm_act(*case.arguments(), *dropout)
    gradients = torch.ops.ldm_fused.group_norm_act_backward(
        case.dy, case.x, mean, rstd, case.weight, case.bias, case.silu, case.pre_bias, case.scale, case.shift,
        [True] * len(GRADIENTS), None, *dropout)
    return {"y": y, **dict(zip(GRADIENTS, gradients))}


def run_in_halves(case):
    """The same from the op's two halves, forward and backward, with all of x as the one part."""
    parts = torch.ops.ldm_fused.group_norm_statistics(case.x, case.num_groups, case.pre_bias)[None]
    _, _, weight, bias, eps, silu, pre_bias, scale, shift, out_dtype = case.arguments()
    y, mean, rstd = torch.ops.ldm_fused.group_norm_apply(case.x, parts, weight, bias, eps, silu, pre_bias, scale, shift,
                                                         out_dtype)
    affine = weight, bias, silu, pre_bias, scale, shift
    sums = torch.ops.ldm_fused.group_norm_backward_sums(case.dy, case.x, mean, rstd, *affine)
    gradients = torch.ops.ldm_fused.group_norm_backward_apply(case.dy, case.x, mean, rstd, *sums, *affine,
                                                              [True] * len(GRADIENTS))
    return {"y": y, **dict(zip(GRADIENTS, gradients))}


@contextlib.contextmanager
def a_grid():
    """Plans are grids of one team."""
    _C.want_plan(0, 1, 0, 0)
    try:
        yield
    finally:
        _C.want_plan(0, 0, 0, 0)


def check_dropout(case, moved):
    """The CPU's kernels drop the same elements."""
    seed = torch.tensor([1234567890123456789])
    expected, found = run(case, (seed, 0.3)), run(moved, (seed.to(moved.x.device), 0.3))
    for name in ("y", "x"):
        a, b = found[name].cpu(), expected[name]
        unit = torch.finfo(b.dtype).eps * b.double().abs().max().item()
        assert (a.double() - b.double()).abs().max().item() <= 8 * unit, f"{name} with dropout"


def check_residual(case):
    """The case's x as the sum's both terms, its bias as both biases, and its channels' sums."""
    x, bias = case.x, case.bias
    y, sums = torch.ops.ldm_fused.bias_add_residual(x, x, bias, bias, 0.5), torch.ops.ldm_fused.channel_sums(x)
    exact = x.cpu().double() + reference.per_channel(bias.cpu().double(), x)
    torch.testing.assert_close(y.cpu().double(), exact, rtol=2 * torch.finfo(x.dtype).eps, atol=1e-6)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    scale = x.cpu().double().abs().sum(axes).max().item()
    torch.testing.assert_close(sums.cpu().double(), x.cpu().double().sum(axes), rtol=0, atol=1e-6 * scale)


def run_all(device, shapes=SHAPES, every_pair=False, share=(0, 1)):
    """Runs and checks every case, or the share (index, parts) of them; returns how many there were."""
    count, (index, parts) = 0, share
    for case in itertools.islice(cases(shapes, every_pair), index, None, parts):
        expected, baseline = oracle(case), eager(case)
        for offset in (0, 1) if case.x.numel() < LARGE[0] else (0,):  # one off, there are no aligned vectors
            moved = on(device, case, offset)
            if case.x.numel() >= LARGE[0]:  # else no plan of them is a grid, or none in every dtype
                with a_grid():
                    assert_within_bound(case, run(moved), expected, baseline)
            assert_within_bound(case, run(moved), expected, baseline)
            assert_within_bound(case, run_in_halves(moved), expected, baseline)
            check_residual(moved)
            check_dropout(case, moved)
            count += 1
            if count % 10 == 0:  # under a tool it may be ended before the last one
                print(f"cases right so far: {count}", flush=True)
    return count


def normalize(x):
    torch.ops.ldm_fused.group_norm_act_inference(x, 32, None, None, 1e-5, True)


def unwritten(device):
    """A mistake that initcheck must find: x was never written."""
    normalize(torch.empty(2, 64, 8, 8, device=device))


def outside(device):
    """A mistake that memcheck must find: x is said to be twice as long as its memory."""
    memory = torch.ones(2 * 64 * 64).to(device)

    class Longer:
        __cuda_array_interface__ = dict(shape=(4, 64, 64), typestr="<f4", data=(memory.data_ptr(), False), version=3)

    normalize(torch.as_tensor(Longer(), device=device))
    torch.cuda.synchronize()


def run_instances(device):
    """Runs every case in every pair of dtypes: how many there were, and the instances that have run, by the profiler
    of a GPU."""
    if device != "cuda":
        return run_all(device, every_pair=True), set()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        count = run_all(device, every_pair=True)
    return count, {instances.plain(event.key) for event in profile.key_averages()}


def verdict(held, run):
    """In a line, which of the instances that the library holds have run."""
    missing = sorted(held - run)
    return f"instances run: {len(held) - len(missing)} of {len(held)}; not run: {', '.join(missing) or 'none'}"


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cuda")
    p.add_argument("--wrong", choices=["unwritten", "outside"], help="make this mistake, and nothing else")
    p.add_argument("--instances", action="store_true", help="more cases, for every instance of every kernel")
    p.add_argument("--part", type=part, default=(0, 1), metavar="I/N", help="of the cases, for processes side by side")
    args = p.parse_args()
    if args.wrong:
        {"unwritten": unwritten, "outside": outside}[args.wrong](args.device)
    elif args.instances:
        held = instances.compiled(_C.__file__)
        count, found = run_instances(args.device)
        print(f"cases right: {count}\n{verdict(held, found)}")
        sys.exit(bool(held - found) or (args.device == "cuda" and not held))
    else:
        print(f"cases right: {run_all(args.device, share=args.part)}")


if __name__ == "__main__":
    main()
