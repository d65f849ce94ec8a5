"""This library's own blocks, with the reference block."""

from typing import Optional

import torch
from torch import Tensor, nn

from ... import reference
from .. import swap
from ..adapter import Block, channels


class OwnBlock(Block):
    """Finds a block's parts by their names. A block that recomputes by itself still does."""

    def variant(self, block: nn.Module):
        return tuple(name for name in block._modules), block.in_channels == block.out_channels, block.use_conv_shortcut

    def example(self, block: nn.Module):
        x = torch.randn(2, channels(block.norm1), 6, 4, dtype=torch.float64)
        if not hasattr(block, "temb_proj"):
            return x, None
        return x, torch.randn(2, block.temb_proj.in_features, dtype=torch.float64)

    def forward(self, block: nn.Module, x: Tensor, temb: Optional[Tensor] = None) -> Tensor:
        if temb is not None:
            if temb.dim() != 2 or not hasattr(block, "temb_proj"):
                return swap.as_before(block, x, temb)  # which may raise
            temb = block.temb_proj(reference.swish(temb))
        shortcut = getattr(block, "nin_shortcut", None)
        if shortcut is None:
            shortcut = getattr(block, "conv_shortcut", None)
        return self.resnet(block, x, norm1=block.norm1, conv1=block.conv1, norm2=block.norm2, conv2=block.conv2,
                           dropout=block.dropout, shortcut=shortcut, temb=temb,
                           recompute=getattr(block, "recompute", False))


BLOCK = OwnBlock()
CLASSES = {"ldm_fused.reference.ResnetBlock": BLOCK, "ldm_fused.modules.FusedResnetBlock": BLOCK,
           "ldm_fused.compat.ldm.ResnetBlock": BLOCK}
FUSED_ALREADY = "ldm_fused.modules.StandIn"
