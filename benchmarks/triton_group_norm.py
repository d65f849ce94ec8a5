"""GroupNorm and SiLU in two passes of Triton: what a page of a kernel language comes to, as a baseline.

    forward   3 B   the first pass reads x for each channel's sums; the second reads x and writes y
    backward  5 B   the first pass reads x and dy for each channel's sums; the second reads both and writes dx

A tile has `TILE_C` channels of `TILE_S` pixels, the longer axis along the memory. A small kernel between the passes
makes of the channels' sums those of the groups. Sums are float32, the variance is E[x^2] - E[x]^2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # elements
PROGRAMS = 1024  # at least as many share a pass, where each still has a few tiles


@triton.jit
def place(C, S, stride_c, stride_s, TILE_C: tl.constexpr, TILE_S: tl.constexpr):
    """This program's sample, its channels and where they start."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    return n, c, n * C * S + c.to(tl.int64) * stride_c


@triton.jit
def normalized(x, n, c, mean, rstd, weight, bias, G, CG, C, inside):
    """x of a tile normalized, what SiLU takes, and weight * rstd of each channel."""
    m = tl.load(mean + n * G + c // CG, inside, 0.0)
    r = tl.load(rstd + n * G + c // CG, inside, 0.0)
    w = tl.load(weight + c, inside, 0.0).to(tl.float32)
    b = tl.load(bias + c, inside, 0.0).to(tl.float32)
    hat = (x - m[:, None]) * r[:, None]
    return hat, hat * w[:, None] + b[:, None], w * r


@triton.jit
def reduce_x(x, sums, C, S, G, CG, stride_c, stride_s, length, chunks, TILE_C: tl.constexpr, TILE_S: tl.constexpr):
    n, c, start = place(C, S, stride_c, stride_s, TILE_C, TILE_S)
    first = tl.program_id(2) * length
    total = tl.zeros([TILE_C, TILE_S], tl.float32)
    squares = tl.zeros([TILE_C, TILE_S], tl.float32)
    for s0 in range(first, tl.minimum(first + length, S), TILE_S):
        s = s0 + tl.arange(0, TILE_S)
        inside = (c < C)[:, None] & (s < S)[None, :]
        v = tl.load(x + start[:, None] + s.to(tl.int64)[None, :] * stride_s, inside, 0.0).to(tl.float32)
        total += v
        squares += v * v
    at = (n * C + c) * chunks + tl.program_id(2)
    tl.store(sums + at, tl.sum(total, 1), c < C)
    tl.store(sums + tl.num_programs(0) * C * chunks + at, tl.sum(squares, 1), c < C)


@triton.jit
def merge(sums, weight, a, b, count, C, G, CG, chunks, eps, BACKWARD: tl.constexpr, TILE_P: tl.constexpr):
    """Of a group: mean and rstd; backward: the means of weight * dz and of it times the normalized x."""
    n, g = tl.program_id(0) // G, tl.program_id(0) % G
    first = tl.zeros([TILE_P], tl.float32)
    second = tl.zeros([TILE_P], tl.float32)
    for p0 in range(0, CG * chunks, TILE_P):
        p = p0 + tl.arange(0, TILE_P)
        at = (n * C + g * CG).to(tl.int64) * chunks + p
        gain = 1.0
        if BACKWARD:
            gain = tl.load(weight + g * CG + p // chunks, p < CG * chunks, 0.0).to(tl.float32)
        first += tl.load(sums + at, p < CG * chunks, 0.0) * gain
        second += tl.load(sums + (tl.num_programs(0) // G) * C * chunks + at, p < CG * chunks, 0.0) * gain
    mean, other = tl.sum(first, 0) / count, tl.sum(second, 0) / count
    if not BACKWARD:
        other = 1 / tl.sqrt(tl.maximum(other - mean * mean, 0.0) + eps)
    tl.store(a + tl.program_id(0), mean)
    tl.store(b + tl.program_id(0), other)


@triton.jit
def apply(x, y, mean, rstd, weight, bias, C, S, G, CG, stride_c, stride_s, length, chunks, SILU: tl.constexpr,
          TILE_C: tl.constexpr, TILE_S: tl.constexpr):
    n, c, start = place(C, S, stride_c, stride_s, TILE_C, TILE_S)
    first = tl.program_id(2) * length
    for s0 in range(first, tl.minimum(first + length, S), TILE_S):
        s = s0 + tl.arange(0, TILE_S)
        inside = (c < C)[:, None] & (s < S)[None, :]
        at = start[:, None] + s.to(tl.int64)[None, :] * stride_s
        v = tl.load(x + at, inside, 0.0).to(tl.float32)
        _, u, _ = normalized(v, n, c, mean, rstd, weight, bias, G, CG, C, c < C)
        if SILU:
            u = u * tl.sigmoid(u)
        tl.store(y + at, u.to(y.dtype.element_ty), inside)


@triton.jit
def backward_pass(x, dy, dx, sums, mean, rstd, weight, bias, a, b, C, S, G, CG, stride_c, stride_s, length, chunks,
                  SILU: tl.constexpr, WRITES: tl.constexpr, TILE_C: tl.constexpr, TILE_S: tl.constexpr):
    """The sums of a channel, or dx, which needs them."""
    n, c, start = place(C, S, stride_c, stride_s, TILE_C, TILE_S)
    first = tl.program_id(2) * length
    total = tl.zeros([TILE_C, TILE_S], tl.float32)
    products = tl.zeros([TILE_C, TILE_S], tl.float32)
    for s0 in range(first, tl.minimum(first + length, S), TILE_S):
        s = s0 + tl.arange(0, TILE_S)
        inside = (c < C)[:, None] & (s < S)[None, :]
        at = start[:, None] + s.to(tl.int64)[None, :] * stride_s
        v = tl.load(x + at, inside, 0.0).to(tl.float32)
        dz = tl.load(dy + at, inside, 0.0).to(tl.float32)
        hat, u, gain = normalized(v, n, c, mean, rstd, weight, bias, G, CG, C, c < C)
        if SILU:
            sigmoid = tl.sigmoid(u)
            dz *= sigmoid * (1 + u * (1 - sigmoid))
        if WRITES:
            group = n * G + c // CG
            r = tl.load(rstd + group, c < C, 0.0)
            offset, slope = tl.load(a + group, c < C, 0.0) * r, tl.load(b + group, c < C, 0.0) * r
            result = dz * gain[:, None] - offset[:, None] - hat * slope[:, None]
            tl.store(dx + at, result.to(dx.dtype.element_ty), inside)
        else:
            total += dz
            products += dz * hat
    if not WRITES:
        place_of_sum = (n * C + c) * chunks + tl.program_id(2)
        tl.store(sums + place_of_sum, tl.sum(total, 1), c < C)
        tl.store(sums + tl.num_programs(0) * C * chunks + place_of_sum, tl.sum(products, 1), c < C)


def cut(x: Tensor, num_groups: int):
    """The sizes that all kernels take, the tile, and the grid."""
    n, c, spatial = x.shape[0], x.shape[1], x[0, 0].numel()
    columns = not x.is_contiguous()
    tile_c = min(triton.next_power_of_2(c), 256) if columns else max(1, TILE // triton.next_power_of_2(spatial))
    tile_c = min(tile_c, triton.next_power_of_2(c))
    tile_s = TILE // tile_c if columns else min(TILE, triton.next_power_of_2(spatial))
    rows = triton.cdiv(c, tile_c)
    chunks = max(1, min(triton.cdiv(spatial, 4 * tile_s), triton.cdiv(PROGRAMS, n * rows)))
    length = triton.cdiv(triton.cdiv(spatial, chunks), tile_s) * tile_s
    chunks = triton.cdiv(spatial, length)
    strides = (1, c) if columns else (spatial, 1)
    sizes = (c, spatial, num_groups, c // num_groups, *strides, length, chunks)
    return sizes, dict(TILE_C=tile_c, TILE_S=tile_s), (n, rows, chunks)


class GroupNormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, num_groups, weight, bias, eps, silu):
        sizes, tile, grid = cut(x, num_groups)
        (n, c), chunks = x.shape[:2], sizes[-1]
        y, sums = torch.empty_like(x), x.new_empty(2, n, c, chunks, dtype=torch.float32)
        mean, rstd = x.new_empty(2, n * num_groups, dtype=torch.float32)
        count = x[0].numel() // num_groups
        reduce_x[grid](x, sums, *sizes, **tile)
        merge[(n * num_groups,)](sums, weight, mean, rstd, count, c, num_groups, c // num_groups, chunks, eps,
                                 BACKWARD=False, TILE_P=256)
        apply[grid](x, y, mean, rstd, weight, bias, *sizes, SILU=silu, **tile)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.num_groups, ctx.silu, ctx.eps = num_groups, silu, eps
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        sizes, tile, grid = cut(x, ctx.num_groups)
        (n, c), chunks = x.shape[:2], sizes[-1]
        dy = dy if dy.stride() == x.stride() else torch.empty_like(x).copy_(dy)
        dx, sums = torch.empty_like(x), x.new_empty(2, n, c, chunks, dtype=torch.float32)
        a, b = torch.empty_like(mean), torch.empty_like(rstd)
        tensors = (x, dy, dx, sums, mean, rstd, weight, bias, a, b)
        backward_pass[grid](*tensors, *sizes, SILU=ctx.silu, WRITES=False, **tile)
        merge[(n * ctx.num_groups,)](sums, weight, a, b, x[0].numel() // ctx.num_groups, c, ctx.num_groups,
                                     c // ctx.num_groups, chunks, ctx.eps, BACKWARD=True, TILE_P=256)
        backward_pass[grid](*tensors, *sizes, SILU=ctx.silu, WRITES=True, **tile)
        dbias, dweight = sums.sum((1, 3)).to(weight.dtype)
        return dx, None, dweight, dbias, None, None


def group_norm_act(x, num_groups: int, weight: Tensor, bias: Tensor, eps: float, *, activation="silu") -> Tensor:
    """x is (N, C, *), contiguous or channels_last."""
    return GroupNormAct.apply(x, num_groups, weight, bias, eps, activation == "silu")
