"""LDM's block made of those layers."""

import sys

from torch import nn

ops = sys.modules["comfy.ops"].disable_weight_init


class ResnetBlock(nn.Module):
    def __init__(self, in_channels, out_channels, temb_channels=0, dropout=0.0, layers=ops):
        super().__init__()
        self.in_channels, self.out_channels, self.use_conv_shortcut = in_channels, out_channels, False
        self.swish = nn.SiLU(inplace=True)
        self.norm1 = layers.GroupNorm(8, in_channels, eps=1e-6)
        self.conv1 = layers.Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = layers.GroupNorm(8, out_channels, eps=1e-6)
        self.dropout = nn.Dropout(dropout, inplace=True)
        self.conv2 = layers.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = layers.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, temb=None):
        h = self.conv1(self.swish(self.norm1(x)))
        if temb is not None:
            h = h + self.temb_proj(self.swish(temb))[..., None, None]
        h = self.conv2(self.dropout(self.swish(self.norm2(h))))
        return h + (x if self.in_channels == self.out_channels else self.nin_shortcut(x))
