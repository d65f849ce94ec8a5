"""ComfyUI: its own classes for PyTorch's layers, served while they cast no weights. Its blocks are read."""

from typing import Optional

from torch import nn

from ... import pristine
from . import openai
from .plain import Norm


def why_not_now(norm: nn.Module) -> Optional[str]:
    """The reason why a layer of ``comfy.ops`` does more than PyTorch's, or None."""
    if getattr(norm, "weight_function", ()) or getattr(norm, "bias_function", ()):
        return "its weights go through functions first"
    return "its weights are cast in each call" if getattr(norm, "comfy_cast_weights", False) else None


OPS = ("disable_weight_init", "manual_cast")
NORMS = {f"comfy.ops.{ops}.GroupNorm": pristine.Norm(why_not_now=why_not_now) for ops in OPS}
CLASSES = {"comfy.ldm.modules.diffusionmodules.openaimodel.ResBlock": openai.ResBlock(),
           **{name: Norm() for name in NORMS}}
