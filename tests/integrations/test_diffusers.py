"""diffusers' models and blocks, patched."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from support import check
from torch import nn

import ldm_fused


def autoencoder(**options):
    options = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, **options}
    return AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **options)


def unet(**options):
    options = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 16,
               "cross_attention_dim": 16, "attention_head_dim": 8, **options}
    return UNet2DConditionModel(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **options)


def reconstruct(model, x):
    return model(x).sample


PICTURE = [(1, 3, 32, 32)]


def unet_inputs():
    return [torch.randn(2, 4, 16, 16), torch.tensor([3, 500]), torch.randn(2, 7, 16)]


@pytest.mark.parametrize("memory_format", [None, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("recompute", [False, True])
def test_autoencoder(recompute, memory_format):
    patched, run = check(autoencoder(), reconstruct, [torch.randn(1, 3, 32, 32)], fused=24, recompute=recompute,
                         memory_format=memory_format)
    assert not patched.skipped and run.share == 1
    assert {"decoder.conv_norm_out", "decoder.mid_block.attentions.0.group_norm"} <= {s.name for s in run.sites}


@pytest.mark.parametrize("options", [
    {}, dict(resnet_time_scale_shift="scale_shift"), dict(resnet_skip_time_act=True, mid_block_scale_factor=2**0.5),
    dict(use_linear_projection=True)], ids=["default", "scale_shift", "skip_time_act", "linear projection"])
def test_conditional_unet(options):
    patched, run = check(unet(**options), reconstruct_unet, unet_inputs(), fused=21)
    assert not patched.skipped and run.share == 1


def reconstruct_unet(model, x, t, context):
    return model(x, t, context).sample


def test_unconditional_unet_whose_blocks_up_and_down_sample():
    model = UNet2DModel(sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
                        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
                        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), attention_head_dim=8,
                        resnet_time_scale_shift="scale_shift")
    patched, run = check(model, lambda m, x, t: m(x, t).sample, [torch.randn(2, 3, 16, 16), torch.tensor([3, 500])])
    assert not patched.skipped and run.share == 1


BLOCKS = {
    "default": dict(),
    "shortcut": dict(out_channels=64),
    "no time embedding": dict(temb_channels=None),
    "scale_shift": dict(time_embedding_norm="scale_shift"),
    "skip_time_act": dict(skip_time_act=True, output_scale_factor=2**0.5),
    "up": dict(up=True),
    "down": dict(down=True, out_channels=64, output_scale_factor=2.0),
    "fir up": dict(up=True, kernel="fir"),
    "sde_vp down": dict(down=True, kernel="sde_vp"),
    "other groups, no bias": dict(groups_out=4, use_in_shortcut=True, conv_shortcut_bias=False),
    "conv_2d_out_channels": dict(conv_2d_out_channels=16),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_resnet_block(name):
    block = ResnetBlock2D(in_channels=32, groups=8, **{"temb_channels": 24, **BLOCKS[name]})
    temb = None if block.time_emb_proj is None else torch.randn(2, 24)
    patched, run = check(block, lambda b, x, t: b(x, t), [torch.randn(2, 32, 8, 8), temb], fused=2)
    assert patched.replaced[0][2] == ("norm1", "norm2") and run.share == 1


@pytest.mark.parametrize("name", ["mish", "gelu", "relu"])
def test_other_activations_are_left_and_reported(name):
    block = ResnetBlock2D(in_channels=32, groups=8, temb_channels=None, non_linearity=name)
    patched = ldm_fused.patch(block)
    assert not patched.replaced and "its activation is" in patched.skipped[0][2] and not ldm_fused.is_patched(block)
    with pytest.raises(ldm_fused.UnsupportedBlock, match="its activation is"):
        ldm_fused.patch(block, strict=True)


def test_a_hooked_norm_falls_back():
    block = ResnetBlock2D(in_channels=32, groups=8, temb_channels=None).double()
    x = torch.randn(2, 32, 8, 8, dtype=torch.float64)
    block.norm2.register_forward_hook(lambda module, args, output: 2 * output)
    expected = block(x, None)
    ldm_fused.patch(block)
    torch.testing.assert_close(block(x, None), expected)
    run = ldm_fused.report(block)
    assert run.fused == 1 and run.fallbacks == {"it has hooks": 1}


@pytest.mark.parametrize("hooked", ["conv_norm_out", "conv_act"])
def test_a_hooked_norm_or_activation_at_the_end_falls_back(hooked):
    model = autoencoder().double().decoder
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    ldm_fused.patch(model)
    seen = []
    getattr(model, hooked).register_forward_hook(lambda module, args, output: seen.append(output) or 2 * output)
    after = model(x)
    run = ldm_fused.report(model)
    ldm_fused.unpatch(model)
    torch.testing.assert_close(after, model(x))
    torch.testing.assert_close(*seen)
    [reason] = run.fallbacks
    assert run.fallbacks[reason] == 1 and reason.endswith("it has hooks")


def test_the_norm_and_the_activation_at_the_end_called_alone_compute_what_they_did():
    decoder = autoencoder().decoder
    ldm_fused.patch(decoder)
    x = torch.randn(2, 32, 5, 5)
    h = decoder.conv_norm_out(x)
    assert torch.equal(h, nn.functional.group_norm(x, 8, decoder.conv_norm_out.weight, decoder.conv_norm_out.bias, 1e-6))
    assert torch.equal(decoder.conv_act(h), nn.functional.silu(h))
