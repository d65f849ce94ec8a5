"""NVIDIA's EDM: the block of its UNets where it ends in attention. Without attention its formula is read."""

from types import FunctionType
from typing import Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import bypass
from ...decisions import decided
from .. import source, swap
from ..adapter import Adapter, Block, sites
from ..norm import group_norm

READS = {"adaptive_scale", "affine", "conv0", "conv1", "dropout", "norm0", "norm1", "norm2", "num_heads", "proj", "qkv",
         "skip", "skip_scale", "training"}


def adapter_of(module: nn.Module) -> Optional[Adapter]:
    """The adapter of a block with attention, or None.

    EDM's pickles bring their classes with them, in files whose names are made up. So the class is known by the name
    that its file gives it, and by its source: it reads these attributes, and branches on nothing else.
    """
    cls = type(module)
    if getattr(cls, "_orig_class_name", cls.__name__) != "UNetBlock" or not getattr(module, "num_heads", 0):
        return None
    if not isinstance(cls.forward, FunctionType):
        return None
    try:
        read = set(source.read(cls.forward.__code__, cls).read)
    except source.Unreadable:
        return None
    return AttentionBlock(module.skip_scale) if read == READS else None


class AttentionBlock(Block):
    def __init__(self, skip_scale: float) -> None:
        self.is_numpys, self.skip_scale = source.is_numpys(skip_scale), float(skip_scale)

    def sites(self, block: nn.Module) -> Sequence[str]:
        return "norm0", "norm1", "norm2"

    def obstacle(self, block: nn.Module) -> Optional[str]:
        norms = [getattr(block, name) for name in self.sites(block)]
        unknown = [type(norm).__name__ for norm in norms if bypass.known_norm(norm) is None]
        return f"its norm is {unknown[0]}" if unknown else None

    def variant(self, block: nn.Module):
        return (block.adaptive_scale, block.num_heads, block.skip is None,
                *(getattr(block.conv0, name, None) for name in ("up", "down")))

    def example(self, block: nn.Module):
        return (torch.randn(2, block.in_channels, 6, 4, dtype=torch.float64),
                torch.randn(2, block.emb_channels, dtype=torch.float64))

    def forward(self, block: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        if not (self.is_numpys and torch.compiler.is_compiling()) and block.skip_scale != self.skip_scale:
            swap.count_unseen(block, "its skip_scale has changed since it was read")
            return swap.as_before(block, x, emb)
        params, modulate = block.affine(emb).to(x.dtype), None
        if block.adaptive_scale:
            modulate, params = dict(zip(("scale", "shift"), params.chunk(2, dim=1))), None
        drops = block.training and block.dropout > 0
        x = self.resnet(block, x, norm1=block.norm0, conv1=block.conv0, norm2=block.norm1, conv2=block.conv1,
                        dropout=(lambda h: F.dropout(h, p=block.dropout)) if drops else None, shortcut=block.skip,
                        temb=params, modulate2=modulate, scale=self.skip_scale)
        return self.attention(block, x)

    def attention(self, block: nn.Module, x: Tensor) -> Tensor:
        norm = block.norm2
        reason = decided(bypass.norm_obstacle, norm, x)
        sites(block)[2].count(x, reason)
        h = norm(x) if reason is not None else group_norm(norm, type(norm), x, None)
        # (N, heads, channels a head, 3, pixels)
        q, k, v = block.qkv(h).unflatten(1, (block.num_heads, -1, 3)).flatten(4).transpose(2, 4).unbind(3)
        h = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape)
        return (block.proj(h) + x) * self.skip_scale
