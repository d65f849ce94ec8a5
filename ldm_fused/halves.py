"""The registered ops of a tensor that is cut in parts, as PyTorch sees them: fake kernels, autograd, and composed.

They are the two halves of group_norm_act and the two halves of its backward. What lies between is small and has all
parts in it: statistics (parts, 3, N, G), count, mean and sum of squared deviations of each group; and (N, G, 2), what
the input gradient takes from the whole group.
"""

from typing import Optional, Tuple

import torch
from torch import Tensor

from . import _ops, ops, reference

group_norm_statistics = _ops.ops.group_norm_statistics.default
group_norm_apply = _ops.ops.group_norm_apply.default
group_norm_backward_sums = _ops.ops.group_norm_backward_sums.default
group_norm_backward_apply = _ops.ops.group_norm_backward_apply.default


# ---- Composed of PyTorch ops -----------------------------------------------------------------------------------


def composed_statistics(x: Tensor, num_groups: int, pre_bias: Optional[Tensor]) -> Tensor:
    dtype = ops.accumulate_dtype(x.dtype)
    with ops.without_autocast(x.device.type):
        return reference.group_norm_statistics(x.to(dtype), num_groups,
                                               pre_bias=None if pre_bias is None else pre_bias.to(dtype))


def composed_apply(a: ops.Arguments, statistics: Tensor) -> Tensor:
    """Of checked arguments, whose number of groups is the statistics'."""
    dtype = ops.accumulate_dtype(a.x.dtype)
    x, weight, bias, pre_bias, scale, shift = (t if t is None else t.to(dtype) for t in a.tensors)
    with ops.without_autocast(x.device.type):
        y = reference.group_norm_apply(x, statistics, weight, bias, a.eps, activation="silu" if a.silu else None,
                                       pre_bias=pre_bias, scale=scale, shift=shift)
        if a.dropout_seed is not None:
            y = y * ops.dropout_factors(a)
    return y.to(a.out_dtype or a.x.dtype)


# ---- Autograd --------------------------------------------------------------------------------------------------


def _statistics_setup(ctx, inputs, output):
    x, _, pre_bias = inputs
    ctx.save_for_backward(x, pre_bias, output)


def _statistics_backward(ctx, dstatistics):
    """In PyTorch ops, which have derivatives themselves."""
    x, pre_bias, statistics = ctx.saved_tensors
    (count, mean, _), (_, dmean, dm2) = statistics, dstatistics
    h = x.to(mean.dtype)
    if pre_bias is not None:
        h = h + reference.per_channel(pre_bias.to(mean.dtype), x)
    dx = (reference.per_group(dmean / count.clamp(min=1), x)
          + reference.per_group(2 * dm2, x) * (h - reference.per_group(mean, x)))
    dpre_bias = None
    if pre_bias is not None and ctx.needs_input_grad[2]:
        axes = [axis for axis in range(x.dim()) if axis > 1 or axis < 2 - pre_bias.dim()]
        dpre_bias = (dx.sum(axes) if axes else dx).to(pre_bias.dtype)
    return dx.to(x.dtype), None, dpre_bias


torch.library.register_autograd(_ops.add_op_namespace_prefix("group_norm_statistics"), _statistics_backward,
                                setup_context=_statistics_setup)


def _apply_setup(ctx, inputs, output):
    a = ops.Arguments(*inputs)
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(*a.tensors, inputs[1], mean, rstd, a.dropout_seed)
    ctx.constants = (a.eps, a.silu, a.out_dtype, a.dropout_p)
    ctx.is_channels_last = ops.is_channels_last(a.x)


