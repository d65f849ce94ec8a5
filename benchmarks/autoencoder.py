"""The LDM kl-f8 autoencoder (Rombach et al. 2022, arXiv:2112.10752), with the ResNet block class to be chosen.

Submodules carry the names that LDM and Stable Diffusion checkpoints use, so that the state dict is the same whatever
the block class. Weights are random: speed and rounding do not need trained ones.
"""

from typing import Callable, Sequence, Tuple

import torch.nn.functional as F
from torch import Tensor, nn

NUM_GROUPS, EPS = 32, 1e-6


def norm(channels: int, cls: Callable[..., nn.Module] = nn.GroupNorm) -> nn.Module:
    return cls(NUM_GROUPS, channels, eps=EPS, affine=True)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


class Downsample(nn.Module):
    """Halves height and width; the padding is on the right and at the bottom alone, as in LDM."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class AttnBlock(nn.Module):
    """Self-attention over pixels, one head, in front of it a GroupNorm without activation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, kernel_size=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class Middle(nn.Module):
    """Block, attention, block, at the lowest resolution."""

    def __init__(self, channels: int, block: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.block_1 = block(in_channels=channels, dropout=0.0)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = block(in_channels=channels, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


def level(in_channels: int, out_channels: int, blocks: int, block: Callable[..., nn.Module]) -> nn.Module:
    """The blocks of one resolution: the first changes the number of channels."""
    stage = nn.Module()
    stage.block = nn.ModuleList(
        block(in_channels=in_channels if i == 0 else out_channels, out_channels=out_channels, dropout=0.0)
        for i in range(blocks)
    )
    return stage


class Encoder(nn.Module):
    """A picture (N, 3, H, W) to the mean and log-variance of its latent, (N, 2 z_channels, H/8, W/8)."""

    def __init__(self, block, norm_act, ch: int, ch_mult: Sequence[int], num_res_blocks: int, z_channels: int) -> None:
        super().__init__()
        widths = [ch, *(ch * m for m in ch_mult)]
        self.conv_in = conv3x3(3, ch)
        self.down = nn.ModuleList(level(a, b, num_res_blocks, block) for a, b in zip(widths, widths[1:]))
        for stage, width in zip(self.down[:-1], widths[1:]):
            stage.downsample = Downsample(width)
        self.mid = Middle(widths[-1], block)
        self.norm_out = norm(widths[-1], norm_act)
        self.conv_out = conv3x3(widths[-1], 2 * z_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for stage in self.down:
            for block in stage.block:
                h = block(h)
            if hasattr(stage, "downsample"):
                h = stage.downsample(h)
        return self.conv_out(self.norm_out(self.mid(h)))


class Decoder(nn.Module):
    """A latent (N, z_channels, h, w) to a picture (N, 3, 8h, 8w)."""

    def __init__(self, block, norm_act, ch: int, ch_mult: Sequence[int], num_res_blocks: int, z_channels: int) -> None:
        super().__init__()
        widths = [*(ch * m for m in ch_mult), ch * ch_mult[-1]]
        self.conv_in = conv3x3(z_channels, widths[-1])
        self.mid = Middle(widths[-1], block)
        # Like the encoder's, levels count from the full resolution, so the decoder walks them backward.
        self.up = nn.ModuleList(level(b, a, num_res_blocks + 1, block) for a, b in zip(widths, widths[1:]))
        for stage, width in zip(self.up[1:], widths[1:]):
            stage.upsample = Upsample(width)
        self.norm_out = norm(widths[0], norm_act)
        self.conv_out = conv3x3(widths[0], 3)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for stage in reversed(self.up):
            for block in stage.block:
                h = block(h)
            if hasattr(stage, "upsample"):
                h = stage.upsample(h)
        return self.conv_out(self.norm_out(h))


class AutoencoderKL(nn.Module):
    """Encodes a picture and decodes the mean of its latent; the defaults are LDM's kl-f8 configuration.

    Args:
        block: class of the ResNet blocks, with the reference block's arguments.
        norm_act: class of the norms that an activation follows outside blocks, with nn.GroupNorm's arguments.
    """

    def __init__(
        self,
        block: Callable[..., nn.Module],
        norm_act: Callable[..., nn.Module],
        *,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        z_channels: int = 4,
        embed_dim: int = 4,
    ) -> None:
        super().__init__()
        sizes = (ch, ch_mult, num_res_blocks, z_channels)
        self.encoder = Encoder(block, norm_act, *sizes)
        self.decoder = Decoder(block, norm_act, *sizes)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, kernel_size=1)
        self.latent_channels = embed_dim

    def moments(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """Mean and log-variance of the latent's distribution, (N, embed_dim, H/8, W/8) each."""
        return self.quant_conv(self.encoder(x)).chunk(2, dim=1)

    def encode(self, x: Tensor) -> Tensor:
        return self.moments(x)[0]

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))
