"""PyTorch's own classes: a GroupNorm that stands alone, and a Sequential that holds one and an activation."""

from typing import Optional, Sequence

from torch import Tensor, nn

from ... import functional, pristine
from ...modules import norm_swish
from .. import site
from ..adapter import Adapter


class Norm(Adapter):
    """A GroupNorm without activation. Hooks need no look: they are called around its forward, as always."""

    kind = "norm"

    def sites(self, norm: nn.GroupNorm) -> Sequence[str]:
        return ("",)

    def variant(self, norm: nn.GroupNorm):
        return None

    def example(self, norm: nn.GroupNorm):
        return None  # the op is PyTorch's, and so are its tests

    def forward(self, norm: nn.GroupNorm, input: Tensor) -> Tensor:
        reason = pristine.why_not_beside(norm, input)
        site.sites(norm)[0].count(input, reason)
        if reason is not None:
            return nn.GroupNorm.forward(norm, input)
        return functional.group_norm_act(input, norm.num_groups, norm.weight, norm.bias, norm.eps, activation=None)


class Sequential(Adapter):
    """A Sequential in which a norm is followed by SiLU: OpenAI's ``out``, MONAI's, temporal convolutions."""

    is_container = True

    def pairs(self, sequential: nn.Sequential):
        parts = list(sequential._modules.items())
        return [a for (a, norm), (_, act) in zip(parts, parts[1:]) if pristine.is_norm(norm) and type(act) is nn.SiLU]

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


CLASSES = {"torch.nn.GroupNorm": Norm(), "torch.nn.Sequential": Sequential()}
