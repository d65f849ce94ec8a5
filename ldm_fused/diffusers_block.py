"""diffusers' ``ResnetBlock2D`` made of the ops: for :func:`ldm_fused.patch`, and for the layer of the Hugging Face
kernel."""

from typing import Optional, Tuple

from torch import Tensor, nn

from .resnet_block import Count, Stage, not_counted, resnet


def resnet_block_2d(
    block: nn.Module,
    input_tensor: Tensor,
    temb: Optional[Tensor],
    *,
    counts: Tuple[Count, Count] = (not_counted, not_counted),
    recompute: bool = False,
    keeps_layout: bool = False,
) -> Optional[Tensor]:
    """What ``block`` gives for ``input_tensor`` and ``temb``; None for those of which its own forward must say what is
    wrong.

    Args:
        counts: of ``norm1`` and ``norm2``.
        recompute: as :func:`ldm_fused.resnet_block.resnet`'s.
        keeps_layout: in training, too, its shortcut takes x as it lies. diffusers makes x contiguous there.
    """
    mode, linear, act = block.time_embedding_norm, block.time_emb_proj, block.nonlinearity
    if (0 if temb is None else temb.dim()) != (0 if linear is None else 2) or linear is None and mode == "scale_shift":
        return None
    if linear is not None:
        temb = linear(temb if block.skip_time_act else act(temb))
    scale, shift = temb.chunk(2, dim=1) if mode == "scale_shift" else (None, None)
    if block.training and block.conv_shortcut is not None and not keeps_layout:
        input_tensor = input_tensor.contiguous()
    return resnet(input_tensor, Stage(block.norm1, block.conv1, act, count=counts[0]),
                  Stage(block.norm2, block.conv2, act, scale, shift, count=counts[1]), dropout=block.dropout,
                  shortcut=block.conv_shortcut, resample=block.downsample if block.upsample is None else block.upsample,
                  temb=temb if mode == "default" else None, scale=1.0 / block.output_scale_factor,
                  recompute=recompute)
