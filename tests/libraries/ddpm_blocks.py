"""A block of a repository that nobody has heard of: its own GroupNorm, its own swish, layers in Sequentials."""

from torch import nn


class GroupNorm32(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


class Swish(nn.Module):
    def forward(self, x):
        return x * x.sigmoid()


class Block(nn.Module):
    def __init__(self, channels, out_channels=None):
        super().__init__()
        out_channels = out_channels or channels
        self.block1 = nn.Sequential(GroupNorm32(8, channels), Swish(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.block2 = nn.Sequential(GroupNorm32(8, out_channels), Swish(), nn.Dropout(0.1),
                                    nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.res_conv = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x):
        return self.block2(self.block1(x)) + self.res_conv(x)
