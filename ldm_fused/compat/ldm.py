"""CompVis latent-diffusion, stable-diffusion and taming-transformers: ``ldm.modules.diffusionmodules.model``.

Use: ``from ldm_fused.compat.ldm import ResnetBlock`` in place of the class there.
"""

from typing import Optional

from torch import Tensor

from ..modules import KNOWN_CLASSES, FusedResnetBlock

__all__ = ["ResnetBlock"]


class ResnetBlock(FusedResnetBlock):
    """:class:`ldm_fused.FusedResnetBlock` with CompVis' signature: 512 channels of time embedding unless told, and a
    forward that takes ``temb``, which may be None."""

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: Optional[int] = None,
        conv_shortcut: bool = False,
        dropout: float,
        temb_channels: int = 512,
    ) -> None:
        super().__init__(in_channels=in_channels, out_channels=out_channels, conv_shortcut=conv_shortcut,
                         dropout=dropout, temb_channels=temb_channels)

    def forward(self, x: Tensor, temb: Optional[Tensor]) -> Tensor:
        return super().forward(x, temb)


KNOWN_CLASSES.add(ResnetBlock)
