"""What tests of ``ldm_fused.patch`` have in common: a model's results before and after."""

import torch
from torch import nn
from torch.nn import functional as F

import ldm_fused
from ldm_fused import reference
from ldm_fused.patching import swap


def randomize(model):
    """Weights that hide nothing: no norm at its initial ones and zeros, no zero-initialised convolution; no dropout."""
    model.eval()
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.dim() < 2:
                nn.init.normal_(p, 1.0 if name == "weight" else 0.0, 0.5)
            elif p is not None:
                nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return model


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def results(model, inputs):
    """Output and all gradients, with the same random numbers each time."""
    torch.manual_seed(7)
    y = model(*inputs)
    leaves = [t for t in (*inputs, *model.parameters()) if t is not None]
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return [y, *torch.autograd.grad(y, leaves, dy, allow_unused=True)]


def assert_close(found, expected, tolerance=1e-9):
    for a, b in zip(found, expected):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, b.abs().max().item()))


def check(model, inputs, *, tolerance=1e-9, **options):
    """Outputs and gradients before and after patch, in evaluation; unpatch; what patch said and report says."""
    randomize(model)
    expected = results(model, inputs)
    with ldm_fused.disabled():  # which reaches blocks of ours, too
        composed = results(model, inputs)
    names = list(model.state_dict())
    patched = ldm_fused.patch(model, **options)
    assert_close(results(model, inputs), expected, tolerance)
    run = ldm_fused.report(model)
    assert list(model.state_dict()) == names
    with ldm_fused.disabled():
        assert all(a is b or torch.equal(a, b) for a, b in zip(results(model, inputs), composed))
    assert ldm_fused.report(model).fused == run.fused
    ldm_fused.unpatch(model)
    assert all(a is b or torch.equal(a, b) for a, b in zip(results(model, inputs), expected))
    assert not ldm_fused.is_patched(model) and swap.STATE not in vars(model)
    return patched, run


def hook(norm):
    norm.register_forward_hook(lambda module, args, output: 2 * output)


class TwoNorms(nn.Module):
    """The block of the documentation's example."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, 32), nn.GroupNorm(8, 64)
        self.conv1, self.conv2 = nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, 32, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class Model(nn.Module):
    """Two blocks, a norm that stands alone, and an end of norm, activation and convolution."""

    def __init__(self, block=reference.ResnetBlock):
        super().__init__()
        self.first = block(in_channels=32, out_channels=64, dropout=0.1, temb_channels=24)
        self.norm = nn.GroupNorm(8, 64)
        self.second = block(in_channels=64, dropout=0.0, temb_channels=24)
        self.out = nn.Sequential(nn.GroupNorm(8, 64), nn.SiLU(), nn.Conv2d(64, 3, 3, padding=1))

    def forward(self, x, temb):
        h = self.norm(self.first(x, temb))
        return self.out(self.second(h, temb))


def inputs(dtype=torch.float64):
    return random(2, 32, 8, 6, dtype=dtype), random(2, 24, dtype=dtype)
