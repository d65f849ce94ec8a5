"""The two halves of :func:`ldm_fused.group_norm_act`, for a tensor in parts: tiles, or what several devices have."""

from typing import Optional

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import functional, halves, ops, readers, sizes
from .decisions import decided

__all__ = ["group_norm_apply", "group_norm_statistics"]


def group_norm_statistics(x: Tensor, num_groups: int, *, pre_bias: Optional[Tensor] = None) -> Tensor:
    """Count, mean and sum of squared deviations of each group of ``x + pre_bias``: one part of a larger tensor.

    Args:
        x: (N, C, \\*), of the dtypes and layouts that :func:`ldm_fused.group_norm_silu` takes. It may have no elements.
        num_groups: groups that the C channels are divided into.
        pre_bias: (C,) or (N, C), in x's dtype, or float32 with a 16-bit x: added to x before the statistics.

    Returns:
        (3, N, num_groups), in float32 (float64 for float64), for :func:`group_norm_apply`.

    Raises:
        As :func:`ldm_fused.group_norm_act`.
    """
    tensors = (x, pre_bias)
    if has_torch_function(tensors):
        return handle_torch_function(group_norm_statistics, tensors, x, num_groups, pre_bias=pre_bias)
    [pre_bias] = _castable(x, pre_bias)
    a = readers.untraced(functional.checked, x, num_groups, None, None, 0.0, None, pre_bias, None, None, None, True)
    if _is_composed(x):
        return halves.composed_statistics(x, a.num_groups, a.pre_bias)
    return halves.group_norm_statistics(x, a.num_groups, a.pre_bias)


def group_norm_apply(
    x: Tensor,
    statistics: Tensor,
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    eps: float = 1e-5,
    *,
    activation: Optional[str] = "silu",
    pre_bias: Optional[Tensor] = None,
    scale: Optional[Tensor] = None,
    shift: Optional[Tensor] = None,
) -> Tensor:
    """:func:`ldm_fused.group_norm_act` of one part of a tensor, given the statistics of all parts::

        statistics = torch.stack([group_norm_statistics(tile, 32) for tile in tiles])
        tiles = [group_norm_apply(tile, statistics, weight, bias) for tile in tiles]

    Args:
        statistics: (3, N, groups) of the whole, or (parts, 3, N, groups) of its parts, each from
            :func:`group_norm_statistics`. Parts are merged in their order, as Chan, Golub and LeVeque (1979) do.
        others: as of :func:`ldm_fused.group_norm_act`; the ``pre_bias`` is that of the statistics.

    Returns and raises: as :func:`ldm_fused.group_norm_act`. The gradient of statistics flows on to each part; a count
    has none.
    """
    tensors = (x, statistics, weight, bias, pre_bias, scale, shift)
    if has_torch_function(tensors):
        return handle_torch_function(group_norm_apply, tensors, x, statistics, weight, bias, eps,
                                     activation=activation, pre_bias=pre_bias, scale=scale, shift=shift)
    weight, bias, pre_bias, scale, shift = _castable(x, weight, bias, pre_bias, scale, shift)
    num_groups = _groups_of(statistics)
    a = readers.untraced(functional.checked, x, num_groups, weight, bias, eps, activation, pre_bias, scale, shift,
                         functional.autocast_dtype(x), True)
    _check_statistics(statistics, x)
    statistics = statistics if statistics.dim() == 4 else statistics[None]
    if _is_composed(x):
        return halves.composed_apply(a, statistics)
    return halves.group_norm_apply(x, statistics, *a[2:])[0]


def _is_composed(x: Tensor) -> bool:
    """Whether there are no kernels for x, or whoever calls does not know them."""
    if not functional.has_kernels(x):
        functional.warn_without_kernels(x.device)
        return True
    return ops.in_transform() or readers.are_sharded((x,)) or readers.to_onnx() or decided(readers.is_off)


def _castable(x, *parameters):
    return [functional.castable(t, x) for t in parameters] if functional.is_autocast(x) else parameters


def _groups_of(statistics) -> int:
    if not isinstance(statistics, Tensor):
        raise TypeError(f"statistics must be a Tensor, got {type(statistics).__name__}")
    if statistics.dim() not in (3, 4) or statistics.shape[-3] != 3:
        raise RuntimeError(f"statistics must have shape (3, N, groups) or (parts, 3, N, groups), got "
                           f"{list(statistics.shape)}")
    return statistics.shape[-1]


def _check_statistics(statistics: Tensor, x: Tensor) -> None:
    if statistics.dim() == 4 and statistics.shape[0] == 0:
        raise RuntimeError("statistics must be of one part at least, got none")
    if sizes.differ(statistics.shape[-2:-1], x.shape[:1]):
        raise RuntimeError(f"statistics must be of x's {x.shape[0]} samples, got {statistics.shape[-2]}")
    expected = ops.accumulate_dtype(x.dtype)
    if statistics.dtype != expected:
        raise RuntimeError(f"statistics must have {expected} beside an x of {x.dtype}, got {statistics.dtype}")
    if statistics.device != x.device:
        raise RuntimeError(f"statistics must be on x's device {x.device}, got {statistics.device}")
