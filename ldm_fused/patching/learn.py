"""Reads what classes of norms, activations and convolutions compute, where nobody has registered them."""

import weakref
from typing import Any, Dict, Optional, Tuple

from torch import nn

from .. import bypass
from . import formula, source, swap
from .source import Unreadable
from .trace import trace

_SIZES = {"num_groups", "eps", "num_channels", "affine"}  # the op is told of them in each call


class ReadNorm:
    """What was read of a class of norms, by the values of the attributes that decide it."""

    def __init__(self, names: Tuple[str, ...]) -> None:
        self.names = names
        self.by: Dict[Tuple[Any, ...], Optional[bypass.Norm]] = {}

    def told(self, norm: nn.Module) -> Tuple[Any, ...]:
        return tuple(source.told(norm, name) for name in self.names)

    def __call__(self, norm: nn.Module) -> Optional[bypass.Norm]:
        return self.by.get(self.told(norm))


def looks_like_a_norm(module: nn.Module) -> bool:
    cls = swap.original(type(module))
    if isinstance(module, nn.GroupNorm):
        return cls is not nn.GroupNorm
    return not module._modules and hasattr(module, "num_groups") and hasattr(module, "eps") and "forward" in dir(cls)


def norm(module: nn.Module) -> Optional[str]:
    """Reads what a norm computes and remembers it. Returns the reason why it cannot be read, or None."""
    cls = type(module)
    known = bypass._NORMS.get(cls)
    if isinstance(known, bypass.Norm) or known is not None and known(module) is not None:
        return None
    if module._modules:
        return "it has parts"
    if cls.forward is nn.GroupNorm.forward:
        bypass.know_norm(cls, bypass.Norm())
        return None
    try:
        traced = trace(module, "forward", {0: 4})
        if traced.has_modes:
            return "it differs in training"
        found = formula.norm(traced, module)
    except Unreadable as reason:
        return str(reason)
    names = tuple(name for name in traced.names if name not in _SIZES)
    if known is None:
        known = ReadNorm(names)
        bypass.know_norm(cls, known)
    if known.names != names:
        return "it branches in another way than its like"
    known.by[known.told(module)] = found
    return None


def activation(module: nn.Module) -> None:
    """Reads whether a module without parts and parameters computes swish, and remembers that for its class."""
    cls = type(module)
    if cls in _no_activations or bypass.is_activation(module) or module._modules or module._parameters:
        return
    try:
        traced = trace(module, "forward", {0: 4})
        if not traced.names and not traced.has_modes and formula.is_swish(traced, module):
            bypass.know_activation(cls)
            return
    except Unreadable:
        pass
    _no_activations.add(cls)


def convolution(module: nn.Module) -> None:
    """Remembers a subclass of PyTorch's convolutions that computes what they do."""
    cls = type(module)
    for base in (nn.Conv2d, nn.Conv3d, nn.Conv1d):
        if isinstance(module, base) and cls.forward is base.forward and cls._conv_forward is base._conv_forward:
            bypass.know_convolution(cls)


_no_activations: "weakref.WeakSet[type]" = weakref.WeakSet()
