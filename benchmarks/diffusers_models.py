"""--model diffusers-*: real models of diffusers, with the interface of ``benchmarks.autoencoder``.

Configurations are written here, and weights are random: nothing is downloaded.
``python -m benchmarks.diffusers_models`` prints how long ``patch`` itself takes.
"""

import sys
import time

import torch
from torch import Tensor, nn

import ldm_fused

VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)
UNET = dict(
    block_out_channels=(320, 640, 1280, 1280),
    layers_per_block=2,
    cross_attention_dim=768,
    attention_head_dim=8,
    sample_size=64,
)
UNET_CHANNELS = 4
CONFIGURATIONS = {
    "diffusers-vae": VAE,
    "diffusers-flux-vae": {**VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
    "diffusers-unet": UNET,
}
TITLES = {
    "diffusers-vae": "diffusers' AutoencoderKL as Stable Diffusion 1.5 and XL have it",
    "diffusers-flux-vae": "diffusers' AutoencoderKL as FLUX has it",
    "diffusers-unet": "diffusers' UNet2DConditionModel as Stable Diffusion 1.5 has it, one step",
}


class Autoencoder(nn.Module):
    """diffusers' AutoencoderKL from tensor to tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.latent_channels = model, model.config.latent_channels

    def encode(self, x: Tensor) -> Tensor:
        return self.model.encode(x).latent_dist.mean

    def decode(self, z: Tensor) -> Tensor:
        return self.model.decode(z).sample

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).sample


class Step(nn.Module):
    """One step of denoising, the time and the text fixed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.latent_channels = model, UNET_CHANNELS
        context = torch.randn(1, 77, model.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
        self.register_buffer("context", context)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, 500, self.context).sample


def make(name: str) -> nn.Module:
    try:
        from diffusers import AutoencoderKL, UNet2DConditionModel
    except ImportError:
        sys.exit(f"--model {name} needs diffusers: pip install diffusers")
    if name == "diffusers-unet":
        return Step(UNet2DConditionModel(**UNET))
    return Autoencoder(AutoencoderKL(**CONFIGURATIONS[name]))


def seconds_to_patch(model: nn.Module) -> float:
    start = time.perf_counter()
    ldm_fused.patch(model)
    seconds = time.perf_counter() - start
    ldm_fused.unpatch(model)
    return seconds


def main() -> None:
    for name in TITLES:
        first, *others = [seconds_to_patch(model) for model in [make(name)] for _ in range(8)]
        print(f"patch({name}): {first:.2f} s at first, then {min(others):.2f} s (the fastest of {len(others)})")


if __name__ == "__main__":
    main()
