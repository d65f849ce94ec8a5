#!/usr/bin/env python3
"""Trains the LDM autoencoder on a folder of pictures, with ldm_fused.

    python examples/train_autoencoder.py                              # the pictures that scikit-image ships
    python examples/train_autoencoder.py --pictures FOLDER            # your own
    python examples/train_autoencoder.py --resume --steps 4000        # goes on where it ended, or was interrupted
    python examples/train_autoencoder.py --eager --out build/eager    # the reference blocks, to compare

`--out` has the checkpoint, a grid of pictures and their reconstructions, and the curve of the loss, all brought up to
date while it trains. The loss is the absolute error, squared below 0.1, and a little of the Kullback-Leibler
divergence; LDM adds a perceptual and an adversarial one.
"""

import argparse
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Callable, List

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]
sys.path.append(str(HERE.parent))

import pictures  # noqa: E402

import ldm_fused  # noqa: E402
from benchmarks.autoencoder import AutoencoderKL  # noqa: E402
from benchmarks.providers import NormSwish  # noqa: E402
from benchmarks.report import Progress  # noqa: E402

KL_WEIGHT = 1e-6
# What a run is: it cannot be resumed with others. All the rest may change, --eager and --dtype too.
SETTINGS = ("channels", "multipliers", "blocks", "resolution", "batch", "lr", "seed")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    add = p.add_argument_group("what").add_argument
    add("--pictures", metavar="PATH", help="a folder or a file: what Pillow reads, or .npy")
    add("--out", type=Path, default=Path("build/autoencoder"), metavar="DIR", help="for what is written (%(default)s)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--steps", type=int, default=1000, metavar="N", help="in all, those before --resume too (%(default)s)")
    add("--save-every", type=int, default=100, metavar="N", help="steps (%(default)s)")
    add("--batch", type=int, default=4, metavar="N", help="crops a step (%(default)s)")
    add("--resolution", type=int, default=256 if cuda else 64, metavar="P", help="of crops (%(default)s)")
    add("--channels", type=int, default=128 if cuda else 32, help="of the first level; LDM has 128 (%(default)s)")
    add("--multipliers", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 4, 4], metavar="A,B",
        help="of the channels, a level each; between levels the resolution halves (1,2,4,4)")  # fmt: skip
    add("--blocks", type=int, default=2, metavar="N", help="a level (%(default)s)")
    add("--lr", type=float, default=5e-4, help="Adam's (%(default)s)")
    add("--seed", type=int, default=0, help="of weights, crops and noise (%(default)s)")

    add = p.add_argument_group("how").add_argument
    add("--eager", action="store_true", help="the reference blocks, not ldm_fused")
    add("--dtype", choices=["float32", "bfloat16", "float64"], default="float32",
        help="bfloat16: by autocast, with weights in float32")  # fmt: skip
    add("--fold-upsample", action="store_true", help="nearest upsampling and its convolution as one")
    add("--channels-last", action="store_true", help="weights and activations in channels_last")
    add("--device", default="cuda" if cuda else "cpu", help="(%(default)s)")
    return p


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    smallest = 2 ** (len(args.multipliers) - 1)
    if args.resolution % smallest or args.channels % 32 or min(args.resolution, args.channels, args.batch) < 1:
        sys.exit(f"--resolution is a multiple of {smallest} and --channels one of 32, for GroupNorm has 32 groups")
    if args.eager and args.fold_upsample:
        sys.exit("--fold-upsample is ldm_fused's: leave out --eager")
    pictures.pillow()  # or it would be missed when the first picture is drawn
    shown = pictures.load(args.pictures)
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args)
    before = len(run.losses)
    print(f"{len(shown)} pictures, {sum(p.numel() for p in run.model.parameters()) / 1e6:.1f} million parameters, "
          f"steps {before + 1} to {args.steps}, on {args.device} in {args.dtype}")  # fmt: skip
    start = time.monotonic()
    try:
        run.train(shown, lambda: draw(run, shown))
    except KeyboardInterrupt:
        run.save()
        print(f"\ninterrupted after step {len(run.losses)}: --resume goes on", file=sys.stderr)
        return 130
    decibels = draw(run, shown)
    rate = (len(run.losses) - before) / (time.monotonic() - start)
    print(f"loss {mean(run.losses[:20]):.4f} -> {mean(run.losses[-20:]):.4f}, reconstructions {decibels:.1f} dB PSNR, "
          f"{rate:.2f} steps a second")  # fmt: skip
    print(f"{args.out}: checkpoint.pt, reconstructions.png, loss.png")
    return 0


def mean(values: List[float]) -> float:
    return sum(values) / len(values) if values else math.nan


