"""A UNet's residual block with a time embedding, and the end of the UNet."""

import importlib

import torch.nn.functional as F
from torch import nn

_nn = importlib.import_module(__name__.replace(".unet", ".nn").replace(".openaimodel", ".util"))


class Resample(nn.Module):
    def __init__(self, up):
        super().__init__()
        self.up = up

    def forward(self, x):
        return F.interpolate(x, scale_factor=2) if self.up else F.avg_pool2d(x, 2)


class Upsample(nn.Module):
    """Of videos it doubles height and width."""

    def __init__(self, channels, use_conv=True, dims=2, out_channels=None):
        super().__init__()
        self.channels, self.use_conv, self.dims = channels, use_conv, dims
        if use_conv:
            conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
            self.conv = conv(channels, out_channels or channels, 3, padding=1)

    def forward(self, x):
        assert x.shape[1] == self.channels
        if self.dims == 3:
            x = F.interpolate(x, (x.shape[2], x.shape[3] * 2, x.shape[4] * 2), mode="nearest")
        else:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        if self.use_conv:
            x = self.conv(x)
        return x


class ResBlock(nn.Module):
    def __init__(self, channels, emb_channels, dropout, out_channels=None, use_scale_shift_norm=False,
                 use_checkpoint=False, up=False, down=False):
        super().__init__()
        out_channels = out_channels or channels
        self.use_scale_shift_norm, self.use_checkpoint, self.updown = use_scale_shift_norm, use_checkpoint, up or down
        self.in_layers = nn.Sequential(_nn.GroupNorm32(8, channels), nn.SiLU(),
                                       nn.Conv2d(channels, out_channels, 3, padding=1))
        if self.updown:
            self.h_upd, self.x_upd = Resample(up), Resample(up)
        else:
            self.h_upd = self.x_upd = nn.Identity()
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, (1 + use_scale_shift_norm) * out_channels))
        self.out_layers = nn.Sequential(_nn.GroupNorm32(8, out_channels), nn.SiLU(), nn.Dropout(dropout),
                                        nn.Conv2d(out_channels, out_channels, 3, padding=1))
        nn.init.zeros_(self.out_layers[3].weight)
        self.skip_connection = nn.Identity() if out_channels == channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x, emb):
        return _nn.checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x, emb):
        if self.updown:
            h = self.in_layers[-1](self.h_upd(self.in_layers[:-1](x)))
            x = self.x_upd(x)
        else:
            h = self.in_layers(x)
        emb = self.emb_layers(emb).to(h.dtype)[..., None, None]
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(x) + h


class UNet(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.block = ResBlock(32, 24, 0.0, **options)
        channels = self.block.out_layers[3].out_channels
        self.norm = _nn.GroupNorm32(8, channels)
        self.out = nn.Sequential(_nn.GroupNorm32(8, channels), nn.SiLU(), nn.Conv2d(channels, 3, 3, padding=1))

    def forward(self, x, emb):
        h = self.block(x, emb)
        return self.out(h + self.norm(h.flatten(2)).reshape(h.shape))
