"""What all ResNet blocks have in common: norm, swish, convolution, norm, swish, dropout, convolution, plus a shortcut.

Each part is bypassed only while it is pristine (:mod:`ldm_fused.bypass`), and called as a module otherwise. Every call
looks at that anew.
"""

from typing import Any, Callable, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import bypass, functional, ops, readers, reference, sizes
from .decisions import decided

Count = Callable[[Tensor, Optional[str]], None]  # takes a norm's input, and the reason why it was not fused, or None


def not_counted(x: Tensor, reason: Optional[str]) -> None:
    """Counts nothing: nobody asks."""


class Stage(NamedTuple):
    """Half of a block: a norm, the activation behind it, and the convolution that takes the result."""

    norm: nn.Module
    conv: nn.Module
    act: Optional[nn.Module] = None  # the module of the activation; None where the class computes swish itself
    scale: Optional[Tensor] = None  # (N, C), as are the next: behind the norm, * (1 + scale) + shift
    shift: Optional[Tensor] = None
    called: Optional[Callable[[Tensor], Tensor]] = None  # calls a norm that computes scale and shift itself
    count: Count = not_counted

    def norm_swish(self, x: Tensor, into: Optional[nn.Module], **options: Any) -> Tuple[Tensor, Tensor]:
        return norm_swish(self.norm, x, act=self.act, scale=self.scale, shift=self.shift, called=self.called,
                          count=self.count, into=into, **options)


def resnet(
    x: Tensor,
    first: Stage,
    second: Stage,
    *,
    dropout: Optional[Callable[[Tensor], Tensor]] = None,
    shortcut: Optional[nn.Module] = None,
    resample: Optional[Callable[[Tensor], Tensor]] = None,
    resample_x: Optional[Callable[[Tensor], Tensor]] = None,
    temb: Optional[Tensor] = None,
    cast_temb: bool = False,
    scale: float = 1.0,
    recompute: bool = False,
) -> Tensor:
    """``(shortcut(x) + second(first(x) + temb)) * scale``, a stage being ``conv(act(norm(x)))``.

    ``dropout`` stands before the second convolution. ``resample`` stands between the first activation and convolution,
    and ``resample_x`` (or else ``resample``) is applied to x. ``temb`` is (N, C), or of any shape that broadcasts
    against the first convolution's output, and with ``cast_temb`` cast to its dtype. ``recompute``: keep for the
    backward pass only x and the first convolution's output, and compute the activated tensors again.
    """
    # A bias is left to the op that reads a convolution's output only where nothing comes between.
    per_sample = temb is None or temb.dim() == 2
    bias1 = decided(bias_left, first.conv, x) if per_sample else None
    bias2 = decided(bias_left, second.conv, x)

    def first_half(x: Tensor) -> Tuple[Tensor, Tensor]:
        h, x = first.norm_swish(x, None if resample else first.conv, shortcut=True)
        if resample is not None:
            h, x = resample(h), (resample_x or resample)(x)
        return convolution(first.conv, h, bias1), x

    def second_half(held: List[Tensor]) -> Tensor:
        h = held.pop()  # nobody else holds it: it is freed when the norm has read it
        pre_bias = temb.to(h.dtype) if cast_temb and temb is not None else temb
        if not per_sample:
            h, pre_bias = h + pre_bias, None
        p = decided(probability_of, dropout)
        h = second.norm_swish(h, None if p is None else second.conv, pre_bias=pre_bias, conv_bias=bias1,
                              dropout_p=p or 0.0)[0]
        return convolution(second.conv, dropout(h) if p is None else h, bias2)

    if recompute and _may_recompute():
        # The recomputation stops at what the convolution saves, its input: convolutions run once.
        h, x = checkpoint(first_half, x, use_reentrant=False)
        h = checkpoint(lambda h: second_half([h]), h, use_reentrant=False)
    else:
        held = list(first_half(x))  # not *held, x = ...: torch.compile of 2.11 makes that a tuple
        x = held.pop()
        h = second_half(held)
    shortcut_bias = None
    if shortcut is not None:
        shortcut_bias = decided(bias_left, shortcut, x)
        x = convolution(shortcut, x, shortcut_bias)
    # The result's layout is that of h, for the convolution's weight may be in channels_last, and x is not yet.
    is_sum = bias2 is None and shortcut_bias is None and scale == 1.0
    if is_sum and decided(_takes_sum, h, x, second.conv):
        return h.add_(x)
    if is_sum or not _are_alike(h, x):
        y = with_bias(h, bias2) + with_bias(x, shortcut_bias)
        return y if scale == 1.0 else y * scale
    return functional.bias_add_residual(h, x, bias2, shortcut_bias, scale)


