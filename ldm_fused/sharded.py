"""group_norm_act of a tensor whose trailing axes are cut across the ranks of a process group.

Each rank computes the statistics of its part. One all-gather of three numbers a group gives all of them to every rank,
which merges them in the order of ranks, and so to the same bits. The backward pass sums two numbers a group over all
ranks, between its two halves. Sums over parts are no concern of a rank: gradients of parameters are of its part.
"""

from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor

from . import halves, ops, readers


def op(group, a: ops.Arguments) -> ops.Op:
    """Ways to the op for parts on the ranks of ``group``, as of the op for a whole tensor.

    Raises TypeError for a DTensor, which knows of other ranks itself.
    """
    if readers.are_sharded(a):
        raise TypeError("group is for the part that a rank has, and x is a DTensor: give its to_local()")
    return ops.Op(partial(_composed, group), partial(_composed, group), partial(_registered, group),
                  SimpleNamespace(apply=partial(GroupNormAct.apply, group)))


# ---- Between ranks ---------------------------------------------------------------------------------------------


class AllGather(torch.autograd.Function):
    """(R, *) of R ranks, from (*) of each."""

    @staticmethod
    def forward(group, t):
        return gather(t, group)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.group = inputs[0]

    @staticmethod
    def backward(ctx, dy):
        return None, SumAndScatter.apply(ctx.group, dy)


class SumAndScatter(torch.autograd.Function):
    """The rank's own (*) of the sum over all ranks, from (R, *) of each."""

    @staticmethod
    def forward(group, t):
        t = t.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(t, group=group)
        return t[dist.get_rank(group)].clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.group = inputs[0]

    @staticmethod
    def backward(ctx, dy):
        return None, AllGather.apply(ctx.group, dy)


def gather(t: Tensor, group) -> Tensor:
    """(R, *), from a ``t`` (*) of each of R ranks."""
    ranks = dist.get_world_size(group)
    if ranks < 1:
        raise ValueError("group must be a process group that this process is in")
    gathered = t.new_empty((ranks * t.shape[0], *t.shape[1:]))
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13
    all_gather(gathered, t.contiguous(), group=group)
    return gathered.unflatten(0, (ranks, t.shape[0]))


# ---- The ways to the op ----------------------------------------------------------------------------------------


def _composed(group, a: ops.Arguments) -> Tensor:
    statistics = halves.composed_statistics(a.x, a.num_groups, a.pre_bias)
    return halves.composed_apply(a, AllGather.apply(group, statistics))


def _registered(group, *arguments) -> Tensor:
    a = ops.Arguments(*arguments)
    statistics = AllGather.apply(group, halves.group_norm_statistics(a.x, a.num_groups, a.pre_bias))
    return halves.group_norm_apply(a.x, statistics, *a[2:])[0]


class GroupNormAct(torch.autograd.Function):
    """The op in eager mode. It keeps nothing of the tensor's size but x, as that for a whole tensor."""

    @staticmethod
    def forward(ctx, group, *arguments):
        a = ops.Arguments(*arguments)
        own = ops.below_autograd(halves.group_norm_statistics, a.x, a.num_groups, a.pre_bias)
        parts = gather(own, group)
        y, mean, rstd = ops.below_autograd(halves.group_norm_apply, a.x, parts, *a[2:])
        ops.save_for_backward(ctx, a, mean, rstd)
        ctx.group, ctx.share = group, own[0] / parts[:, 0].sum(0).clamp(min=1)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, pre_bias, scale, shift, mean, rstd, seed = ctx.saved_tensors
        num_groups, eps, silu, out_dtype, dropout_p = ctx.constants
        if seed is not None:
            x = ops.laid_out(x, ctx.is_channels_last)
        a = ops.Arguments(x, num_groups, weight, bias, eps, silu, pre_bias, scale, shift, out_dtype, seed, dropout_p)
        needs = a.needs(ctx.needs_input_grad[1:])
        if torch.is_grad_enabled() or ops.in_transform():
            found = ops.composed_gradients(partial(_composed, ctx.group), a, dy, needs)
        else:
            affine = weight, bias, silu, pre_bias, scale, shift
            totals, projections = halves.group_norm_backward_sums(dy, x, mean, rstd, *affine, seed, dropout_p)
            if needs[0] or needs[3]:  # other gradients take nothing from the whole group
                projections *= ctx.share[..., None]
                dist.all_reduce(projections, group=ctx.group)
            outputs = halves.group_norm_backward_apply(dy, x, mean, rstd, totals, projections, *affine, needs, seed,
                                                       dropout_p)
            found = [g for g, need in zip(outputs, needs) if need]
        return (None, *ops.gradients(needs, found))
