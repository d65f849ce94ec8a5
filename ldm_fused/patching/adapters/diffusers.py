"""Hugging Face diffusers."""

import functools
from typing import Any, Dict, Optional

import torch
from torch import Tensor, nn

from ... import bypass
from ...diffusers_block import resnet_block_2d
from .. import layout, swap
from ..adapter import STATE, Block, channels, sites
from ..pair import Parent
from ..upsample import Upsample, Upsampling


class ResnetBlock(Block):
    """What the ResNet blocks have in common."""

    def obstacle(self, block: nn.Module) -> Optional[str]:
        return None if type(block.nonlinearity) is nn.SiLU else f"its activation is {type(block.nonlinearity).__name__}"

    def parts_of(self, block: nn.Module):
        return dict(norm1=block.norm1, conv1=block.conv1, norm2=block.norm2, conv2=block.conv2, act1=block.nonlinearity,
                    act2=block.nonlinearity, dropout=block.dropout, shortcut=getattr(block, "conv_shortcut", None))


class ResnetBlock2D(ResnetBlock):
    def variant(self, block: nn.Module):
        return (block.time_embedding_norm, block.skip_time_act, block.output_scale_factor, block.up, block.down,
                block.conv_shortcut is None, block.time_emb_proj is None, type(block.upsample), type(block.downsample))

    def example(self, block: nn.Module):
        x = torch.randn(2, channels(block.norm1), 6, 4, dtype=torch.float64)
        linear = block.time_emb_proj
        return x, None if linear is None else torch.randn(2, linear.in_features, dtype=torch.float64)

    def forward(self, block: nn.Module, input_tensor: Tensor, temb: Optional[Tensor] = None, *args: Any,
                **kwargs: Any) -> Tensor:
        y = None
        if not (args or kwargs):
            norm1, norm2 = sites(block)[:2]
            shortcut = block.conv_shortcut
            keeps_layout = block.training and shortcut is not None and layout.is_laid_out(shortcut)
            y = resnet_block_2d(block, input_tensor, temb, counts=(norm1.count, norm2.count),
                                recompute=block.__dict__[STATE].recompute, keeps_layout=keeps_layout)
        return swap.as_before(block, input_tensor, temb, *args, **kwargs) if y is None else y  # it warns, or raises


