"""GroupNorm and SiLU (swish) in one pass, and the ResNet block of latent diffusion models built on it."""

from . import layers
from .functional import bias_add_residual, group_norm_act, group_norm_silu
from .multiprocessors import limit_multiprocessors
from .readers import disabled

__all__ = [
    "bias_add_residual",
    "disabled",
    "group_norm_act",
    "group_norm_silu",
    "layers",
    "limit_multiprocessors",
]
