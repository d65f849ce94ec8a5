"""The forward that the ResNet blocks of all libraries have in common; adapters say which part is which."""

from typing import Any, Callable, Dict, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import functional, ops, pristine
from ..modules import bias_left, convolution, norm_swish, with_bias
from . import site


def resnet(
    block: nn.Module,
    x: Tensor,
    *,
    norm1: nn.Module,
    conv1: nn.Module,
    norm2: nn.Module,
    conv2: nn.Module,
    act1: Optional[nn.Module] = None,
    act2: Optional[nn.Module] = None,
    dropout: Optional[Callable[[Tensor], Tensor]] = None,
    shortcut: Optional[nn.Module] = None,
    resample: Optional[Callable[[Tensor], Tensor]] = None,
    resample_x: Optional[Callable[[Tensor], Tensor]] = None,
    temb: Optional[Tensor] = None,
    cast_temb: bool = False,
    modulate1: Optional[Dict[str, Any]] = None,
    modulate2: Optional[Dict[str, Any]] = None,
    divisor: float = 1.0,
    recompute: bool = False,
) -> Tensor:
    """``(shortcut(x) + conv2(dropout(act2(norm2(conv1(act1(norm1(x))) + temb))))) / divisor``.

    ``resample`` stands between the first activation and conv1, and on x where ``resample_x`` does not. ``temb`` is
    (N, C), or of any shape that broadcasts against conv1's output, and with ``cast_temb`` cast to its dtype.
    ``modulate1`` and ``modulate2`` are ``scale``, ``shift`` and ``called`` of :func:`ldm_fused.modules.norm_swish`, for
    either norm. ``act1`` and ``act2`` are the modules of the activations, None where the class computes swish itself.
    ``recompute`` is the block's own wish to recompute.
    """
    first, second = site.sites(block)[:2]
    # A bias is left to the op that reads a convolution's output only where nothing comes between.
    per_sample = temb is None or temb.dim() == 2
    bias1 = bias_left(conv1, x) if per_sample else None
    bias2 = bias_left(conv2, x)

    def first_half(x: Tensor) -> Tuple[Tensor, Tensor]:
        h, x = norm_swish(norm1, x, act=act1, into=None if resample else conv1, shortcut=True, count=first.count,
                          **modulate1 or {})
        if resample is not None:
            h, x = resample(h), (resample_x or resample)(x)
        return convolution(conv1, h, bias1), x

    def second_half(h: Tensor) -> Tensor:
        pre_bias = temb.to(h.dtype) if cast_temb and temb is not None else temb
        if not per_sample:
            h, pre_bias = h + pre_bias, None
        h, _ = norm_swish(norm2, h, pre_bias=pre_bias, conv_bias=bias1, act=act2,
                          into=None if _drops(dropout) else conv2, count=second.count, **modulate2 or {})
        return convolution(conv2, h if dropout is None else dropout(h), bias2)

    if (recompute or site.state(block).recompute) and _may_recompute():
        # The recomputation stops at what the convolution saves, its input: convolutions run once.
        h, x = checkpoint(first_half, x, use_reentrant=False)
        h = checkpoint(second_half, h, use_reentrant=False)
    else:
        h, x = first_half(x)
        h = second_half(h)
    shortcut_bias = None
    if shortcut is not None:
        shortcut_bias = bias_left(shortcut, x)
        x = convolution(shortcut, x, shortcut_bias)
    if x.dtype != h.dtype or x.shape != h.shape or bias2 is None and shortcut_bias is None and divisor == 1.0:
        y = with_bias(x, shortcut_bias) + with_bias(h, bias2)
        return y if divisor == 1.0 else y / divisor
    return functional.bias_add_residual(x, h, shortcut_bias, bias2, 1.0 / divisor)  # the result's layout is x's


def _may_recompute() -> bool:
    return torch.is_grad_enabled() and not (ops.in_transform() or torch.compiler.is_exporting())


def _drops(dropout: Optional[Callable[[Tensor], Tensor]]) -> bool:
    """Whether something may come between the second norm and its convolution."""
    if dropout is None:
        return False
    return not isinstance(dropout, nn.Module) or pristine.why_not(dropout, nn.Dropout) is not None or (
        dropout.training and dropout.p > 0)
