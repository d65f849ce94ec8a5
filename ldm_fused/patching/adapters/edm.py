"""NVIDIA's EDM: the block of its UNets, with its own GroupNorm class, and attention where it has some."""

from typing import Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import functional, pristine
from ...route import decided
from .. import site
from ..adapter import Adapter
from ..resnet import resnet


class UNetBlock(Adapter):
    def sites(self, block: nn.Module) -> Sequence[str]:
        return ("norm0", "norm1", "norm2") if block.num_heads else ("norm0", "norm1")

    def why_not(self, block: nn.Module) -> Optional[str]:
        norms = [getattr(block, name) for name in self.sites(block)]
        unknown = [type(norm).__name__ for norm in norms if pristine.known_norm(norm) is None]
        return f"its norm is {unknown[0]}" if unknown else None

    def variant(self, block: nn.Module):
        return (block.adaptive_scale, block.num_heads, block.skip_scale, block.skip is None,
                *(getattr(block.conv0, name, None) for name in ("up", "down")))

    def example(self, block: nn.Module):
        return (torch.randn(2, block.in_channels, 6, 4, dtype=torch.float64),
                torch.randn(2, block.emb_channels, dtype=torch.float64))

    def forward(self, block: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        params, modulate = block.affine(emb).to(x.dtype), None
        if block.adaptive_scale:
            modulate, params = dict(zip(("scale", "shift"), params.chunk(2, dim=1))), None
        drops = block.training and block.dropout > 0
        x = resnet(block, x, norm1=block.norm0, conv1=block.conv0, norm2=block.norm1, conv2=block.conv1,
                   dropout=(lambda h: F.dropout(h, p=block.dropout)) if drops else None, shortcut=block.skip,
                   temb=params, modulate2=modulate, divisor=1 / block.skip_scale)
        return self.attention(block, x) if block.num_heads else x

    def attention(self, block: nn.Module, x: Tensor) -> Tensor:
        norm, count = block.norm2, site.sites(block)[2].count
        reason = decided(pristine.why_not_norm, norm, x)
        count(x, reason)
        if reason is None:
            h = functional.group_norm_act(x, norm.num_groups, norm.weight, norm.bias, norm.eps, activation=None)
        else:
            h = norm(x)
        # (N, heads, channels a head, 3, pixels)
        q, k, v = block.qkv(h).unflatten(1, (block.num_heads, -1, 3)).flatten(4).transpose(2, 4).unbind(3)
        h = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape)
        return (block.proj(h) + x) * block.skip_scale


CLASSES = {"training.networks.UNetBlock": UNetBlock()}
NORMS = {"training.networks.GroupNorm": pristine.Norm()}
