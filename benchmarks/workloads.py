"""Every GroupNorm call of real diffusion models, read from workloads.json beside this file."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Optional, Tuple

PROVIDERS = ("eager", "F.silu", "compile", "cooperative", "triton", "ours", "recompute", "again")
# How --model runs a model: as it is, and patched, with what.
WAYS = (
    "eager",
    "channels_last",
    "compile",
    "patch",
    "patch+layout",
    "patch+fold",
    "patch+both",
    "patch+both+graph",
    "patch+both+compile",
    "compile+patch+both",
    "patch+recompute",
    "again",
)
# Not run unless they are asked for.
ON_REQUEST = ("cooperative", "triton", "recompute", "again")
WORKLOADS = Path(__file__).with_name("workloads.json")

# What each suite is, for --list.
SUITES = {
    "seed": "two blocks of the LDM autoencoder: many small images, and one large",
    "sd15-unet-512": "Stable Diffusion 1.5's UNet at 512 pixels, with guidance (batch 2)",
    "sdxl-unet-1024": "SDXL's UNet at 1024 pixels, with guidance (batch 2)",
    "vae-decode-512": "the SD autoencoder's decoder at 512 pixels",
    "vae-encode-512": "the SD autoencoder's encoder at 512 pixels",
    "vae-decode-1024": "the SDXL/FLUX autoencoder's decoder at 1024 pixels",
    "vae-encode-1024": "the SDXL/FLUX autoencoder's encoder at 1024 pixels",
    "ldm-kl-f8-train-256": "training the LDM kl-f8 autoencoder at 256 pixels (batch 4)",
    "video-vae": "video autoencoders, 5-D",
}

# Suites of single calls; the others hold every call of a model, as often as it makes them.
SAMPLES = ("seed", "video-vae")

# What people train; of the rest only the forward pass matters.
TRAINED = ("seed", "sd15-unet-512", "sdxl-unet-1024", "ldm-kl-f8-train-256", "custom")

# Run when nothing is chosen, in this order: small, middling and large groups, for two minutes on two CPU cores.
DEFAULT = (
    ("op", "seed", (80, 256, 8, 8)),
    ("block", "seed", (80, 256, 8, 8)),
    ("op", "seed", (1, 128, 256, 256)),
    ("op", "sd15-unet-512", (2, 1280, 8, 8)),
    ("op", "sd15-unet-512", (2, 320, 64, 64)),
)
# A GPU has time for more.
DEFAULT_CUDA = DEFAULT + (
    ("block", "seed", (1, 128, 256, 256)),
    ("op", "sdxl-unet-1024", (2, 640, 64, 64)),
    ("op", "ldm-kl-f8-train-256", (4, 512, 64, 64)),
)


# What --sample times: calls of all sizes from every kind of model, the most telling first.
SAMPLE = (
    ("vae-decode-1024", (1, 128, 1024, 1024)),
    ("sd15-unet-512", (2, 320, 64, 64)),
    ("ldm-kl-f8-train-256", (4, 128, 256, 256)),
    ("sdxl-unet-1024", (2, 640, 64, 64)),
    ("vae-decode-1024", (1, 512, 128, 128)),
    ("seed", (80, 256, 8, 8)),
    ("vae-decode-1024", (1, 256, 512, 512)),
    ("sdxl-unet-1024", (2, 1280, 32, 32)),
    ("sd15-unet-512", (2, 1280, 16, 16)),
    ("ldm-kl-f8-train-256", (4, 512, 64, 64)),
    ("video-vae", (1, 128, 20, 256, 256)),
    ("sdxl-unet-1024", (2, 960, 128, 128)),
)
SAMPLE_FLOAT32 = SAMPLE[:3] + SAMPLE[5:6]
SAMPLE_BLOCKS = (SAMPLE[0], SAMPLE[6], ("vae-decode-1024", (1, 512, 256, 256)), SAMPLE[4])


@dataclass(frozen=True)
class Workload:
    """One GroupNorm call: its input's shape, its arguments, and how often a forward pass of the model makes it."""

    suite: str
    shape: Tuple[int, ...]
    groups: int = 32
    eps: float = 1e-6
    activation: Optional[str] = "silu"
    count: int = 1

    @property
    def call(self) -> Tuple:
        """What is called; two suites may call the same."""
        return self.shape, self.groups, self.eps, self.activation

    @property
    def numel(self) -> int:
        product = 1
        for size in self.shape:
            product *= size
        return product

    @property
    def shape_text(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def trained(self) -> bool:
        return self.suite in TRAINED

    @property
    def has_block(self) -> bool:
        """A ResNet block works on images, and activates after its norms."""
        return len(self.shape) == 4 and self.activation == "silu"

    def layouts(self, wanted: str) -> List[str]:
        """The memory formats of `wanted` ("contiguous", "channels_last" or "both") that this shape has."""
        known = ["contiguous", "channels_last"] if len(self.shape) in (4, 5) else ["contiguous"]
        return [layout for layout in known if wanted in (layout, "both")]


def load() -> List[Workload]:
    """All workloads, in the file's order."""
    rows = json.loads(WORKLOADS.read_text())
    return [Workload(**{**row, "shape": tuple(row["shape"])}) for row in rows]


def default(device: str) -> List[Tuple[str, Workload]]:
    """("op" or "block", workload) for each case run when nothing is chosen, the most telling first."""
    picks, known = DEFAULT_CUDA if device == "cuda" else DEFAULT, by_call()
    return [(level, known[suite, shape]) for level, suite, shape in picks]


def by_call() -> Dict[Tuple, Workload]:
    return {(w.suite, w.shape): w for w in reversed(load()) if w.activation == "silu"}


def sample() -> Iterator[Tuple[str, Workload, str, str, str]]:
    """(level, workload, mode, layout, dtype) of each case of --sample."""
    known = by_call()

    def ops(picks, dtype):
        for pick, mode, layout in itertools.product(picks, ("forward", "backward"), ("contiguous", "channels_last")):
            yield "op", known[pick], mode, layout, dtype

    yield from ops(SAMPLE, "bfloat16")
    for pick, mode in itertools.product(SAMPLE_BLOCKS, ("forward", "training")):
        yield "block", known[pick], mode, "channels_last", "bfloat16"
    yield from ops(SAMPLE_FLOAT32, "float32")


def select(suite: str) -> List[Workload]:
    """The workloads of one suite, or of all."""
    return [w for w in load() if suite in (w.suite, "all")]


def listing(workloads: Iterable[Workload]) -> str:
    """The suites and their shapes, as --list prints them."""
    lines, suite = [], None
    for w in workloads:
        if w.suite != suite:
            suite = w.suite
            modes = "forward and training" if w.trained else "forward"
            lines += ["", f"{suite}: {SUITES[suite]} ({modes})"]
        act = w.activation or "no activation"
        lines.append(f"  {w.count:3d} x {w.shape_text:<20} {w.groups} groups, eps {w.eps:g}, {act}")
    return "\n".join(lines[1:])
