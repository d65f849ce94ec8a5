"""Which way of nearest upsampling and its 3x3 convolution is the fastest here: ``python benchmarks/upsample.py``.

A row is one upsampling. Its columns are the plain way's time in milliseconds, and how many times as fast the ways of
``ldm_fused.patching.upsample`` are, the making of their weights included: one transposed convolution, and four
convolutions, one for each phase. Rounds are interleaved, and the fastest of each way counts: on a machine that does
something else too, the ratios are worth more than the times. Each result is compared with the plain one first.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.providers import MEMORY_FORMATS  # noqa: E402
from ldm_fused.patching import upsample  # noqa: E402

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # of the largest number


def plain(x, weight, bias, doubled):
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


WAYS = {"plain": plain, "transposed": upsample.transposed, "phases": upsample.by_phases}


def seconds(way, arguments, training, synchronize):
    synchronize()
    start = time.perf_counter()
    with torch.set_grad_enabled(training):
        y = way(*arguments, (True, True))
    if training:
        torch.autograd.grad(y, arguments, torch.ones_like(y))
    synchronize()
    return time.perf_counter() - start


def row(channels, size, dtype, layout, training, device, rounds):
    generator = torch.Generator().manual_seed(0)

    def random(*sizes, scale=1.0):
        t = (torch.randn(*sizes, generator=generator) * scale).to(device, dtype)
        return t.contiguous(memory_format=MEMORY_FORMATS[layout]) if t.dim() == 4 else t

    arguments = [t.requires_grad_(training) for t in (random(1, channels, size, size), random(
        channels, channels, 3, 3, scale=1 / (3 * channels**0.5)), random(channels))]
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    with torch.no_grad():
        expected = plain(*arguments, None)
        for name, way in WAYS.items():
            error = (way(*arguments, (True, True)) - expected).abs().max() / expected.abs().max()
            if error > TOLERANCE[dtype]:
                sys.exit(f"{name} is wrong: {error:.1e} of the largest number, {channels} channels, {size}, {dtype}")
    best = dict.fromkeys(WAYS, float("inf"))
    for _ in range(rounds):
        for name, way in WAYS.items():
            best[name] = min(best[name], seconds(way, arguments, training, synchronize))
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--channels", nargs="+", type=int, default=[128, 256, 512])
    parser.add_argument("--sizes", nargs="+", type=int, default=[32, 64, 128], help="height and width before")
    parser.add_argument("--training", action="store_true", help="forward and backward")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{'dtype':9} {'layout':13} {'channels':>8} {'size':>5} {'plain, ms':>10} {'transposed':>11} {'phases':>7}")
    for dtype in args.dtypes:
        for layout in ("contiguous", "channels_last"):
            for channels in args.channels:
                for size in args.sizes:
                    best = row(channels, size, getattr(torch, dtype), layout, args.training, args.device, args.rounds)
                    ratios = [best["plain"] / best[name] for name in ("transposed", "phases")]
                    print(f"{dtype:9} {layout:13} {channels:8} {size:5} {1e3 * best['plain']:10.1f} {ratios[0]:9.2f} x "
                          f"{ratios[1]:5.2f} x", flush=True)


if __name__ == "__main__":
    main()
