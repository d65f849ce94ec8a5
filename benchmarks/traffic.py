"""Counts the bytes that the CUDA kernels move, without a GPU, and compares them with the physical limit.

    python benchmarks/traffic.py [--device H200] [--suite all]

Each workload runs in the emulator (tests/emulator), which counts what the warps of all launches ask of global memory:
bytes, and the 32-byte sectors that hold them. Tensors of more than a million elements are made smaller for that, and
the device's multiprocessors fewer by the same factor; what they move at full size is then the plan's prediction, which
the count at the smaller size has to confirm. Nothing is said of caches: what one launch reads twice counts twice.

Byte model, in 16 bits, with B = bytes of x: the limit is 2 B forward (read x, write y) and 3 B backward (read x and dy,
write dx). All else is overhead and counts: second passes, partial results, statistics, parameters.
"""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import emulated  # noqa: E402
import torch  # noqa: E402
from oracle import LAYOUTS, laid_out  # noqa: E402

from benchmarks import workloads  # noqa: E402

LARGEST = 1_400_000  # elements emulated: seconds for all passes of one shape
AGREEMENT = 0.03  # by how much counts may differ from what the plan predicted
DTYPE = torch.bfloat16


@dataclass
class Moved:
    """Bytes moved by one direction of one call, at full size, and what was seen in the emulator."""

    limit: int
    planned: int
    tier: str
    counted_over_planned: float
    sector_efficiency: float

    @property
    def over_limit(self):
        return self.planned / self.limit


@dataclass
class Total:
    """Moved bytes and limits of many calls, each as often as its model makes it."""

    worst: float = 0.0
    moved: int = 0
    limit: int = 0
    efficiencies: list = field(default_factory=list)

    def add(self, moved, count):
        self.worst = max(self.worst, moved.over_limit)
        self.moved += count * moved.planned
        self.limit += count * moved.limit
        self.efficiencies.append(moved.sector_efficiency)

    @property
    def text(self):
        return f"worst {self.worst:.2f} x, weighted {self.moved / self.limit:.3f} x" if self.limit else "none"


def shrunk(shape):
    """The shape with its longest trailing axes halved until the emulator can run it, and by how much it is smaller."""
    batch, channels, *spatial = shape
    factor = 1
    while batch * channels * torch.Size(spatial).numel() > LARGEST and max(spatial) > 2:
        longest = spatial.index(max(spatial))
        factor *= 2
        spatial[longest] //= 2
    return (batch, channels, *spatial), factor


def measure(workload, layout, device):
    """Forward and backward of one workload: two ``Moved``."""
    full = laid_out(torch.empty(workload.shape, dtype=DTYPE, device="meta"), layout)
    limit = full.numel() * full.element_size()
    with emulated.device(device):
        plans = emulated.plan_forward(full, workload.groups), emulated.plan_backward(full, workload.groups)
    shape, factor = shrunk(workload.shape)
    x, dy = (laid_out(torch.randn(shape).to(DTYPE), layout) for _ in range(2))
    weight, bias = torch.randn(2, shape[1]).to(DTYPE)
    small = {**device, "multiprocessors": max(1, device["multiprocessors"] // factor)}
    silu = workload.activation == "silu"
    with emulated.device(small):
        small_plans = emulated.plan_forward(x, workload.groups), emulated.plan_backward(x, workload.groups)
        with emulated.traffic() as forward:
            _, mean, rstd = emulated.group_norm_act(x, workload.groups, weight, bias, workload.eps, silu, None, None,
                                                    None, None)
        with emulated.traffic() as backward:
            emulated.group_norm_act_backward(dy, x, mean, rstd, weight, bias, silu, None, None, None,
                                             [True, True, True, False, False, False])
    results = []
    for passes, plan, small_plan, launches in zip((2, 3), plans, small_plans, (forward, backward)):
        moved = sum(launch["bytes_read"] + launch["bytes_written"] for launch in launches)
        sectors = sum(launch["sectors_read"] + launch["sectors_written"] for launch in launches)
        results.append(Moved(passes * limit, bytes_of(plan), plan["tier"], moved / bytes_of(small_plan),
                             moved / (32 * sectors)))
    return results


def bytes_of(plan):
    return plan["bytes_read"] + plan["bytes_written"]


def distinct(chosen):
    """The workloads without those that move the same bytes, each with the counts of all of them: forward, backward."""
    counts = {}
    for w in chosen:
        key = (w.shape, w.groups)
        first, forward, backward = counts.get(key, (w, 0, 0))
        counts[key] = first, forward + w.count, backward + w.count * w.trained
    return list(counts.values())


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=emulated.DEVICES, default="H200")
    parser.add_argument("--suite", choices=["all", *workloads.SUITES], default="all")
    options = parser.parse_args(arguments)

    device = emulated.DEVICES[options.device]
    totals = {(layout, way): Total() for layout in (*LAYOUTS, "both") for way in ("forward", "backward")}
    wrong = []
    print(f"Bytes moved over the limit on an emulated {options.device}, {str(DTYPE).removeprefix('torch.')}\n")
    print(f"{'shape':<20}{'layout':<15}{'forward':>9}{'backward':>10}{'sectors':>9}{'count/plan':>12}  tier")
    for workload, *counts in distinct(workloads.select(options.suite)):
        for layout in workload.layouts("both"):
            moved = measure(workload, layout, device)
            for way, m, count in zip(("forward", "backward"), moved, counts):
                if count:
                    totals[layout, way].add(m, count)
                    totals["both", way].add(m, count)
            agreement = max((m.counted_over_planned for m in moved), key=lambda ratio: abs(ratio - 1))
            if abs(agreement - 1) > AGREEMENT:
                wrong.append(f"{workload.shape_text} {layout}")
            forward, backward = moved
            print(f"{workload.shape_text:<20}{layout:<15}{forward.over_limit:>7.2f} x"
                  f"{f'{backward.over_limit:.2f} x' if counts[1] else '':>10}"
                  f"{100 * min(m.sector_efficiency for m in moved):>7.0f} %{agreement:>12.3f}  {forward.tier}",
                  flush=True)
    print()
    for layout in LAYOUTS:
        print(f"{layout}: forward {totals[layout, 'forward'].text}; backward {totals[layout, 'backward'].text}")
    for case in wrong:
        print(f"The plan predicts other bytes than were counted for {case}.")
    both = totals["both", "forward"], totals["both", "backward"]
    efficiency = min(both[0].efficiencies + both[1].efficiencies)
    print(f"traffic: forward {both[0].text}; backward {both[1].text}; sector efficiency worst {100 * efficiency:.0f} %")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
