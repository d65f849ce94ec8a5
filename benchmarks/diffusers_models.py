"""--model diffusers-vae and diffusers-unet: a real model of diffusers before and after ``ldm_fused.patch``.

Configurations are those of Stable Diffusion 1.5, written here, and weights are random: nothing is downloaded.
``python -m benchmarks.diffusers_models`` prints how long ``patch`` itself takes.
"""

import copy
import sys
import time
from typing import Callable, Dict, List

import torch
from torch import Tensor, nn

import ldm_fused
from benchmarks.providers import MEMORY_FORMATS, PROVIDERS, Contender, compiled, randomize_norms

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
TITLES = {
    "diffusers-vae": "diffusers' AutoencoderKL as Stable Diffusion 1.5 has it, encode and decode",
    "diffusers-unet": "diffusers' UNet2DConditionModel as Stable Diffusion 1.5 has it, one step",
}
PATCHES: Dict[str, Callable[[nn.Module], object]] = {
    "eager": lambda model: None,
    "ours": ldm_fused.patch,
    "again": ldm_fused.patch,
    "recompute": lambda model: ldm_fused.patch(model, recompute=True),
}


class Reconstruction(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).sample


class Step(Reconstruction):
    """One step of denoising, the time and the text fixed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        context = torch.randn(1, 77, model.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
        self.register_buffer("context", context)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, 500, self.context).sample


def make(name: str) -> nn.Module:
    try:
        from diffusers import AutoencoderKL, UNet2DConditionModel
    except ImportError:
        sys.exit(f"--model {name} needs diffusers: pip install diffusers")
    if name == "diffusers-vae":
        return Reconstruction(AutoencoderKL(**VAE))
    return Step(UNet2DConditionModel(**UNET))


def latent(resolution: int) -> Tensor:
    """What the UNet takes for a picture of that size."""
    sizes = (1, 4, resolution // 8, resolution // 8)
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(2))


def build(names: List[str], args, layout: str, dtype: torch.dtype) -> List[Contender]:
    """The model of each provider, all with the same Parameters; the compiled one is the model as it was."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = randomize_norms(make(args.model)).to(args.device, dtype, memory_format=MEMORY_FORMATS[layout])
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    contenders = []
    for name in names:
        own = copy.deepcopy(model, dict(shared))
        PATCHES.get(name, PATCHES["eager"])(own)
        contenders.append(Contender(name, compiled(own, PROVIDERS[name]), list(own.parameters())))
    return contenders


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