class ResnetBlockCondNorm2D(ResnetBlock):
    """Both norms take scale and shift from the embedding. Norms that go by pixel, ``"spatial"``, are not fused."""

    def obstacle(self, block: nn.Module) -> Optional[str]:
        for norm in (block.norm1, block.norm2):
            if bypass.known_norm(norm) is None:
                return f"its norm is {type(norm).__name__}"
            if norm.act is not None and not isinstance(norm.act, nn.Module):
                return f"its norm's activation is {norm.act}"
        return super().obstacle(block)

    def variant(self, block: nn.Module):
        return (type(block.norm1), type(block.norm1.act), block.output_scale_factor, type(block.upsample),
                type(block.downsample), block.conv_shortcut is None)

    def example(self, block: nn.Module):
        return (torch.randn(2, block.in_channels, 6, 4, dtype=torch.float64),
                torch.randn(2, block.norm1.linear.in_features, dtype=torch.float64))

    def forward(self, block: nn.Module, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            return swap.as_before(block, input_tensor, temb, *args, **kwargs)  # which warns
        resample = block.upsample if block.upsample is not None else block.downsample
        return self.resnet(block, input_tensor, **self.parts_of(block), resample=resample,
                           scale=1.0 / block.output_scale_factor, modulate1=_modulation(block.norm1, temb),
                           modulate2=_modulation(block.norm2, temb))


def _modulation(norm: nn.Module, temb: Tensor):
    called = functools.partial(norm, emb=temb)
    if bypass.known_norm(norm) is None or bypass.module_obstacle(norm, type(norm)) is not None:
        return dict(called=called)  # scale and shift would be computed for nothing
    scale, shift = norm.linear(norm.act(temb) if norm.act is not None else temb).chunk(2, dim=1)
    return dict(scale=scale, shift=shift, called=called)


class TemporalResnetBlock(ResnetBlock):
    """It convolves over time. x is (N, C, frames, H, W), often a permuted view; each frame has an embedding."""

    def variant(self, block: nn.Module):
        return block.conv_shortcut is None, block.time_emb_proj is None

    def example(self, block: nn.Module):
        x = torch.randn(2, block.in_channels, 3, 4, 2, dtype=torch.float64)
        linear = block.time_emb_proj
        return x, None if linear is None else torch.randn(2, 3, linear.in_features, dtype=torch.float64)

    def forward(self, block: nn.Module, input_tensor: Tensor, temb: Optional[Tensor] = None) -> Tensor:
        if block.time_emb_proj is None:
            temb = None
        else:
            temb = block.time_emb_proj(block.nonlinearity(temb)).transpose(1, 2)[..., None, None]
        return self.resnet(block, input_tensor, **self.parts_of(block), temb=temb)


class CogVideoXBlock(ResnetBlock):
    """Its convolutions give what they keep for the next frames. Its decoder's norms go by pixel and are not fused."""

    def obstacle(self, block: nn.Module) -> Optional[str]:
        if block.spatial_norm_dim is not None:
            return f"its norms are {type(block.norm1).__name__}"
        return super().obstacle(block)

    def variant(self, block: nn.Module):
        return hasattr(block, "temb_proj"), block.in_channels == block.out_channels, block.use_conv_shortcut

    def example(self, block: nn.Module):
        x = torch.randn(2, block.in_channels, 3, 4, 2, dtype=torch.float64)
        if not hasattr(block, "temb_proj"):
            return (x,)
        return x, torch.randn(2, block.temb_proj.in_features, dtype=torch.float64)

    def forward(self, block: nn.Module, inputs: Tensor, temb: Optional[Tensor] = None, zq: Optional[Tensor] = None,
                conv_cache: Optional[Dict[str, Tensor]] = None):
        if zq is not None:
            return swap.as_before(block, inputs, temb, zq, conv_cache)
        before, after = conv_cache or {}, {}

        def caching(name: str):
            def convolve(h: Tensor) -> Tensor:
                h, after[name] = getattr(block, name)(h, conv_cache=before.get(name))
                return h
            return convolve

        parts = {**self.parts_of(block), "conv1": caching("conv1"), "conv2": caching("conv2")}
        if parts["shortcut"] is not None and block.use_conv_shortcut:
            parts["shortcut"] = caching("conv_shortcut")
        if temb is not None:
            temb = block.temb_proj(block.nonlinearity(temb))
        return self.resnet(block, inputs, **parts, temb=temb), after


class Upsample2D(Upsample):
    """Its forward also takes a size, and then runs as it is; it asks for sizes that nearest upsampling had trouble
    with."""

    def __init__(self) -> None:
        super().__init__(None)

    def known_of(self, module: nn.Module) -> Upsampling:
        return Upsampling("conv" if module.name == "conv" else "Conv2d_0", (True, True))

    def obstacle(self, module: nn.Module) -> Optional[str]:
        for name, expected in (("use_conv", True), ("use_conv_transpose", False), ("interpolate", True)):
            if getattr(module, name) is not expected:
                return f"its {name} is {getattr(module, name)}"
        return "it has a norm" if module.norm is not None else super().obstacle(module)

    def call_obstacle(self, module: nn.Module, known: Upsampling, x: Tensor) -> Optional[str]:
        return self.obstacle(module) or super().call_obstacle(module, known, x)


CLASSES = {
    "diffusers.models.resnet.ResnetBlock2D": ResnetBlock2D(),
    "diffusers.models.resnet.ResnetBlockCondNorm2D": ResnetBlockCondNorm2D(),
    "diffusers.models.resnet.TemporalResnetBlock": TemporalResnetBlock(),
    "diffusers.models.upsampling.Upsample2D": Upsample2D(),
    "diffusers.models.autoencoders.autoencoder_kl_cogvideox.CogVideoXResnetBlock3D": CogVideoXBlock(),
    # These call the norm with one argument or two. Other ends are read.
    "diffusers.models.autoencoders.vae.Decoder": Parent("conv_norm_out", "conv_act"),
    "diffusers.models.autoencoders.vae.MaskConditionDecoder": Parent("conv_norm_out", "conv_act"),
}
# It normalizes without weight and bias, and then scales and shifts by what its block computes.
NORMS = {"diffusers.models.normalization.AdaGroupNorm": bypass.Norm()}
