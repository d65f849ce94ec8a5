"""fold_upsample and memory_format on the libraries' own models."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.upsampling import Upsample2D
from monai.networks.nets import autoencoderkl
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from support import check, randomize, results
from taming.modules.diffusionmodules.model import Decoder
from test_diffusers import autoencoder, reconstruct, reconstruct_unet, unet, unet_inputs
from watched import LayoutCopies, peak_of

import ldm_fused

BOTH = {"fold_upsample": True, "memory_format": torch.channels_last}
SWITCHES = pytest.mark.parametrize("options", [{"fold_upsample": True}, {"memory_format": torch.channels_last}, BOTH],
                                   ids=["fold", "layout", "both"])


@SWITCHES
def test_autoencoder(options):
    patched, run = check(autoencoder(), reconstruct, [torch.randn(1, 3, 32, 32)], fused=24, switches=options)
    assert not patched.skipped and run.share == 1
    assert bool(run.upsamplings) == ("fold_upsample" in options) and not any(s.fallbacks for s in run.upsamplings)
    assert bool(patched.laid_out) == ("memory_format" in options)


def test_conditional_unet():
    patched, run = check(unet(), reconstruct_unet, unet_inputs(), fused=21, switches=BOTH)
    assert not patched.skipped and len(run.upsamplings) == 1


def test_a_size_that_is_given_runs_the_class():
    model = randomize(unet())
    inputs = [torch.randn(2, 4, 15, 13), *unet_inputs()[1:]]  # no multiple of two: the UNet names sizes
    with torch.no_grad():
        expected = reconstruct_unet(model, *inputs)
        ldm_fused.patch(model, fold_upsample=True)
        torch.testing.assert_close(reconstruct_unet(model, *inputs), expected, rtol=1e-4, atol=1e-4)
    [site] = ldm_fused.report(model).upsamplings
    assert site.fallbacks == {"it was called with other arguments": 1} and not site.calls


@pytest.mark.parametrize("options,reason", [
    (dict(use_conv=False), "its use_conv is False"), (dict(use_conv_transpose=True), "its use_conv_transpose is True"),
    (dict(interpolate=False), "its interpolate is False"), (dict(norm_type="ln_norm", eps=1e-5,
                                                                 elementwise_affine=True), "it has a norm"),
    (dict(kernel_size=1, padding=0), "its convolution is Conv2d")], ids=str)
def test_other_upsamplings_are_reported(options, reason):
    model = Upsample2D(**{"channels": 32, "use_conv": True, **options})
    x = torch.randn(1, 32, 4, 4)
    expected = model(x)
    found = ldm_fused.patch(model, fold_upsample=True)
    assert reason in found.skipped[0][2] and not found.replaced and torch.equal(model(x), expected)


@pytest.mark.parametrize("name", ["conv", "Conv2d_0"])
def test_the_convolutions_name(name):
    model, x = Upsample2D(32, use_conv=True, name=name).double(), torch.randn(1, 32, 5, 4).double()
    expected = model(x)
    ldm_fused.patch(model, fold_upsample=True, strict=True)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    assert ldm_fused.report(model).upsamplings[0].name == name


@pytest.mark.parametrize("dims", [2, 3])
def test_monai(dims):
    model = autoencoderkl.AutoencoderKL(spatial_dims=dims, in_channels=1, out_channels=1, channels=(16, 32),
                                        num_res_blocks=1, attention_levels=(False, False), latent_channels=2,
                                        norm_num_groups=8)
    x = torch.randn(1, 1, *(16, 8, 4)[:dims])
    patched, run = check(model, lambda m, x: m.reconstruct(x), [x], fused=20, fold_upsample=True)
    assert not patched.skipped and [site.calls > 0 for site in run.upsamplings] == [True]


def test_monais_unet():
    model = DiffusionModelUNet(spatial_dims=2, in_channels=1, out_channels=1, num_res_blocks=1, channels=(16, 32),
                               attention_levels=(False, True), norm_num_groups=8, num_head_channels=8)
    inputs = [torch.randn(1, 1, 16, 8), torch.tensor([7])]
    patched, run = check(model, lambda m, x, t: m(x, t), inputs, fused=15, switches=BOTH)
    assert not patched.skipped and len(run.upsamplings) == 1


def test_taming():
    model = Decoder(ch=32, out_ch=3, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=[8], in_channels=3,
                    resolution=16, z_channels=4)
    patched, run = check(model, lambda m, z: m(z), [torch.randn(2, 4, 8, 8)], fused=16, strict=True, switches=BOTH)
    assert len(run.upsamplings) == 1 and run.share == 1


@torch.no_grad()
def test_a_whole_decode_copies_its_latent_alone():
    """diffusers' attention flattens pixels, and norms them so: no copy either."""
    model = autoencoder()
    ldm_fused.patch(model, strict=True, **BOTH)
    with LayoutCopies() as copies:
        y = model.decode(torch.randn(1, 4, 8, 8)).sample
    assert copies.found == [("aten::convolution", (1, 4, 8, 8))]
    assert y.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_a_decodes_peak():
    """Of a block that halves the channels the caller holds the input, and a convolution needs its own. They are
    two thirds of what the class needs with its norm and activation apart, and the output is half of one."""
    model = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
                          block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=8)
    z = torch.randn(1, 4, 16, 16)
    eager, _ = peak_of(model.decode, z)
    ldm_fused.patch(model, **BOTH)
    ours, _ = peak_of(model.decode, z)
    assert ours <= 0.85 * eager, f"{ours / eager:.2f}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@SWITCHES
def test_accuracy(dtype, options):
    """Root mean square errors against float64 are at most 1.5 times eager's, of output and gradients."""
    model = randomize(autoencoder()).decoder.to(dtype)
    z = torch.randn(3, 4, 7, 5).to(dtype)

    def found(model, z):
        y, *gradients = results(model, lambda m, z: m(z), [z])
        return [y.double(), torch.cat([g.double().flatten() for g in gradients])]

    exact = found(copy.deepcopy(model).double(), z.double())
    theirs = found(model, z)
    ldm_fused.patch(model, strict=True, **options)
    for ours, eager, true in zip(found(model, z), theirs, exact):
        assert (ours - true).norm() <= 1.5 * (eager - true).norm()


@pytest.mark.parametrize("order", ["patch compile", "compile patch", "patch compile unpatch"])
@torch.no_grad()
def test_compiled(order):
    torch._dynamo.reset()
    model, z = randomize(autoencoder()).decoder, torch.randn(1, 4, 8, 8)
    expected, run = model(z), model
    for step in order.split():
        if step == "compile":
            run = torch.compile(model, backend="eager", fullgraph=True)
        elif step == "patch":
            ldm_fused.patch(model, **BOTH)
        else:
            ldm_fused.unpatch(model)
        torch.testing.assert_close(run(z), expected, rtol=1e-4, atol=1e-4)
