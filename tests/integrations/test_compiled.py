"""The libraries' models patched and compiled, in each order, with no eager call in between.

test_switches.py compiles diffusers' decoder."""

import pytest
import torch
from support import randomize
from test_diffusers import unet, unet_inputs
from torch.testing import assert_close

import ldm_fused


def diffusers_unet():
    return unet(), tuple(unet_inputs())


def monai_block():
    from monai.networks.nets.autoencoderkl import AEKLResBlock
    return AEKLResBlock(2, 32, 8, 1e-6, 64), (torch.randn(1, 32, 8, 8),)


def taming_decoder():
    from taming.modules.diffusionmodules.model import Decoder
    return Decoder(ch=32, out_ch=3, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=[], in_channels=3,
                   resolution=16, z_channels=4), (torch.randn(1, 4, 8, 8),)


def output(y):
    return y[0] if isinstance(y, tuple) else getattr(y, "sample", y)


@pytest.mark.parametrize("order", ["patch compile", "compile patch", "patch compile unpatch"])
@pytest.mark.parametrize("make", [diffusers_unet, monai_block, taming_decoder],
                         ids=lambda f: f.__name__)
@torch.no_grad()
def test_compiled(make, order):
    torch._dynamo.reset()
    model, arguments = make()
    expected = output(randomize(model)(*arguments))
    run = model
    for step in order.split():
        if step == "compile":
            run = torch.compile(model, backend="eager")
        else:
            getattr(ldm_fused, step)(model)
        if step == "compile" or run is not model:
            for _ in range(2):
                y = output(run(*arguments))
                assert_close(y, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