def _takes_sum(h: Tensor, x: Tensor, conv: nn.Module) -> bool:
    """Whether x may be added to ``h``, which ``conv`` gave, in place: nobody else holds it, autograd has not kept it."""
    if torch.compiler.is_compiling() or ops.in_transform() or torch.jit.is_tracing() or type(h) is not Tensor:
        return False
    return _are_alike(h, x) and bypass.is_plain_convolution(conv, h.device)


def _may_recompute() -> bool:
    return torch.is_grad_enabled() and not (ops.in_transform() or torch.compiler.is_exporting())


def bias_left(conv: nn.Module, x: Tensor) -> Optional[Tensor]:
    """The bias that :func:`convolution` leaves to the op that reads its output; None where the convolution adds it.

    On CUDA PyTorch adds a convolution's bias in a kernel of its own, which reads and writes the whole tensor; on a CPU
    the convolution adds it on the way.
    """
    if not _has_separate_bias(x) or ops.in_transform() or not bypass.is_plain_convolution(conv, x.device):
        return None
    bias, out_dtype = conv.bias, conv.weight.dtype
    if functional.is_autocast(x) and out_dtype != torch.float64:
        out_dtype = torch.get_autocast_dtype(x.device.type)
    return bias if bias is not None and functional.takes_beside(bias.dtype, out_dtype) else None


def _has_separate_bias(x: Tensor) -> bool:
    return x.is_cuda and functional.has_kernels(x)


def convolution(conv: nn.Module, x: Tensor, left: Optional[Tensor]) -> Tensor:
    """``conv(x)``, without the bias if that was ``left``."""
    return conv(x) if left is None else conv._conv_forward(x, conv.weight, None)


def with_bias(x: Tensor, left: Optional[Tensor]) -> Tensor:
    """A convolution's output with the bias that was ``left``, as the convolution would have given it."""
    return x if left is None else x + reference.per_channel(left, x).to(x.dtype)


def probability_of(dropout: Optional[Callable[[Tensor], Tensor]]) -> Optional[float]:
    """The probability with which ``dropout`` zeroes an element now; None where it must be called."""
    if dropout is None:
        return 0.0
    if type(dropout) is nn.Identity and bypass.module_obstacle(dropout, nn.Identity) is None:
        return 0.0
    if not isinstance(dropout, nn.Module) or bypass.module_obstacle(dropout, nn.Dropout) is not None:
        return None
    return dropout.p if dropout.training else 0.0


