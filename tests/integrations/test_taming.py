"""taming-transformers, whose model file is the one that latent-diffusion and stable-diffusion have."""

import pytest
import torch
from support import check, randomize
from taming.modules.diffusionmodules.model import Decoder, Encoder, Model, ResnetBlock
from torch.nn import functional as F

import ldm_fused

SIZES = dict(ch=32, out_ch=3, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=[8], in_channels=3, resolution=16)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("memory_format", [None, torch.channels_last], ids=["contiguous", "channels_last"])
def test_decoder(memory_format, recompute):
    patched, run = check(Decoder(**SIZES, z_channels=4), lambda m, z: m(z), [torch.randn(2, 4, 8, 8)], fused=16,
                         memory_format=memory_format, recompute=recompute, strict=True)
    assert run.share == 1 and "norm_out" in [site.name for site in run.sites]


def test_encoder():
    patched, run = check(Encoder(**SIZES, z_channels=4), lambda m, x: m(x), [torch.randn(2, 3, 16, 16)], strict=True)
    assert run.share == 1


def test_model_with_a_time_embedding():  # which it computes in float32 alone
    model, x, t = randomize(Model(**SIZES)), torch.randn(2, 3, 16, 16), torch.tensor([1.0, 9.0])
    expected = model(x, t)
    ldm_fused.patch(model, strict=True)
    torch.testing.assert_close(model(x, t), expected, rtol=1e-4, atol=1e-4)
    assert ldm_fused.report(model).share == 1


@pytest.mark.parametrize("options", [dict(), dict(out_channels=64), dict(out_channels=64, conv_shortcut=True),
                                     dict(temb_channels=0)], ids=str)
def test_block(options):
    block = ResnetBlock(in_channels=32, dropout=0.1, **options)
    temb = torch.randn(2, 512) if hasattr(block, "temb_proj") else None
    patched, run = check(block, lambda b, x, temb: b(x, temb), [torch.randn(2, 32, 8, 6), temb], fused=2, strict=True)
    assert run.share == 1


@pytest.mark.parametrize("name", ["norm_out", "mid.block_1.norm2", "mid.attn_1.norm"])
def test_a_norm_whose_forward_is_replaced_falls_back(name):
    model = randomize(Decoder(**SIZES, z_channels=4)).double()
    z = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    norm = model.get_submodule(name)
    forward = norm.forward
    norm.forward = lambda x: 2 * forward(x)
    expected = model(z)
    found = ldm_fused.patch(model)
    torch.testing.assert_close(model(z), expected)
    fallbacks = ldm_fused.report(model).fallbacks
    if name == "mid.attn_1.norm":  # nothing to take over: it is skipped
        assert [(n, why) for n, _, why in found.skipped] == [(name, "its forward is replaced")] and not fallbacks
    else:
        assert fallbacks == {"its forward is replaced": 1}


def test_norm_out_called_alone():
    decoder = Decoder(**SIZES, z_channels=4)
    ldm_fused.patch(decoder)
    x = torch.randn(2, 32, 5, 5)
    assert torch.equal(decoder.norm_out(x), F.group_norm(x, 32, decoder.norm_out.weight, decoder.norm_out.bias, 1e-6))
