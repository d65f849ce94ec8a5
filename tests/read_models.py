"""The models that tools read in tests of them: each of ours beside the plain one that it stands for."""

import torch
from patched import randomize
from torch import nn

import ldm_fused
from ldm_fused import reference

BLOCK = {"in_channels": 8, "dropout": 0.0, "num_groups": 4}


class Unet(nn.Module):
    """Blocks with a shortcut and without, a norm that stands alone, and a Sequential at the end."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.block1 = reference.ResnetBlock(**BLOCK)
        self.block2 = reference.ResnetBlock(out_channels=16, **BLOCK)
        self.norm, self.proj = nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 1)
        self.last = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1))

    def forward(self, x):
        h = self.block2(self.block1(self.first(x)))
        return self.last(h + self.proj(self.norm(h)))


class Adaptive(nn.Module):
    """The op with an argument of each shape, or its formula."""

    def __init__(self, op):
        super().__init__()
        self.op, self.weight, self.bias = op, nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x, pre_bias, scale, shift):
        return self.op(x, 4, self.weight, self.bias, pre_bias=pre_bias, scale=scale, shift=shift)


class Sum(nn.Module):
    """The end of a block, or its formula."""

    def __init__(self, op):
        super().__init__()
        self.op, self.bias = op, nn.Parameter(torch.zeros(8))

    def forward(self, x, residual):
        return self.op(x, residual, self.bias)


def plain_norm():
    return nn.GroupNorm(4, 8)


def plain_sequential():
    return nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 8, 1))


def plain_block(**options):
    return reference.ResnetBlock(**BLOCK, **options)


def patched(make):
    model = make()
    ldm_fused.patch(model)
    return model


X, TEMB = (8, 6, 5), (12,)
# Ours, the plain model, and the shapes of a sample of each input.
MODELS = {
    "group_norm_act": (lambda: Adaptive(ldm_fused.group_norm_act), lambda: Adaptive(reference.group_norm_act),
                       [X, X[:1], X[:1], X[:1]]),
    "bias_add_residual": (lambda: Sum(ldm_fused.bias_add_residual), lambda: Sum(reference.bias_add_residual), [X, X]),
    "GroupNormSiLU": (lambda: ldm_fused.GroupNormSiLU(4, 8), lambda: nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU()), [X]),
    "FusedResnetBlock": (lambda: ldm_fused.FusedResnetBlock(**BLOCK), plain_block, [X]),
    "FusedResnetBlock with temb": (lambda: ldm_fused.FusedResnetBlock(temb_channels=12, **BLOCK),
                                   lambda: plain_block(temb_channels=12), [X, TEMB]),
    "patched GroupNorm": (lambda: patched(plain_norm), plain_norm, [X]),
    "patched Sequential": (lambda: patched(plain_sequential), plain_sequential, [X]),
    "patched block": (lambda: patched(plain_block), plain_block, [X]),
    "patched UNet": (lambda: patched(Unet), Unet, [(3, *X[1:])]),
}


def models(name):
    """Ours and the plain model with the same weights."""
    ours, plain, _ = MODELS[name]
    ours, plain = randomize(ours()), plain().eval()
    with torch.no_grad():
        for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
            p.copy_(q)
    return ours, plain


def inputs(name, batch=2):
    return tuple(torch.randn(batch, *shape) for shape in MODELS[name][2])
