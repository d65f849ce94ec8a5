"""ComfyUI, Fooocus and Forge: their own classes for PyTorch's layers, which cast weights in some calls. Their blocks'
formula is read."""

from typing import Optional

from torch import nn

from ... import bypass
from .plain import Norm


def layer_obstacle(layer: nn.Module) -> Optional[str]:
    """Looks at whether a layer changes its weights before it uses them, as PyTorch's do not."""
    if getattr(layer, "weight_function", ()) or getattr(layer, "bias_function", ()):
        return "its weights go through functions first"
    if getattr(layer, "comfy_cast_weights", False) or getattr(layer, "parameters_manual_cast", False):
        return "its weights are cast in each call"
    return None


FILES = tuple(f"{file}.{ops}" for file in ("comfy.ops", "ldm_patched.modules.ops")
              for ops in ("disable_weight_init", "manual_cast")) + ("backend.operations.ForgeOperations",)
NORMS = {f"{file}.GroupNorm": bypass.Norm(obstacle=layer_obstacle) for file in FILES}
CONVOLUTIONS = {f"{file}.Conv{i}d": layer_obstacle for file in FILES for i in (1, 2, 3)}
CLASSES = {name: Norm() for name in NORMS}
