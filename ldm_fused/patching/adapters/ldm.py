"""CompVis latent-diffusion and stable-diffusion, taming-transformers, generative-models, and copies of their file."""

import inspect
from typing import Optional, Sequence

import torch
from torch import Tensor, nn

from ... import modules, reference
from .. import swap
from ..adapter import Adapter
from ..pair import ParentOfFunction
from ..resnet import resnet


class ResnetBlock(Adapter):
    def sites(self, block: nn.Module) -> Sequence[str]:
        return "norm1", "norm2"

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
        return resnet(block, x, norm1=block.norm1, conv1=block.conv1, norm2=block.norm2, conv2=block.conv2,
                      dropout=block.dropout, shortcut=shortcut, temb=temb, recompute=self.recomputes(block))

    def recomputes(self, block: nn.Module) -> bool:
        return False


class FusedBlock(ResnetBlock):
    """Our own, to be counted like all others."""

    def recomputes(self, block: nn.Module) -> bool:
        return block.recompute


class PrivateCopy(ResnetBlock):
    """A class that nobody knows, of the block's structure."""

    def why_not(self, block: nn.Module) -> Optional[str]:
        return modules.why_not_structure(block)

    def variant(self, block: nn.Module):
        return Adapter.variant(self, block)

    def example(self, block: nn.Module):
        x, temb = super().example(block)
        takes_temb = len(inspect.signature(type(block).forward).parameters) > 2  # with self and x
        return (x, temb) if takes_temb else (x,)


def channels(norm: nn.Module) -> int:
    """Of a norm, or of what somebody put in its place."""
    return getattr(norm, "num_channels", None) or next(p.shape[0] for p in norm.parameters())


def private_copy(module: nn.Module) -> Optional[Adapter]:
    """The adapter for a class that nobody knows and that looks like one of the LDM model file, or None. Its parts name
    it; a trial, or its source, tells."""
    if {"norm1", "conv1", "norm2", "dropout", "conv2"} <= set(module._modules):
        return BLOCK
    if "norm_out" in module._modules and END.why_not(module) is None:
        return END
    return None


BLOCK, END = PrivateCopy(), ParentOfFunction("norm_out")
PATHS = ("ldm.modules.diffusionmodules.model", "taming.modules.diffusionmodules.model",
         "sgm.modules.diffusionmodules.model")
CLASSES = {**{f"{path}.ResnetBlock": ResnetBlock() for path in PATHS}, "ldm_fused.reference.ResnetBlock": ResnetBlock(),
           "ldm_fused.modules.FusedResnetBlock": FusedBlock(), "ldm_fused.compat.ldm.ResnetBlock": FusedBlock()}
