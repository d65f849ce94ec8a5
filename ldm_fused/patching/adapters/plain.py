"""PyTorch's own classes: a GroupNorm that stands alone, and a Sequential that holds one and an activation."""

from typing import List, Optional, Sequence

import torch
from torch import Tensor, nn

from ... import bypass
from ...decisions import decided
from ...resnet_block import norm_swish
from .. import swap
from ..adapter import Adapter, channels, sites
from ..norm import call_obstacle, group_norm


class Norm(Adapter):
    """A GroupNorm without activation behind it. PyTorch calls hooks around its forward, as always."""

    kind = "norm"

    def obstacle(self, norm: nn.Module) -> Optional[str]:
        return bypass.class_obstacle(type(norm))

    def sites(self, norm: nn.Module) -> Sequence[str]:
        return ("",)

    def variant(self, norm: nn.Module):
        return getattr(norm, "weight", None) is None, bypass.known_norm(norm)

    def examples(self, norm: nn.Module):
        # The op is PyTorch's GroupNorm, which has its own tests; other classes are tried.
        if swap.original(type(norm)) is nn.GroupNorm:
            return []
        return [(torch.randn(2, channels(norm), *sizes),) for sizes in ((7,), (5, 4), (3, 4, 2))]

    def forward(self, norm: nn.Module, input: Tensor) -> Tensor:
        cls = swap.original(type(norm))
        reason = decided(self.call_obstacle, norm, cls, input)
        sites(norm)[0].count(input, reason)
        if reason is not None:
            return swap.as_before(norm, input)
        return group_norm(norm, cls, input, "silu" if bypass.known_norm(norm, cls).activated else None)

    def call_obstacle(self, norm: nn.Module, cls: type, x: Tensor) -> Optional[str]:
        """The reason why this call is not fused, or None."""
        return call_obstacle(norm, cls, x)


class Counted(Norm):
    """A norm that is not known: it is called, and counted."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def call_obstacle(self, norm: nn.Module, cls: type, x: Tensor) -> Optional[str]:
        return self.reason

    def obstacle(self, norm: nn.Module) -> Optional[str]:
        return None


class Sequential(Adapter):
    """A Sequential in which an activation follows a norm: OpenAI's ``out``, MONAI's, temporal convolutions."""

    is_container = True

    def sites(self, sequential: nn.Sequential) -> List[str]:
        parts = list(sequential._modules.items())
        return [a for (a, norm), (_, act) in zip(parts, parts[1:])
                if _is_norm_without_activation(norm) and bypass.is_activation(act)]

    def obstacle(self, sequential: nn.Sequential) -> Optional[str]:
        reason = bypass.class_obstacle(nn.Sequential)
        parts = list(sequential._modules.values())
        for norm, act in zip(parts, parts[1:]):
            if reason is None and _is_norm_without_activation(norm) and bypass.is_activation(act):
                reason = bypass.class_obstacle(type(norm))
                if reason is None and not bypass.is_swish(type(act).forward.__get__(act)):
                    reason = f"its {type(act).__name__} is not swish"
        return reason

    def variant(self, sequential: nn.Sequential):
        return None

    def example(self, sequential: nn.Sequential):
        return None  # a Sequential calls one part after the other, and does nothing else

    def forward(self, sequential: nn.Sequential, input: Tensor) -> Tensor:
        site_of = {site.name: site for site in sites(sequential)}
        parts = list(sequential._modules.items())
        i = 0
        while i < len(parts):
            name, part = parts[i]
            if name in site_of and i + 1 < len(parts):
                into = parts[i + 2][1] if i + 2 < len(parts) else None
                input, _ = norm_swish(part, input, act=parts[i + 1][1], into=into, count=site_of[name].count)
                i += 2
            else:
                input = part(input)
                i += 1
        return input


def _is_norm_without_activation(norm: Optional[nn.Module]) -> bool:
    known = None if norm is None else bypass.known_norm(norm)
    return known is not None and not known.activated


CLASSES = {"torch.nn.GroupNorm": Norm(), "torch.nn.Sequential": Sequential()}
