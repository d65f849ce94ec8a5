"""The registered ops ``torch.ops.ldm_fused.*`` as PyTorch sees them: fake kernels and autograd.

The binary registers the kernels (csrc/ops.cpp has the schemas). Users call :mod:`ldm_fused.functional`, which checks
their arguments.
"""

import os
import warnings
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from ._ops import add_op_namespace_prefix, ops

try:
    from . import _C  # its import registers the ops
except ImportError as error:
    how = "`make build` (or `pip install --no-build-isolation -e .`) in its source tree"
    if find_spec("._C", __package__) is None:
        raise ImportError(f"ldm_fused is not built yet: run {how}, then import it again.") from None
    raise ImportError(f"ldm_fused's binary does not load under torch {torch.__version__}: build it again with {how}. "
                      f"{error}") from error

group_norm_act = ops.group_norm_act.default
group_norm_act_backward = ops.group_norm_act_backward.default
# These have no fake kernel, and so refuse whatever is no plain tensor.
group_norm_act_training = ops.group_norm_act_training.default
group_norm_act_training_backward = ops.group_norm_act_training_backward.default
group_norm_act_inference = ops.group_norm_act_inference.default

bias_add_residual = ops.bias_add_residual.default
channel_sums = ops.channel_sums.default


def cuda_obstacle(built: str, running: Optional[str]) -> Optional[str]:
    """Why CUDA kernels that were built with CUDA ``built`` are not used by a torch with CUDA ``running``, or None.

    Args:
        built: the toolkit's version, such as "13.0"; "" for a binary without CUDA kernels, which is nothing to tell of.
        running: ``torch.version.cuda``: None for a torch without CUDA.
    """
    major = built.partition(".")[0]
    if not built or running and running.partition(".")[0] == major:
        return None
    has = f"with CUDA {running}" if running else "without CUDA"
    return (f"ldm_fused has kernels for CUDA {major}, and torch {torch.__version__} is built {has}: its CPU kernels "
            f"serve, and CUDA tensors get PyTorch's ops.")


_obstacle = cuda_obstacle(_C.build_info()["cuda"], torch.version.cuda)
if _obstacle:
    warnings.warn(_obstacle, stacklevel=2)
HAS_CUDA = bool(_C.build_info()["cuda"]) and not _obstacle

if os.environ.get("LDM_FUSED_CPU_ISA", "") not in ("", *_C.build_info()["cpu_isas"].split(";")):
    raise ImportError(f"LDM_FUSED_CPU_ISA is '{os.environ['LDM_FUSED_CPU_ISA']}', and this processor has "
                      f"{_C.build_info()['cpu_isas'].replace(';', ', ')}.")


_devices_with_code = {}  # by index


def has_cuda_code(index: int) -> bool:
    """Whether a CUDA device runs the code that this build has; it is asked once."""
    found = _devices_with_code.get(index)
    if found is None:
        try:
            found = _devices_with_code[index] = _C.has_cuda_code(index)
        except RuntimeError:  # there is no such device: a tensor on it is a fake one
            return True
    return found


# What torch.compiler.assume_constant_result does. That imports torch._dynamo, which nothing else here needs.
has_cuda_code._dynamo_marked_constant = True


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic and statistics for an x of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Arguments(NamedTuple):
    """The op's arguments, in its schema's order."""

    x: Tensor
    num_groups: int
    weight: Optional[Tensor]
    bias: Optional[Tensor]
    eps: float
    silu: bool
    pre_bias: Optional[Tensor]
    scale: Optional[Tensor]
    shift: Optional[Tensor]
    out_dtype: Optional[torch.dtype]
    dropout_seed: Optional[Tensor] = None
    dropout_p: float = 0.0

    @property
    def tensors(self) -> List[Optional[Tensor]]:
        """The arguments that have a gradient."""
        return [self[i] for i in _PLACES]

    @property
    def requires_grad(self) -> bool:
        for i in _PLACES:  # a loop, which is the cheapest way to ask in every call
            t = self[i]
            if t is not None and t.requires_grad:
                return True
        return False

    def needs(self, asked: Sequence[bool]) -> List[bool]:
        """Which of ``tensors`` need a gradient, of arguments that are each asked for or not."""
        return [asked[i] and self[i] is not None for i in _PLACES]


# Where the arguments stand that have a gradient, in the order of the backward op's outputs.
_PLACES = tuple(Arguments._fields.index(name) for name in ("x", "weight", "bias", "pre_bias", "scale", "shift"))