class Run:
    """A model in training, new or resumed."""

    def __init__(self, args) -> None:
        self.args, self.losses = args, []
        torch.manual_seed(args.seed)
        self.model = build(args)
        self.optimizer = torch.optim.Adam(self.model.parameters(), args.lr, betas=(0.5, 0.9), fused=True)
        if args.resume:
            self.load()
        elif self.checkpoint.exists():
            sys.exit(f"{self.checkpoint} is a run's: --resume goes on with it, another --out begins anew")

    @property
    def checkpoint(self) -> Path:
        return self.args.out / "checkpoint.pt"

    def train(self, shown: List[Tensor], saved: Callable[[], object] = lambda: None) -> None:
        """To the last step; `saved` is called after each checkpoint."""
        args = self.args
        progress = Progress(args.steps)
        progress.done = begin = len(self.losses)
        start = time.monotonic()
        for step in range(begin, args.steps):
            self.losses.append(self.step(shown, step))
            progress.step()
            left = (time.monotonic() - start) / (step + 1 - begin) * (args.steps - step - 1)
            progress.show(f"loss {mean(self.losses[-20:]):.4f}, {left // 60:.0f}:{left % 60:02.0f} left")
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                self.save()
                saved()
        progress.close()

    def step(self, shown: List[Tensor], step: int) -> float:
        """Crops and noise depend on the seed and the step alone, so a resumed run takes those that it would have."""
        args = self.args
        generator = torch.Generator().manual_seed(1_000_003 * args.seed + step)
        dtype = torch.float64 if args.dtype == "float64" else torch.float32
        x = pictures.crops(shown, args.batch, args.resolution, generator).to(args.device, dtype)
        with autocast(args):
            mean, log_variance = self.model.moments(x)
            noise = torch.randn(mean.shape, generator=generator).to(mean)
            y = self.model.decode(mean + torch.exp(0.5 * log_variance) * noise)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).to(dtype).mean()
        loss = F.smooth_l1_loss(y.to(dtype), x, beta=0.1) + KL_WEIGHT * divergence
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        dtype = torch.float64 if self.args.dtype == "float64" else torch.float32
        with autocast(self.args):
            return self.model(x.to(self.args.device, dtype)).float().cpu()

    def settings(self) -> dict:
        return {name: getattr(self.args, name) for name in SETTINGS}

    def save(self) -> None:
        """The file is replaced as a whole: a killed run leaves the last one."""
        part = self.checkpoint.with_suffix(".part")
        torch.save({"settings": self.settings(), "losses": self.losses, "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict()}, part)
        os.replace(part, self.checkpoint)

    def load(self) -> None:
        if not self.checkpoint.exists():
            sys.exit(f"--resume: there is no {self.checkpoint}")
        found = torch.load(self.checkpoint, map_location=self.args.device, weights_only=True)
        for name, value in self.settings().items():
            if found["settings"][name] != value:
                sys.exit(f"--resume: {self.checkpoint} has --{name} {found['settings'][name]}, not {value}")
        self.losses = found["losses"]
        self.model.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])


def build(args) -> nn.Module:
    """The reference model; without --eager all that ldm_fused can do for it."""
    dtype = torch.float64 if args.dtype == "float64" else torch.float32
    model = AutoencoderKL(ldm_fused.reference.ResnetBlock, NormSwish, ch=args.channels, ch_mult=args.multipliers,
                          num_res_blocks=args.blocks).to(args.device, dtype)
    memory_format = torch.channels_last if args.channels_last else None
    if not args.eager:
        ldm_fused.patch(model, fold_upsample=args.fold_upsample, memory_format=memory_format)
    elif memory_format is not None:
        model.to(memory_format=memory_format)
    return model


def autocast(args):
    if args.dtype != "bfloat16":
        return nullcontext()
    return torch.autocast(torch.device(args.device).type, dtype=torch.bfloat16)


def draw(run: Run, shown: List[Tensor]) -> float:
    """Both PNGs; returns the reconstructions' PSNR in decibels."""
    x = torch.cat([pictures.middle(picture, run.args.resolution) for picture in shown[:8]])
    y = torch.cat([run.reconstruct(each[None]) for each in x]).clamp(-1, 1)
    decibels = -10 * math.log10(max((y - x).square().mean().item() / 4, 1e-12))
    how = "reference" if run.args.eager else "ldm_fused"
    what = f"{len(run.losses)} steps, {run.args.dtype}, {how}"
    pictures.save_grid(run.args.out / "reconstructions.png", list(zip(x, y)), ["picture", "reconstruction"],
                       f"LDM autoencoder after {what}: {decibels:.1f} dB PSNR")
    pictures.save_curve(run.args.out / "loss.png", run.losses, f"Loss of the LDM autoencoder, {what}")
    return decibels


if __name__ == "__main__":
    sys.exit(main())
