"""PyTorch's own classes: a GroupNorm that stands alone, and a Sequential that holds one and an activation."""

from typing import Optional, Sequence

import torch
from torch import Tensor, nn

from ... import pristine
from ...resnet import norm_swish
from ...route import decided
from .. import site, swap
from ..adapter import Adapter
from ..pair import group_norm


class Norm(Adapter):
    """A GroupNorm without activation. Hooks need no look: they are called around its forward, as always."""

    kind = "norm"

    def why_not(self, norm: nn.Module) -> Optional[str]:
        return pristine.why_not_class(type(norm))

    def sites(self, norm: nn.Module) -> Sequence[str]:
        return ("",)

    def variant(self, norm: nn.Module):
        return getattr(norm, "weight", None) is None, pristine.known_norm(norm)

    def examples(self, norm: nn.Module):
        # The op is PyTorch's GroupNorm, which has its own tests; other classes are tried.
        if swap.original(type(norm)) is nn.GroupNorm:
            return []
        channels = getattr(norm, "num_channels", None) or norm.weight.shape[0]
        return [(torch.randn(2, channels, *sizes),) for sizes in ((7,), (5, 4), (3, 4, 2))]

    def forward(self, norm: nn.Module, input: Tensor) -> Tensor:
        known = pristine.known_norm(norm, swap.original(type(norm)))
        reason = decided(self.why_not_now, norm, known, input)
        site.sites(norm)[0].count(input, reason)
        if reason is not None:
            return swap.as_before(norm, input)
        return group_norm(norm, swap.original(type(norm)), input, "silu" if known.activated else None)

    def why_not_now(self, norm: nn.Module, known: Optional[pristine.Norm], x: Tensor) -> Optional[str]:
        """The reason why it must be called, or None."""
        reason = pristine.why_not_class(swap.original(type(norm))) or pristine.why_not_beside(norm, x)
        if reason is None:
            reason = "its attributes have changed since it was read" if known is None else known.why_not_now(norm)
        return reason


class Left(Norm):
    """A norm that is not known: it is called, and counted."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def why_not_now(self, norm: nn.Module, known: Optional[pristine.Norm], x: Tensor) -> Optional[str]:
        return self.reason

    def why_not(self, norm: nn.Module) -> Optional[str]:
        return None


class Sequential(Adapter):
    """A Sequential in which a norm is followed by SiLU: OpenAI's ``out``, MONAI's, temporal convolutions."""

    is_container = True

    def pairs(self, sequential: nn.Sequential):
        parts = list(sequential._modules.items())
        return [a for (a, norm), (_, act) in zip(parts, parts[1:])
                if _is_norm_without_activation(norm) and pristine.is_activation(act)]

    def why_not(self, sequential: nn.Sequential) -> Optional[str]:
        reason = pristine.why_not_class(nn.Sequential)
        parts = list(sequential._modules.values())
        for norm, act in zip(parts, parts[1:]):
            if reason is None and _is_norm_without_activation(norm) and pristine.is_activation(act):
                reason = pristine.why_not_class(type(norm))
                if reason is None and not pristine.is_swish(type(act).forward.__get__(act)):
                    reason = f"its {type(act).__name__} is not swish"
        return reason

    def sites(self, sequential: nn.Sequential) -> Sequence[str]:
        return self.pairs(sequential)

    def variant(self, sequential: nn.Sequential):
        return None

    def example(self, sequential: nn.Sequential):
        return None  # one part after the other is all that a Sequential does

    def forward(self, sequential: nn.Sequential, input: Tensor) -> Tensor:
        sites = {s.name: s for s in site.sites(sequential)}
        parts = list(sequential._modules.items())
        i = 0
        while i < len(parts):
            name, part = parts[i]
            if name in sites and i + 1 < len(parts):
                into = parts[i + 2][1] if i + 2 < len(parts) else None
                input, _ = norm_swish(part, input, act=parts[i + 1][1], into=into, count=sites[name].count)
                i += 2
            else:
                input = part(input)
                i += 1
        return input


def _is_norm_without_activation(norm: Optional[nn.Module]) -> bool:
    known = None if norm is None else pristine.known_norm(norm)
    return known is not None and not known.activated


CLASSES = {"torch.nn.GroupNorm": Norm(), "torch.nn.Sequential": Sequential()}
