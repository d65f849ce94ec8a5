"""One call of a norm that is known, computed by the op."""

from typing import Optional

from torch import Tensor, nn

from .. import bypass, functional


def call_obstacle(norm: nn.Module, cls: type, x: Tensor) -> Optional[str]:
    """The reason why a norm, which counts as a ``cls``, must compute this call itself, or None; its hooks aside, which
    PyTorch calls around it."""
    reason = bypass.class_obstacle(cls) or bypass.weight_obstacle(norm, x)
    if reason is not None:
        return reason
    known = bypass.known_norm(norm, cls)
    return "its attributes have changed since it was read" if known is None else known.obstacle(norm)


def group_norm(norm: nn.Module, cls: type, x: Tensor, activation: Optional[str]) -> Tensor:
    """What a norm, which counts as a ``cls``, gives with an activation behind it, in the dtype that the class gives."""
    arguments = norm.num_groups, norm.weight, norm.bias, norm.eps
    if bypass.known_norm(norm, cls).keeps_dtype:
        return functional.group_norm_act_as(None, x, *arguments, activation=activation)
    return functional.group_norm_act(x, *arguments, activation=activation)
