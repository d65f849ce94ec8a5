"""diffusers' models and blocks, patched."""

import pytest
import torch
from diffusers import (AutoencoderKL, AutoencoderKLCogVideoX, AutoencoderKLHunyuanVideo, DDPMPipeline, DDPMScheduler,
                       UNet2DConditionModel, UNet2DModel, UNet3DConditionModel, UNetMotionModel,
                       UNetSpatioTemporalConditionModel)
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXResnetBlock3D
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoResnetBlockCausal3D
from diffusers.models.resnet import (ResnetBlock2D, ResnetBlockCondNorm2D, SpatioTemporalResBlock, TemporalConvLayer,
                                     TemporalResnetBlock)
from support import check, randomize
from torch import nn

import ldm_fused


def autoencoder(**options):
    options = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, **options}
    return AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                         **options)


def unet(**options):
    options = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 16,
               "cross_attention_dim": 16, "attention_head_dim": 8, **options}
    return UNet2DConditionModel(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **options)


def reconstruct(model, x):
    return model(x).sample


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


def unconditional():
    return UNet2DModel(sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
                       down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
                       up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), attention_head_dim=8,
                       resnet_time_scale_shift="scale_shift")


def test_unconditional_unet_whose_blocks_up_and_down_sample():
    patched, run = check(unconditional(), lambda m, x, t: m(x, t).sample,
                         [torch.randn(2, 3, 16, 16), torch.tensor([3, 500])])
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
    assert "its activation is" in patched.skipped[0][2]
    assert [name for name, _, _ in patched.replaced] == ["norm1", "norm2"]  # by themselves
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
    norm = decoder.conv_norm_out
    assert torch.equal(h, nn.functional.group_norm(x, 8, norm.weight, norm.bias, 1e-6))
    assert torch.equal(decoder.conv_act(h), nn.functional.silu(h))


# ---- Other blocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(), dict(out_channels=64, output_scale_factor=2.0), dict(up=True),
                                     dict(down=True)], ids=str)
def test_ada_group_block(options):
    block = ResnetBlockCondNorm2D(in_channels=32, temb_channels=24, groups=8, **options)
    patched, run = check(block, lambda b, x, t: b(x, t), [torch.randn(2, 32, 8, 8), torch.randn(2, 24)], fused=2)
    assert not patched.skipped and run.share == 1


@pytest.mark.parametrize("name", ["norm1", "norm2"])
def test_a_hooked_ada_group_norm_falls_back(name):
    block = randomize(ResnetBlockCondNorm2D(in_channels=32, temb_channels=24, groups=8)).double()
    getattr(block, name).register_forward_hook(lambda module, args, output: 2 * output)
    x, temb = torch.randn(2, 32, 8, 8).double(), torch.randn(2, 24).double()
    expected = block(x, temb)
    ldm_fused.patch(block)
    torch.testing.assert_close(block(x, temb), expected)
    assert ldm_fused.report(block).fallbacks == {"it has hooks": 1} and ldm_fused.report(block).fused == 1


def test_spatial_norms_are_left():
    block = ResnetBlockCondNorm2D(in_channels=32, temb_channels=24, groups=8, time_embedding_norm="spatial")
    found = ldm_fused.patch(block)
    assert [why for _, _, why in found.skipped] == ["its norm is SpatialNorm"]
    assert [name for name, _, _ in found.replaced] == ["norm1.norm_layer", "norm2.norm_layer"]


@pytest.mark.parametrize("options", [dict(), dict(out_channels=64), dict(temb_channels=None)], ids=str)
def test_temporal_block_on_a_permuted_tensor(options):
    block = TemporalResnetBlock(in_channels=32, **{"temb_channels": 24, **options})
    temb = None if block.time_emb_proj is None else torch.randn(2, 3, 24)
    patched, run = check(block, lambda b, x, t: b(x.permute(0, 2, 1, 3, 4), t), [torch.randn(2, 3, 32, 4, 6), temb],
                         fused=2)
    assert not patched.skipped and run.share == 1


def test_temporal_convolutions():
    layer = TemporalConvLayer(32, norm_num_groups=8)
    patched, run = check(layer, lambda m, x: m(x, num_frames=3), [torch.randn(6, 32, 4, 6)], fused=4)
    assert not patched.skipped and run.share == 1


def test_temporal_block_with_a_hooked_norm_falls_back():
    block = randomize(TemporalResnetBlock(in_channels=32, temb_channels=24)).double()
    block.norm2.register_forward_hook(lambda module, args, output: 2 * output)
    x, temb = torch.randn(2, 32, 3, 4, 6).double(), torch.randn(2, 3, 24).double()
    expected = block(x, temb)
    ldm_fused.patch(block)
    torch.testing.assert_close(block(x, temb), expected)
    assert ldm_fused.report(block).fallbacks == {"it has hooks": 1} and ldm_fused.report(block).fused == 1