def norm_swish(
    norm: nn.Module,
    x: Tensor,
    *,
    pre_bias: Optional[Tensor] = None,
    conv_bias: Optional[Tensor] = None,
    scale: Optional[Tensor] = None,
    shift: Optional[Tensor] = None,
    act: Optional[nn.Module] = None,
    called: Optional[Callable[[Tensor], Tensor]] = None,
    into: Optional[nn.Module] = None,
    shortcut: bool = False,
    dropout_p: float = 0.0,
    count: Count = not_counted,
) -> Tuple[Tensor, Tensor]:
    """``dropout(swish(norm(x + conv_bias + pre_bias) * (1 + scale) + shift))``, and x for a shortcut.

    One op computes it if ``norm`` is pristine, else ``norm`` is called. With ``shortcut``, norm's backward pass adds
    the gradient of the returned x, and there is no dropout.

    ``pre_bias``, ``scale`` and ``shift`` are (N, C). ``conv_bias`` is what the convolution before has left out. ``act``
    is the module that computes swish, where one does. ``called`` calls a norm that computes ``scale`` and ``shift``
    itself. ``into`` is the convolution that takes the result: under autocast the op stores in the dtype that a plain
    convolution would cast it to. ``count`` is called with x, and the reason why the norm was not fused, or None.
    """
    if pre_bias is not None and not _are_alike(pre_bias, x, 2):
        # Promoted or broadcast, as PyTorch does it.
        x, conv_bias, pre_bias = _with_biases(x, conv_bias, pre_bias), None, None
    reason = decided(_norm_swish_obstacle, norm, x, scale, shift, act)
    if reason is not None:
        x = _with_biases(x, conv_bias, pre_bias)
    count(x, reason)
    if reason is not None:
        h = norm(x) if called is None else called(x)
        if scale is not None and called is None:
            h = h * (1 + reference.per_channel(scale, h))
        if shift is not None and called is None:
            h = h + reference.per_channel(shift, h)
        known = bypass.known_norm(norm)
        if known is None or not known.activated:
            h = (reference.swish if act is None else act)(h)
        return (F.dropout(h, dropout_p) if dropout_p else h), x
    if conv_bias is not None:
        pre_bias = conv_bias if pre_bias is None else pre_bias + conv_bias
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    dtype = decided(_autocast_dtype_of_convolution, x, into)
    shortcut = shortcut and torch.is_grad_enabled()
    keeps_dtype = bypass.known_norm(norm).keeps_dtype
    if dtype is None and not keeps_dtype and (functional.is_autocast(x) or not shortcut):
        return functional.group_norm_act(x, norm.num_groups, weight, bias, norm.eps, pre_bias=pre_bias, scale=scale,
                                         shift=shift, dropout_p=dropout_p), x
    if shortcut:
        return functional.group_norm_act_and_shortcut(dtype, x, norm.num_groups, weight, bias, norm.eps,
                                                      pre_bias=pre_bias, scale=scale, shift=shift)
    return functional.group_norm_act_as(dtype, x, norm.num_groups, weight, bias, norm.eps, pre_bias=pre_bias,
                                        scale=scale, shift=shift, dropout_p=dropout_p), x


def _are_alike(a: Tensor, b: Tensor, dimensions: Optional[int] = None) -> bool:
    """Whether ``a`` has the dtype of ``b`` and the shape of that many of its first dimensions."""
    return a.dtype == b.dtype and readers.untraced(_has_shape_of, a, b, dimensions)


def _has_shape_of(a: Tensor, b: Tensor, dimensions: Optional[int]) -> bool:
    return sizes.are_same(a.shape, b.shape[:dimensions])


def _with_biases(x: Tensor, conv_bias: Optional[Tensor], pre_bias: Optional[Tensor]) -> Tensor:
    x = with_bias(x, conv_bias)
    return x if pre_bias is None else x + reference.per_channel(pre_bias, x)


def _norm_swish_obstacle(norm: nn.Module, x: Tensor, scale, shift, act) -> Optional[str]:
    reason = bypass.norm_obstacle(norm, x)
    if reason is not None:
        return reason
    if act is not None:
        reason = bypass.activation_obstacle(act)
        if reason is not None:
            return f"its activation: {reason}"
    for name, t in (("scale", scale), ("shift", shift)):
        if t is not None and not (readers.untraced(_has_shape_of, t, x, 2)
                                  and functional.takes_beside(t.dtype, x.dtype)):
            return f"its {name} is {t.dtype} {list(t.shape)} and the input {x.dtype} {list(x.shape)}"
    return None


def _autocast_dtype_of_convolution(x: Tensor, conv: Optional[nn.Module]) -> Optional[torch.dtype]:
    """The dtype that autocast casts a plain convolution's input to, if the op can store it; None to leave it alone."""
    device_type = x.device.type
    if not functional.is_autocast(x) or not bypass.is_plain_convolution(conv):
        return None
    dtype = torch.get_autocast_dtype(device_type)
    return dtype if dtype == x.dtype or x.dtype == torch.float32 else None
