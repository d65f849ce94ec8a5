"""The FLUX autoencoder: LDM's block without time embedding and dropout."""

from typing import Sequence

import torch
from torch import Tensor, nn

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


CLASSES = {"flux.modules.autoencoder.ResnetBlock": ResnetBlock()}
