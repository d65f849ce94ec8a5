#!/usr/bin/env python3
"""What it costs to round dz, the gradient of GroupNorm's output, to 16 bits before dx is computed from it.

Root mean square errors of dx, over that of dx, against float64: dz kept exactly and rounded, both calculated in float64
and rounded at the end; and PyTorch's own in 16 bits. It shows why resident_backward keeps dz in dy's slot.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm_fused import reference  # noqa: E402

GROUPS, EPS = 32, 1e-6


def error(found, expected):
    return ((found.double() - expected).square().mean() / expected.square().mean()).sqrt().item()


def gradient(f, x, dy):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x, dy)[0]


def errors(shape, dtype):
    """The errors of dx with an exact dz, with a rounded dz, by F.silu(F.group_norm) and by the reference."""
    x, dy = torch.randn(2, *shape).to(dtype)
    weight, bias = (1 + 0.2 * torch.randn(shape[1])).to(dtype), (0.2 * torch.randn(shape[1])).to(dtype)
    wide = [t.double() for t in (weight, bias)]
    expected = gradient(lambda t: F.silu(F.group_norm(t, GROUPS, *wide, EPS)), x.double(), dy.double())
    normed = F.group_norm(x.double(), GROUPS, *wide, EPS)
    dz = gradient(F.silu, normed, dy.double())
    rounding = dz.to(dtype).double() - dz
    # Only the term slope * dz sees the rounded dz: k1 and k2 come from sums of the exact one.
    spread = x.double().reshape(shape[0], GROUPS, -1).var(-1, unbiased=False)
    rstd = (spread + EPS).rsqrt().repeat_interleave(shape[1] // GROUPS, 1)
    slope = (rstd * wide[0])[:, :, None, None]
    return [error(found, expected) for found in (
        expected.to(dtype), (expected + slope * rounding).to(dtype),
        gradient(lambda t: F.silu(F.group_norm(t, GROUPS, weight, bias, EPS)), x, dy),
        gradient(lambda t: reference.group_norm_act(t, GROUPS, weight, bias, EPS), x, dy))]


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"{'':<16}{'shape':<20}{'dz exact':>10}{'rounded':>10}{'F.silu':>10}{'reference':>11}")
    for dtype in (torch.bfloat16, torch.float16):
        for shape in ((2, 320, 32, 32), (1, 128, 64, 64)):
            exact, rounded, silu, written = errors(shape, dtype)
            print(f"{str(dtype):<16}{str(shape):<20}{exact:>10.1e}{rounded:>10.1e}{silu:>10.1e}{written:>11.1e}")
