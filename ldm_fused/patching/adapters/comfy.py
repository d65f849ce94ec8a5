"""ComfyUI: its own classes for PyTorch's layers, served while they cast no weights, and the blocks made of them."""

from typing import Optional

from torch import Tensor, nn

from ... import pristine
from ..resnet import resnet
from . import ldm, openai
from .plain import Norm


class ResnetBlock(ldm.ResnetBlock):
    """LDM's, with its swish a module."""

    def why_not(self, block: nn.Module) -> Optional[str]:
        for norm in (block.norm1, block.norm2):
            if pristine.known_norm(type(norm)) is None:
                return f"its norm is {type(norm).__name__}"
        return None if pristine.is_activation(block.swish) else f"its activation is {type(block.swish).__name__}"

    def forward(self, block: nn.Module, x: Tensor, temb: Optional[Tensor] = None) -> Tensor:
        if temb is not None:
            temb = block.temb_proj(block.swish(temb))
        shortcut = None
        if block.in_channels != block.out_channels:
            shortcut = block.conv_shortcut if block.use_conv_shortcut else block.nin_shortcut
        return resnet(block, x, norm1=block.norm1, act1=block.swish, conv1=block.conv1, norm2=block.norm2,
                      act2=block.swish, dropout=block.dropout, conv2=block.conv2, shortcut=shortcut, temb=temb)


def why_not_now(norm: nn.Module) -> Optional[str]:
    """The reason why a layer of ``comfy.ops`` does more than PyTorch's, or None."""
    if getattr(norm, "weight_function", ()) or getattr(norm, "bias_function", ()):
        return "its weights go through functions first"
    return "its weights are cast in each call" if getattr(norm, "comfy_cast_weights", False) else None


OPS = ("disable_weight_init", "manual_cast")
FOLDER = "comfy.ldm.modules.diffusionmodules"
NORMS = {f"comfy.ops.{ops}.GroupNorm": pristine.Norm(why_not_now=why_not_now) for ops in OPS}
CLASSES = {f"{FOLDER}.model.ResnetBlock": ResnetBlock(), f"{FOLDER}.openaimodel.ResBlock": openai.ResBlock(),
           **{name: Norm() for name in NORMS}}
