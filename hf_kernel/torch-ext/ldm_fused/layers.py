"""Layers whose forward ``kernels.kernelize`` puts in the place of another class's.

They have no state: ``self`` is the other class's instance, and has what the annotations name.
"""

from typing import Any, Callable, Optional

import torch
from torch import Tensor, nn

from . import readers
from .decisions import decided
from .diffusers_block import resnet_block_2d
from .functional import group_norm_silu

__all__ = ["GroupNormSiLU", "ResnetBlock2D"]


class GroupNormSiLU(nn.Module):
    """For an ``nn.GroupNorm`` whose forward also activates, ``F.silu(super().forward(input))``."""

    has_backward: bool = True
    can_torch_compile: bool = True

    num_groups: int
    weight: Optional[Tensor]
    bias: Optional[Tensor]
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, \\*) to the same shape and memory format."""
        return group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps)


class ResnetBlock2D(nn.Module):
    """For ``diffusers.models.resnet.ResnetBlock2D``, with each of its options.

    In each call, a norm or convolution that other code has hooked, wrapped, moved or replaced is called as a module.
    """

    has_backward: bool = True
    can_torch_compile: bool = True

    norm1: nn.GroupNorm
    conv1: nn.Conv2d
    time_emb_proj: Optional[nn.Linear]
    norm2: nn.GroupNorm
    dropout: nn.Dropout
    conv2: nn.Conv2d
    nonlinearity: nn.Module
    conv_shortcut: Optional[nn.Conv2d]
    upsample: Optional[Callable[[Tensor], Tensor]]
    downsample: Optional[Callable[[Tensor], Tensor]]
    time_embedding_norm: str
    skip_time_act: bool
    output_scale_factor: float

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``input_tensor`` (N, in_channels, H, W) and ``temb`` (N, temb_channels), or None for a block without
        ``time_emb_proj``, to (N, out_channels, H, W), where H and W are halved or doubled by a block that resamples."""
        y = None
        if not (args or kwargs or decided(readers.is_off) or readers.is_read((input_tensor, temb))
                or _has_another_forward(type(self))):
            y = resnet_block_2d(self, input_tensor, temb)
        # The class's own forward warns, raises, is what a reader knows, or computes something else.
        return type(self).forward(self, input_tensor, temb, *args, **kwargs) if y is None else y


@torch.compiler.assume_constant_result
def _has_another_forward(cls: type) -> bool:
    """Whether ``cls`` inherits the mark by which ``kernelize`` finds a class, but not that class's forward."""
    marked = next((c for c in cls.__mro__ if "kernel_layer_name" in vars(c)), cls)
    definer = next(c for c in cls.__mro__ if "forward" in vars(c))
    return definer is not marked and issubclass(definer, marked)
