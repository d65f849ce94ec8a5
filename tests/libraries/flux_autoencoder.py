"""The FLUX autoencoder's block, and a decoder's end."""

import torch
from torch import nn


def swish(x):
    return x * torch.sigmoid(x)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.norm1 = nn.GroupNorm(8, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv2(swish(self.norm2(self.conv1(swish(self.norm1(x))))))
        return h + (x if self.in_channels == self.out_channels else self.nin_shortcut(x))


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=1, padding=1)

    def forward(self, x):
        return self.conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(4, 32, 3, padding=1)
        self.blocks = nn.ModuleList([ResnetBlock(32, 32), ResnetBlock(32, 64)])
        self.norm_out = nn.GroupNorm(8, 64, eps=1e-6)
        self.conv_out = nn.Conv2d(64, 3, 3, padding=1)

    def forward(self, z):
        h = self.conv_in(z)
        for block in self.blocks:
            h = block(h)
        h = self.norm_out(h)
        h = swish(h)
        return self.conv_out(h)