class ResidualArguments(NamedTuple):
    """The arguments of bias_add_residual, in its schema's order."""

    x: Tensor
    residual: Tensor
    bias: Optional[Tensor]
    residual_bias: Optional[Tensor]
    scale: float

    @property
    def requires_grad(self) -> bool:
        return any(t is not None and t.requires_grad for t in self[:4])


def composed_residual(a: ResidualArguments) -> Tensor:
    """bias_add_residual from PyTorch ops, also where the two tensors' dtypes differ and the result's is promoted."""
    out_dtype = torch.promote_types(a.x.dtype, a.residual.dtype)
    dtype = accumulate_dtype(out_dtype)
    y = reference.bias_add_residual(*(t if t is None else t.to(dtype) for t in a[:4]), a.scale)
    return y.to(out_dtype)


def composed(a: Arguments) -> Tensor:
    """The op from PyTorch ops, for what has no kernel: other devices, ``torch.func``, derivatives of derivatives."""
    dtype = accumulate_dtype(a.x.dtype)
    x, weight, bias, pre_bias, scale, shift = (t if t is None else t.to(dtype) for t in a.tensors)
    if weight is None and bias is not None:  # F.group_norm's backward fails on a bias without a weight
        weight = torch.ones_like(bias)
    with without_autocast(a.x.device.type):
        y = reference.group_norm_act(x, a.num_groups, weight, bias, a.eps, activation="silu" if a.silu else None,
                                     pre_bias=pre_bias, scale=scale, shift=shift)
        if a.dropout_seed is not None:
            y = y * dropout_factors(a)
    return y.to(a.out_dtype or a.x.dtype)


def formula(x: Tensor, num_groups: int, weight: Optional[Tensor], bias: Optional[Tensor], eps: float, silu: bool,
            pre_bias: Optional[Tensor], scale: Optional[Tensor], shift: Optional[Tensor]) -> Tensor:
    """The op without its dropout as PyTorch's functions compute it, one after the other."""
    y = reference.group_norm_act(x, num_groups, weight, bias, eps, activation=None, pre_bias=pre_bias, scale=scale,
                                 shift=shift)
    return F.silu(y) if silu else y


def _formula(a: Arguments) -> Tensor:
    if any(t is not None and t.dtype != a.x.dtype for t in a.tensors):  # PyTorch's do not take those on each device
        return composed(a)
    return formula(*a[:9]).to(a.out_dtype or a.x.dtype)


def dropout_factors(a: Arguments) -> Tensor:
    """What dropout multiplies each element by, in the arithmetic's dtype: the op itself makes these from zeros."""
    zeros = torch.zeros_like(dense(a.x), dtype=accumulate_dtype(a.x.dtype))
    weight = zeros.new_zeros(a.x.shape[1])
    return below_autograd(group_norm_act, zeros, a.num_groups, weight, torch.ones_like(weight), 1.0, False, None, None,
                          None, None, a.dropout_seed, a.dropout_p)[0]


def without_autocast(device_type: str):
    """A context in which autocast casts nothing."""
    return torch.autocast(device_type, enabled=False) if has_autocast(device_type) else nullcontext()


def has_autocast(device_type: str) -> bool:
    """``torch.amp.is_autocast_available``, which torch 2.11 cannot compile, for the devices that there are."""
    return device_type != "meta"


def in_transform() -> bool:
    """Whether ``torch.func`` or forward-mode AD is active. Neither sees into an op with an autograd formula alone."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


# ---- Autograd --------------------------------------------------------------------------------------------------


def save_for_backward(ctx, a: Arguments, mean: Tensor, rstd: Tensor) -> None:
    """Keeps nothing of the tensor's size but x."""
    ctx.save_for_backward(*a.tensors, mean, rstd, a.dropout_seed)
    ctx.constants = (a.num_groups, a.eps, a.silu, a.out_dtype, a.dropout_p)
    if a.dropout_seed is not None:  # its mask goes by places in memory, which hooks on saved tensors may change
        ctx.is_channels_last = is_channels_last(a.x)


