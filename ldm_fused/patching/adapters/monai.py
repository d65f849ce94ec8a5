"""MONAI: the diffusion UNet's blocks, in 2 and 3 dimensions. The autoencoder's are read."""

from typing import Optional, Sequence

import torch
from torch import Tensor, nn

from .. import swap
from ..adapter import Adapter
from ..resnet import resnet


class DiffusionUNetResnetBlock(Adapter):
    def sites(self, block: nn.Module) -> Sequence[str]:
        return "norm1", "norm2"

    def why_not(self, block: nn.Module) -> Optional[str]:
        if type(block.nonlinearity) is not nn.SiLU:
            return f"its activation is {type(block.nonlinearity).__name__}"
        return None if block.spatial_dims in (2, 3) else f"it has {block.spatial_dims} spatial dimensions"

    def variant(self, block: nn.Module):
        return block.spatial_dims, type(block.skip_connection), type(block.upsample), type(block.downsample)

    def example(self, block: nn.Module):
        return (torch.randn(2, block.channels, *(4, 6, 2)[:block.spatial_dims], dtype=torch.float64),
                torch.randn(2, block.emb_channels, dtype=torch.float64))

    def forward(self, block: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        if emb.dim() != 2:
            return swap.as_before(block, x, emb)
        resample = block.upsample if block.upsample is not None else block.downsample
        return resnet(block, x, norm1=block.norm1, conv1=block.conv1, norm2=block.norm2, conv2=block.conv2,
                      act1=block.nonlinearity, act2=block.nonlinearity, shortcut=block.skip_connection,
                      resample=resample, temb=block.time_emb_proj(block.nonlinearity(emb)))


CLASSES = {"monai.networks.nets.diffusion_model_unet.DiffusionUNetResnetBlock": DiffusionUNetResnetBlock()}
