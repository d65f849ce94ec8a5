"""MONAI's autoencoder and diffusion UNet, in one to three dimensions."""

import pytest
import torch
from monai.networks.nets.autoencoderkl import AEKLResBlock, AutoencoderKL
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet, DiffusionUNetResnetBlock
from support import check, randomize

import ldm_fused

SIZES = {1: (16,), 2: (16, 8), 3: (8, 4, 4)}


@pytest.mark.parametrize("dims", [2, 3])
def test_autoencoder(dims):
    model = AutoencoderKL(spatial_dims=dims, in_channels=1, out_channels=1, channels=(16, 32), num_res_blocks=1,
                          attention_levels=(False, False), latent_channels=2, norm_num_groups=8)
    patched, run = check(model, lambda m, x: m.reconstruct(x), [torch.randn(1, 1, *SIZES[dims])], fused=20)
    assert run.share == 1 and not patched.skipped


@pytest.mark.parametrize("dims", [2, 3])
def test_unet(dims):
    model = DiffusionModelUNet(spatial_dims=dims, in_channels=1, out_channels=1, num_res_blocks=1, channels=(16, 32),
                               attention_levels=(False, True), norm_num_groups=8, num_head_channels=8)
    patched, run = check(model, lambda m, x, t: m(x, t), [torch.randn(1, 1, *SIZES[dims]), torch.tensor([7])], fused=15)
    assert run.share == 1 and not patched.skipped and "out.0" in [site.name for site in run.sites]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("out_channels", [32, 64])
def test_autoencoder_block(out_channels, dims):
    block = AEKLResBlock(dims, 32, 8, 1e-6, out_channels)
    patched, run = check(block, lambda b, x: b(x), [torch.randn(2, 32, *SIZES[dims])], fused=2, strict=True)
    assert run.share == 1


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("options", [dict(), dict(out_channels=64), dict(up=True), dict(down=True)], ids=str)
def test_unet_block(options, dims):
    block = DiffusionUNetResnetBlock(dims, 32, 24, norm_num_groups=8, **options)
    patched, run = check(block, lambda b, x, t: b(x, t), [torch.randn(2, 32, *SIZES[dims]), torch.randn(2, 24)],
                         fused=2, strict=True)
    assert run.share == 1


@pytest.mark.parametrize("block,arguments", [
    (lambda: AEKLResBlock(3, 32, 8, 1e-6, 64), (torch.randn(1, 32, 4, 4, 4),)),
    (lambda: DiffusionUNetResnetBlock(2, 32, 24, norm_num_groups=8), (torch.randn(2, 32, 4, 4), torch.randn(2, 24)))],
    ids=["AEKLResBlock", "DiffusionUNetResnetBlock"])
def test_a_hooked_norm_falls_back(block, arguments):
    block = randomize(block()).double()
    block.norm1.register_forward_hook(lambda module, args, output: 2 * output)
    arguments = [t.double() for t in arguments]
    expected = block(*arguments)
    ldm_fused.patch(block)
    torch.testing.assert_close(block(*arguments), expected)
    assert ldm_fused.report(block).fallbacks == {"it has hooks": 1} and ldm_fused.report(block).fused == 1
