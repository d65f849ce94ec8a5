#!/usr/bin/env python3
"""Small calls that reach every CUDA kernel, for compute-sanitizer; `make gpu` runs it under each of its tools.

Tensors are made on the CPU and copied, and results are checked there: every kernel that the GPU runs is ours, so that
the tools can be told to leave out all others (--kernel-name kns=ldm_fused) and still see each write to our inputs. With
PYTORCH_NO_CUDA_MEMORY_CACHING=1 each tensor is an allocation of its own, whose bounds they know.
"""

import argparse
import math
import re
from dataclasses import replace
from pathlib import Path

import torch
from oracle import GRADIENTS, assert_within_bound, eager, make_case, oracle

from ldm_fused import reference

SHAPES = [
    ((2, 64, 8, 8), 32),  # a few threads a row, vectors
    ((3, 30, 7, 5), 3),  # nothing divides anything: single elements
    ((40, 4, 3), 2),
    ((2, 10), 2),  # one pixel
    ((1, 8, 50, 48), 2),  # a block a row
    ((1, 4, 65, 129), 2),  # the same in single elements
    ((2, 64, 64, 64), 8),  # groups of 64 KB in 16 bits
    ((1, 16, 320, 320), 1),  # one of 3 MB: with the dtypes of LARGE alone
]
DTYPES = [
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.bfloat16, torch.float32),
    (torch.float64, None),
]
LARGE = 10**5, DTYPES[:2]


def cases(shapes):
    for shape, num_groups in shapes:
        for dtype, out_dtype in LARGE[1] if math.prod(shape) > LARGE[0] else DTYPES:
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


def run_all(device, shapes=SHAPES):
    """Runs and checks every case; returns how many there were."""
    count = 0
    for case in cases(shapes):
        expected, baseline = oracle(case), eager(case)
        for offset in (0, 1):  # one element off, there are no aligned vectors
            moved = on(device, case, offset)
            assert_within_bound(case, run(moved), expected, baseline)
            check_residual(moved)
            check_dropout(case, moved)
            count += 1
    return count


def unwritten(device):
    """A mistake that initcheck must find: x was never written."""
    torch.ops.ldm_fused.group_norm_act(torch.empty(2, 64, 8, 8, device=device), 32, None, None, 1e-5, True)


def outside(device):
    """A mistake that memcheck must find: x is said to be twice as long as its memory."""
    memory = torch.ones(2 * 64 * 64).to(device)

    class Longer:
        __cuda_array_interface__ = dict(shape=(4, 64, 64), typestr="<f4", data=(memory.data_ptr(), False), version=3)

    torch.ops.ldm_fused.group_norm_act(torch.as_tensor(Longer(), device=device), 32, None, None, 1e-5, True)
    torch.cuda.synchronize()


def kernel_names():
    """Every kernel in csrc/cuda: the last name followed by a parenthesis in front of its body."""
    text = "".join(path.read_text() for path in sorted((Path(__file__).parents[1] / "csrc" / "cuda").glob("*.cu*")))
    return [re.findall(r"(\w+)\s*\(", head)[-1] for head in re.findall(r"__global__([^{;]*)", text)]


def kernels_run(device):
    """The names of all kernels that run_all launches, by the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run_all(device)
    return [event.key for event in profile.key_averages() if "ldm_fused" in event.key]


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cuda")
    p.add_argument("--wrong", choices=["unwritten", "outside"], help="make this mistake, and nothing else")
    p.add_argument("--kernels", action="store_true", help="say which kernels of csrc/cuda the cases do not reach")
    args = p.parse_args()
    if args.wrong:
        {"unwritten": unwritten, "outside": outside}[args.wrong](args.device)
    elif args.kernels:
        names, found = kernel_names(), " ".join(kernels_run(args.device))
        missing = [name for name in names if not re.search(rf"\b{name}\b", found)]
        print(f"kernels run: {len(names) - len(missing)} of {len(names)}; not run: {', '.join(missing) or 'none'}")
    else:
        print(f"cases right: {run_all(args.device)}")


if __name__ == "__main__":
    main()
