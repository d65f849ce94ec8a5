"""The FLUX autoencoder: LDM's block without time embedding and dropout. Private copies of it too."""

from typing import Optional, Sequence

import torch
from torch import Tensor, nn

from ... import pristine
from ..adapter import Adapter
from ..resnet import resnet
from .ldm import channels


class ResnetBlock(Adapter):
    def sites(self, block: nn.Module) -> Sequence[str]:
        return "norm1", "norm2"

    def variant(self, block: nn.Module):
        return tuple(block._modules)

    def example(self, block: nn.Module):
        return (torch.randn(2, channels(block.norm1), 6, 4, dtype=torch.float64),)

    def forward(self, block: nn.Module, x: Tensor) -> Tensor:
        return resnet(block, x, norm1=block.norm1, conv1=block.conv1, norm2=block.norm2, conv2=block.conv2,
                      shortcut=getattr(block, "nin_shortcut", None))


class PrivateCopy(ResnetBlock):
    """A class that nobody knows, made of these parts."""

    def why_not(self, block: nn.Module) -> Optional[str]:
        for name, cls in PARTS.items():
            reason = pristine.why_not(block._modules[name], cls)
            if reason is not None:
                return f"{name}: {reason}"
        return None

    def variant(self, block: nn.Module):
        return Adapter.variant(self, block)

    def forward(self, block: nn.Module, x: Tensor) -> Tensor:
        shortcut = next((block._modules[name] for name in SHORTCUTS if name in block._modules), None)
        return resnet(block, x, norm1=block.norm1, conv1=block.conv1, norm2=block.norm2, conv2=block.conv2,
                      shortcut=shortcut)


def private_copy(module: nn.Module) -> Optional[Adapter]:
    """The adapter for a class that nobody knows and that has these parts and no others, or None; a trial tells."""
    names = set(module._modules)
    return COPY if set(PARTS) <= names and names <= {*PARTS, *SHORTCUTS} else None


PARTS = {"norm1": nn.GroupNorm, "conv1": nn.Conv2d, "norm2": nn.GroupNorm, "conv2": nn.Conv2d}
SHORTCUTS = ("nin_shortcut", "conv_shortcut")
COPY = PrivateCopy()
CLASSES = {"flux.modules.autoencoder.ResnetBlock": ResnetBlock()}
