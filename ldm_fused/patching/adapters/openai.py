"""OpenAI's improved-diffusion and guided-diffusion, and what CompVis and Stability made of their UNet."""

from typing import Optional, Sequence

import torch
from torch import Tensor, nn

from ... import pristine
from ...route import decided
from .. import site, swap
from ..adapter import Adapter
from ..resnet import resnet
from .plain import Norm


class ResBlock(Adapter):
    """``in_layers`` (norm, SiLU, conv), ``emb_layers`` (SiLU, linear), ``out_layers`` (norm, SiLU, dropout, conv) and
    ``skip_connection``. Its forward wraps ``_forward`` in the library's own checkpoint function, and stays."""

    method = "_forward"

    def sites(self, block: nn.Module) -> Sequence[str]:
        return "in_layers.0", "out_layers.0"

    def why_not(self, block: nn.Module) -> Optional[str]:
        for name, length in (("in_layers", 3), ("out_layers", 4)):
            layers = getattr(block, name)
            if type(layers) is not nn.Sequential or len(layers) != length:
                return f"its {name} is {type(layers).__name__} of {len(layers)} layers"
            if pristine.known_norm(layers[0]) is None:
                return f"its norm is {type(layers[0]).__name__}"
            if not pristine.is_activation(layers[1]):
                return f"its activation is {type(layers[1]).__name__}"
        if getattr(block, "skip_t_emb", False) or getattr(block, "exchange_temb_dims", False):
            return "it uses its time embedding in another way"
        return None

    def variant(self, block: nn.Module):
        return (block.use_scale_shift_norm, getattr(block, "updown", False), type(getattr(block, "h_upd", None)),
                type(block.skip_connection), type(block.in_layers[0]), block.in_layers[2].weight.dim())

    def example(self, block: nn.Module):
        sizes = (4, 6, 2)[:block.in_layers[2].weight.dim() - 2]
        emb_channels = next(layer.in_features for layer in block.emb_layers if hasattr(layer, "in_features"))
        return torch.randn(2, block.in_layers[0].num_channels, *sizes), torch.randn(2, emb_channels)

    def why_not_now(self, block: nn.Module) -> Optional[str]:
        """The reason why its layers must be called as a whole, or None."""
        for name, length in (("in_layers", 3), ("out_layers", 4)):
            layers = getattr(block, name)
            reason = pristine.why_not(layers, nn.Sequential)
            if reason is None and len(layers) != length:
                reason = f"it has {len(layers)} layers"
            if reason is not None:
                return f"its {name}: {reason}"
        return None

    def forward(self, block: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        reason = decided(self.why_not_now, block) or (None if emb.dim() == 2 else "its time embedding is not (N, C)")
        if reason is not None:
            for s in site.sites(block):
                s.count(x, reason)
            return swap.as_before(block, x, emb)
        (norm1, act1, conv1), (norm2, act2, dropout, conv2) = block.in_layers, block.out_layers
        emb, modulate = block.emb_layers(emb), None
        if block.use_scale_shift_norm:
            modulate, emb = dict(zip(("scale", "shift"), emb.chunk(2, dim=1))), None
        updown = getattr(block, "updown", False)
        return resnet(block, x, norm1=norm1, act1=act1, conv1=conv1, norm2=norm2, act2=act2, dropout=dropout,
                      conv2=conv2, shortcut=block.skip_connection, resample=block.h_upd if updown else None,
                      resample_x=block.x_upd if updown else None, temb=emb, cast_temb=True, modulate2=modulate)


FILES = ("ldm.modules.diffusionmodules.openaimodel", "sgm.modules.diffusionmodules.openaimodel",
         "guided_diffusion.unet", "improved_diffusion.unet")
# Computes in float32 and gives the input's dtype.
NORMS = {f"{file}.GroupNorm32": pristine.Norm(keeps_dtype=True) for file in (
    "ldm.modules.diffusionmodules.util", "sgm.modules.diffusionmodules.util", "guided_diffusion.nn",
    "improved_diffusion.nn")}
CLASSES = {**{f"{file}.ResBlock": ResBlock() for file in FILES}, **{name: Norm() for name in NORMS}}
ACTIVATIONS = ("guided_diffusion.nn.SiLU", "improved_diffusion.nn.SiLU", "ldm.modules.diffusionmodules.util.SiLU")
