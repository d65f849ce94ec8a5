"""Hugging Face diffusers."""

from typing import Any, Optional, Sequence

import torch
from torch import Tensor, nn

from .. import swap
from ..adapter import Adapter
from ..pair import Parent
from ..resnet import resnet
from .ldm import channels


class Block(Adapter):
    """What the ResNet blocks have in common."""

    def sites(self, block: nn.Module) -> Sequence[str]:
        return "norm1", "norm2"

    def why_not(self, block: nn.Module) -> Optional[str]:
        return None if type(block.nonlinearity) is nn.SiLU else f"its activation is {type(block.nonlinearity).__name__}"

    def parts_of(self, block: nn.Module):
        return dict(norm1=block.norm1, conv1=block.conv1, norm2=block.norm2, conv2=block.conv2, act1=block.nonlinearity,
                    act2=block.nonlinearity, dropout=block.dropout, shortcut=getattr(block, "conv_shortcut", None))


class ResnetBlock2D(Block):
    def variant(self, block: nn.Module):
        return (block.time_embedding_norm, block.skip_time_act, block.output_scale_factor, block.up, block.down,
                block.conv_shortcut is None, block.time_emb_proj is None, type(block.upsample), type(block.downsample))

    def example(self, block: nn.Module):
        x = torch.randn(2, channels(block.norm1), 6, 4, dtype=torch.float64)
        linear = block.time_emb_proj
        return x, None if linear is None else torch.randn(2, linear.in_features, dtype=torch.float64)

    def forward(self, block: nn.Module, input_tensor: Tensor, temb: Optional[Tensor] = None, *args: Any,
                **kwargs: Any) -> Tensor:
        mode = block.time_embedding_norm
        if args or kwargs or temb is None and (block.time_emb_proj is not None or mode == "scale_shift"):
            return swap.as_before(block, input_tensor, temb, *args, **kwargs)  # which warns or raises
        if block.time_emb_proj is not None:
            temb = block.time_emb_proj(temb if block.skip_time_act else block.nonlinearity(temb))
        scale = shift = None
        if mode == "scale_shift":
            scale, shift = temb.chunk(2, dim=1)
        resample = block.upsample if block.upsample is not None else block.downsample
        parts = self.parts_of(block)
        if block.training and parts["shortcut"] is not None:
            input_tensor = input_tensor.contiguous()
        return resnet(block, input_tensor, **parts, temb=temb if mode == "default" else None, scale=scale, shift=shift,
                      resample=resample, divisor=block.output_scale_factor)


PARENTS = {
    "autoencoders.vae": ("Encoder", "Decoder", "MaskConditionDecoder"),
    "autoencoders.autoencoder_kl_temporal_decoder": ("TemporalDecoder",),
    "autoencoders.autoencoder_kl_hunyuan_video": ("HunyuanVideoEncoder3D", "HunyuanVideoDecoder3D"),
    "autoencoders.autoencoder_kl_allegro": ("AllegroEncoder3D", "AllegroDecoder3D"),
    "unets.unet_2d": ("UNet2DModel",),
    "unets.unet_2d_condition": ("UNet2DConditionModel",),
    "unets.unet_3d_condition": ("UNet3DConditionModel",),
    "unets.unet_motion_model": ("UNetMotionModel",),
    "unets.unet_i2vgen_xl": ("I2VGenXLUNet",),
    "unets.unet_spatio_temporal_condition": ("UNetSpatioTemporalConditionModel",),
}
CLASSES = {
    "diffusers.models.resnet.ResnetBlock2D": ResnetBlock2D(),
    **{f"diffusers.models.{file}.{name}": Parent("conv_norm_out", "conv_act")
       for file, names in PARENTS.items() for name in names},
}