def test_spatio_temporal_block():
    block = SpatioTemporalResBlock(32, 64, temb_channels=24)
    patched, run = check(block, lambda b, x, t: b(x, t, torch.zeros(2, 3)),
                         [torch.randn(6, 32, 4, 6), torch.randn(6, 24)], fused=4)
    assert not patched.skipped and run.share == 1


def test_hunyuan_video_autoencoder():
    model = AutoencoderKLHunyuanVideo(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8, 8, 16), layers_per_block=1,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        norm_num_groups=4, mid_block_add_attention=True)
    patched, run = check(model, reconstruct, [torch.randn(1, 3, 5, 16, 16)], fused=20)
    assert not patched.skipped and run.share == 1


def test_cogvideox_autoencoder():
    model = AutoencoderKLCogVideoX(
        in_channels=3, out_channels=3, down_block_types=("CogVideoXDownBlock3D",) * 4, layers_per_block=1,
        up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8), latent_channels=4,
        norm_num_groups=4, temporal_compression_ratio=4, sample_height=16, sample_width=16)
    patched, run = check(model, reconstruct, [torch.randn(1, 3, 5, 16, 16)], fused=10)
    assert all("CogVideoXSpatialNorm3D" in why for _, _, why in patched.skipped)
    assert run.share == 1  # of what is patched: the encoder's blocks, and the norms inside the decoder's


def test_a_hooked_norm_of_a_video_block_falls_back():
    for block in (HunyuanVideoResnetBlockCausal3D(32, 64, groups=8),
                  CogVideoXResnetBlock3D(in_channels=32, out_channels=64, groups=8, temb_channels=0)):
        randomize(block).double()
        block.norm2.register_forward_hook(lambda module, args, output: 2 * output)
        x = torch.randn(1, 32, 3, 4, 4).double()
        first = (lambda y: y[0] if isinstance(y, tuple) else y)
        expected = first(block(x))
        ldm_fused.patch(block)
        torch.testing.assert_close(first(block(x)), expected)
        assert ldm_fused.report(block).fallbacks == {"it has hooks": 1} and ldm_fused.report(block).fused == 1


def test_save_pretrained_and_a_pipeline(tmp_path):
    pipeline = DDPMPipeline(unet=unconditional(), scheduler=DDPMScheduler())
    randomize(pipeline.unet)
    arguments = torch.randn(2, 3, 16, 16), torch.tensor([3, 500])
    before = pipeline.unet(*arguments).sample
    found = ldm_fused.patch(pipeline)
    assert ldm_fused.is_patched(pipeline) and all(name.split(".")[0] == "unet" for name, _, _ in found.replaced)
    after = pipeline.unet(*arguments).sample
    pipeline.save_pretrained(tmp_path / "pipeline")
    loaded = DDPMPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(loaded.unet) is UNet2DModel and torch.equal(loaded.unet(*arguments).sample, before)
    ldm_fused.patch(loaded)
    assert torch.equal(loaded.unet(*arguments).sample, after)


# ---- Models of videos --------------------------------------------------------------------------------------------


SMALL = dict(block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16, sample_size=8)


def motion():
    """AnimateDiff's."""
    return UNetMotionModel(**SMALL, norm_num_groups=8, motion_num_attention_heads=2,
                           num_attention_heads=2, down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
                           up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"))


def spatio_temporal():
    """Stable Video Diffusion's."""
    return UNetSpatioTemporalConditionModel(
        **SMALL, in_channels=4, num_attention_heads=2, addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"))


def in_3d():
    """ModelScope's."""
    return UNet3DConditionModel(**SMALL, norm_num_groups=8, attention_head_dim=8,
                                down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
                                up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"))


@pytest.mark.parametrize("make", [motion, spatio_temporal, in_3d], ids=lambda f: f.__name__)
def test_unets_for_videos(make):
    if make is spatio_temporal:
        inputs = [torch.randn(1, 3, 4, 8, 8), torch.tensor([500]), torch.randn(1, 1, 16)]

        def call(model, x, t, context):
            return model(x, t, context, added_time_ids=torch.ones(1, 3, dtype=x.dtype)).sample
    else:
        texts = 3 if make is motion else 1  # one for each frame
        inputs, call = [torch.randn(1, 4, 3, 8, 8), torch.tensor([500]), torch.randn(texts, 7, 16)], reconstruct_unet
    patched, run = check(make(), call, inputs, fused=20)
    assert not patched.skipped and run.share == 1 and "conv_norm_out" in [site.name for site in run.sites]
