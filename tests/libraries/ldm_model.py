"""An LDM autoencoder's parts: a block, attention, and a decoder that ends in norm, swish, convolution."""

import torch
from torch import nn


def nonlinearity(x):
    return torch.sigmoid(x) * x


class ResnetBlock(nn.Module):
    def __init__(self, *, in_channels, out_channels=None, conv_shortcut=False, dropout, temb_channels=512):
        super().__init__()
        out_channels = out_channels or in_channels
        self.in_channels, self.out_channels, self.use_conv_shortcut = in_channels, out_channels, conv_shortcut
        self.norm1 = nn.GroupNorm(8, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(8, out_channels, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels and conv_shortcut:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        elif in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, temb):
        y = self.conv1(nonlinearity(self.norm1(x)))
        if temb is not None:
            y += self.temb_proj(nonlinearity(temb))[..., None, None]
        y = self.conv2(self.dropout(nonlinearity(self.norm2(y))))
        if self.in_channels != self.out_channels:
            x = (self.conv_shortcut if self.use_conv_shortcut else self.nin_shortcut)(x)
        return y + x


class AttnBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels, eps=1e-6)
        self.qkv, self.proj_out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(y.transpose(1, 2).reshape(x.shape))


class Upsample(nn.Module):
    def __init__(self, channels, with_conv=True):
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        x = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if self.with_conv else x


class Decoder(nn.Module):
    def __init__(self, channels=32, blocks=True):
        super().__init__()
        self.conv_in = nn.Conv2d(4, channels, 3, padding=1)
        self.mid = nn.Module()
        self.mid.attn_1 = AttnBlock(channels)
        self.up = nn.ModuleList()
        if blocks:
            self.up.append(ResnetBlock(in_channels=channels, dropout=0.0, temb_channels=0))
            self.up.append(ResnetBlock(in_channels=channels, out_channels=2 * channels, dropout=0.1, temb_channels=0))
            channels = 2 * channels
        self.norm_out = nn.GroupNorm(8, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, z):
        h = self.mid.attn_1(self.conv_in(z))
        for block in self.up:
            h = block(h, None)
        h = self.norm_out(h)
        h = nonlinearity(h)
        return self.conv_out(h)