def backward(ctx, dy: Tensor, dx_shortcut: Optional[Tensor] = None):
    """A gradient for each argument of the op that needs one. The shortcut's, ``dx_shortcut``, is added to x's."""
    x, weight, bias, pre_bias, scale, shift, mean, rstd, dropout_seed = ctx.saved_tensors
    num_groups, eps, silu, out_dtype, dropout_p = ctx.constants
    if dropout_seed is not None:
        x = laid_out(x, ctx.is_channels_last)
    a = Arguments(x, num_groups, weight, bias, eps, silu, pre_bias, scale, shift, out_dtype, dropout_seed, dropout_p)
    needs = a.needs(ctx.needs_input_grad)
    if torch.is_grad_enabled() or in_transform():  # the gradients must themselves be differentiable
        found = composed_gradients(composed, a, dy, needs)
        if needs[0] and dx_shortcut is not None:
            found[0] = found[0] + dx_shortcut
    else:
        outputs = group_norm_act_backward(dy, x, mean, rstd, weight, bias, silu, pre_bias, scale, shift, needs,
                                          dx_shortcut, dropout_seed, dropout_p)
        found = [g for g, need in zip(outputs, needs) if need]
    return gradients(needs, found)


def composed_gradients(compose: Callable, a: Arguments, dy: Tensor, needs: List[bool], *others: Tensor) -> List[Tensor]:
    """The gradients of those of ``a.tensors`` that are needed, and of ``others``, through ``compose(a, *others)``; they
    are differentiable."""
    with torch.enable_grad():
        # Views, which nothing else depends on: arguments may depend on each other, be the same, or have hooks.
        a = Arguments(*(t.view_as(t) if isinstance(t, Tensor) else t for t in a))
        others = [t.view_as(t) for t in others]
        wanted = [t for t, need in zip(a.tensors, needs) if need] + others
        return list(torch.autograd.grad(compose(a, *others), wanted, dy, create_graph=True))


def gradients(needs: List[bool], found: List[Tensor]) -> Tuple[Optional[Tensor], ...]:
    """What autograd wants: for each argument of the op its gradient among those ``found``, or None."""
    every: List[Optional[Tensor]] = [None] * len(Arguments._fields)
    following = iter(found)
    for i, need in zip(_PLACES, needs):
        if need:
            every[i] = next(following)
    return tuple(every)


