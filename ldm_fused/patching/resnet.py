"""The forward of a patched ResNet block: adapters say which part is which."""

from typing import Any

from torch import Tensor, nn

from .. import resnet as common
from . import site


def resnet(block: nn.Module, x: Tensor, *, recompute: bool = False, **parts: Any) -> Tensor:
    """:func:`ldm_fused.resnet.resnet` with the counters of ``block``'s first two sites, and recomputing where ``patch``
    was asked to, or by the block's own wish."""
    first, second = site.sites(block)[:2]
    return common.resnet(x, recompute=recompute or site.state(block).recompute, counts=(first.count, second.count),
                         **parts)