def _apply_backward(ctx, dy, _, __):
    x, weight, bias, pre_bias, scale, shift, statistics, mean, rstd, seed = ctx.saved_tensors
    eps, silu, out_dtype, dropout_p = ctx.constants
    if seed is not None:
        x = ops.laid_out(x, ctx.is_channels_last)
    a = ops.Arguments(x, statistics.shape[-1], weight, bias, eps, silu, pre_bias, scale, shift, out_dtype, seed,
                      dropout_p)
    needs, needs_statistics = a.needs(ctx.needs_input_grad), ctx.needs_input_grad[1]
    dstatistics = None
    if torch.is_grad_enabled() or ops.in_transform():
        if needs_statistics:
            *found, dstatistics = ops.composed_gradients(composed_apply, a, dy, needs, statistics)
        else:
            found = ops.composed_gradients(lambda a: composed_apply(a, statistics), a, dy, needs)
    else:
        affine = weight, bias, silu, pre_bias, scale, shift
        totals, projections = group_norm_backward_sums(dy, x, mean, rstd, *affine, seed, dropout_p)
        outputs = group_norm_backward_apply(dy, x, mean, rstd, totals, torch.zeros_like(projections), *affine, needs,
                                            seed, dropout_p)
        found = [g for g, need in zip(outputs, needs) if need]
        if needs_statistics:
            dstatistics = _statistics_gradient(a, statistics, mean, rstd, totals)
    dx, _, *others = ops.gradients(needs, found)
    return dx, dstatistics, *others


def _statistics_gradient(a: ops.Arguments, statistics: Tensor, mean: Tensor, rstd: Tensor, totals: Tensor) -> Tensor:
    """From sums of each channel over dz and dz * (x - mean). A count has no gradient."""
    gain = totals.new_ones(()) if a.weight is None else a.weight.to(totals.dtype)
    if a.scale is not None:
        gain = gain * (1 + a.scale.to(totals.dtype))
    dz, dz_x = (gain * totals[:2]).unflatten(2, (a.num_groups, -1)).sum(-1)
    counts, means, _ = statistics.unbind(1)
    whole = counts.sum(0).clamp(min=1)
    dm2 = -0.5 * (dz_x / whole) * rstd * rstd * rstd
    dmeans = counts * (-rstd * dz / whole + 2 * dm2 * (means - mean))
    return torch.stack([torch.zeros_like(dmeans), dmeans, dm2.expand_as(dmeans)], 1)


torch.library.register_autograd(_ops.add_op_namespace_prefix("group_norm_apply"), _apply_backward,
                                setup_context=_apply_setup)


# ---- Fake kernels ----------------------------------------------------------------------------------------------


@torch.library.register_fake(_ops.add_op_namespace_prefix("group_norm_statistics"))
def _(x, num_groups, pre_bias=None):
    return x.new_empty((3, x.shape[0], num_groups), dtype=ops.accumulate_dtype(x.dtype))


@torch.library.register_fake(_ops.add_op_namespace_prefix("group_norm_apply"))
def _(x, statistics, weight, bias, eps, silu, pre_bias, scale, shift, out_dtype, dropout_seed=None, dropout_p=0.0):
    mean = statistics.new_empty((x.shape[0], statistics.shape[3]))
    return torch.empty_like(ops.dense(x), dtype=out_dtype or x.dtype), mean, torch.empty_like(mean)


@torch.library.register_fake(_ops.add_op_namespace_prefix("group_norm_backward_sums"))
def _(dy, x, mean, rstd, weight, bias, silu, pre_bias, scale, shift, dropout_seed=None, dropout_p=0.0):
    sums = 2 if pre_bias is None else 3
    return mean.new_empty((sums, x.shape[0], x.shape[1])), mean.new_empty((*mean.shape, 2))


@torch.library.register_fake(_ops.add_op_namespace_prefix("group_norm_backward_apply"))
def _(dy, x, mean, rstd, totals, projections, weight, bias, silu, pre_bias, scale, shift, output_mask,
      dropout_seed=None, dropout_p=0.0) -> Tuple[Tensor, ...]:
    return ops.empty_gradients(x, (weight, bias, pre_bias, scale, shift), output_mask)