def below_autograd(op, *arguments):
    """An op without its autograd formula."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


class GroupNormAct(torch.autograd.Function):
    """The op in eager mode. It calls the kernels itself, at a third of the registered formula's dispatch cost."""

    @staticmethod
    def forward(ctx, *arguments):
        y, mean, rstd = below_autograd(group_norm_act, *arguments)
        save_for_backward(ctx, Arguments(*arguments), mean, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        return backward(ctx, dy)


class PlainGroupNormAct(torch.autograd.Function):
    """The op of its first six arguments, which are plain tensors, in eager mode. What a small call costs is what is
    passed, kept and returned."""

    @staticmethod
    def forward(ctx, x, num_groups, weight, bias, eps, silu):
        y, mean, rstd = group_norm_act_training(x, num_groups, weight, bias, eps, silu)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.constants = num_groups, eps, silu
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        num_groups, eps, silu = ctx.constants
        needs_x, _, needs_weight, needs_bias, _, _ = ctx.needs_input_grad  # of None nothing is needed
        if torch.is_grad_enabled() or in_transform():
            a = Arguments(x, num_groups, weight, bias, eps, silu, None, None, None, None)
            needs = [needs_x, needs_weight, needs_bias, False, False, False]
            return gradients(needs, composed_gradients(composed, a, dy, needs))[:6]
        dx, dweight, dbias = group_norm_act_training_backward(dy, x, mean, rstd, weight, bias, silu, needs_x,
                                                              needs_weight, needs_bias)
        return (dx if needs_x else None, None, dweight if needs_weight else None, dbias if needs_bias else None, None,
                None)


class GroupNormActAndShortcut(torch.autograd.Function):
    """The op in eager mode, and x itself for a shortcut. The backward kernel adds the shortcut's gradient to dx, where
    autograd would read both and write the sum."""

    @staticmethod
    def forward(ctx, *arguments):
        y, mean, rstd = below_autograd(group_norm_act, *arguments)
        save_for_backward(ctx, Arguments(*arguments), mean, rstd)
        ctx.set_materialize_grads(False)
        return y, arguments[0]

    @staticmethod
    def backward(ctx, dy, dx_shortcut):
        if dy is None:
            return gradients([True], [dx_shortcut])
        return backward(ctx, dy, dx_shortcut)


class Op(NamedTuple):
    """Ways to one result from checked arguments: PyTorch ops in the op's arithmetic, and as PyTorch would round them;
    the registered op, and eager mode's Function."""

    composed: Callable
    formula: Callable
    registered: Callable
    autograd: type


GROUP_NORM_ACT = Op(composed, _formula, lambda *a: group_norm_act(*a)[0], GroupNormAct)
GROUP_NORM_ACT_AND_SHORTCUT = Op(lambda a: (composed(a), a.x), lambda a: (_formula(a), a.x),
                                 lambda *a: (group_norm_act(*a)[0], a[0]), GroupNormActAndShortcut)


def _setup_context(ctx, inputs, output):
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    save_for_backward(ctx, Arguments(*inputs), mean, rstd)


def _backward(ctx, dy, dmean, drstd):
    return backward(ctx, dy)


torch.library.register_autograd(add_op_namespace_prefix("group_norm_act"), _backward, setup_context=_setup_context)


def _residual_setup(ctx, inputs, output):
    """Keeps nothing of the tensor's size."""
    _, _, bias, residual_bias, scale = inputs
    ctx.constants = *(None if b is None else b.dtype for b in (bias, residual_bias)), scale


def _residual_backward(ctx, dy):
    bias_dtype, residual_bias_dtype, scale = ctx.constants
    dx = dy if scale == 1.0 else dy * scale
    dbias = dresidual_bias = None
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
        if torch.is_grad_enabled() or in_transform():
            sums = dy.to(accumulate_dtype(dy.dtype)).sum([axis for axis in range(dy.dim()) if axis != 1])
        else:
            sums = channel_sums(dy)
        sums = sums * scale
        dbias = sums.to(bias_dtype) if ctx.needs_input_grad[2] else None
        dresidual_bias = sums.to(residual_bias_dtype) if ctx.needs_input_grad[3] else None
    return dx, dx, dbias, dresidual_bias, None


class BiasAddResidual(torch.autograd.Function):
    """bias_add_residual in eager mode, where it calls the kernels itself."""

    @staticmethod
    def forward(ctx, *arguments):
        _residual_setup(ctx, arguments, None)
        return below_autograd(bias_add_residual, *arguments)

    backward = staticmethod(_residual_backward)


BIAS_ADD_RESIDUAL = Op(composed_residual, lambda a: reference.bias_add_residual(*a), bias_add_residual, BiasAddResidual)

torch.library.register_autograd(add_op_namespace_prefix("bias_add_residual"), _residual_backward,
                                setup_context=_residual_setup)


# ---- Fake kernels ----------------------------------------------------------------------------------------------


def is_channels_last(x: Tensor) -> bool:
    """Whether the kernels walk x with the channels innermost (csrc/tensors.h). x may have any number of axes, as one
    whose pixels attention has flattened; PyTorch has memory formats for four and five alone."""
    return not x.is_contiguous() and x.dim() >= 3 and x.movedim(1, -1).is_contiguous()


def laid_out(x: Tensor, channels_last: bool) -> Tensor:
    """x in one of the two orders that the kernels walk."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()


def dense(x: Tensor) -> Tensor:
    """x as the kernels walk it: as it is if contiguous or channels_last, else made contiguous."""
    return x if is_channels_last(x) else x.contiguous()


def empty_gradients(x: Tensor, parameters, output_mask: List[bool]) -> Tuple[Tensor, ...]:
    """Of x and of parameters; one that is not wanted has no elements."""
    def gradient(parameter, wanted):
        return x.new_empty((0,)) if parameter is None or not wanted else parameter.new_empty(parameter.shape)

    dx = torch.empty_like(dense(x)) if output_mask[0] else x.new_empty((0,))
    return (dx, *(gradient(p, wanted) for p, wanted in zip(parameters, output_mask[1:])))


@torch.library.register_fake(add_op_namespace_prefix("group_norm_act"))
def _(x, num_groups, weight, bias, eps, silu, pre_bias, scale, shift, out_dtype, dropout_seed=None, dropout_p=0.0):
    y = torch.empty_like(dense(x), dtype=out_dtype or x.dtype)
    mean = x.new_empty((x.shape[0], num_groups), dtype=accumulate_dtype(x.dtype))
    return y, mean, torch.empty_like(mean)


@torch.library.register_fake(add_op_namespace_prefix("group_norm_act_backward"))
def _(dy, x, mean, rstd, weight, bias, silu, pre_bias, scale, shift, output_mask, dx_shortcut=None, dropout_seed=None,
      dropout_p=0.0):
    return empty_gradients(x, (weight, bias, pre_bias, scale, shift), output_mask)


@torch.library.register_fake(add_op_namespace_prefix("bias_add_residual"))
def _(x, residual, bias, residual_bias, scale):
    return torch.empty_like(dense(x))


@torch.library.register_fake(add_op_namespace_prefix("channel_sums"))
def _(x):
    return x.new_empty((x.shape[1],), dtype=accumulate_dtype(x.dtype))
