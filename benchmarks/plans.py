#!/usr/bin/env python3
"""Times every plan of the op on a GPU: one read by blocks, clusters or grids of all sizes, and two passes.

    python benchmarks/plans.py [--seconds 60] [--dtype bfloat16] [--json plans.json]

Says of each case how long the plan takes that csrc/cuda/estimates.h chooses, and how long the fastest. The estimates'
numbers are fitted to what it writes into the JSON file. Times are of a CUDA graph's replay over inputs that fill L2
twice, the least of some.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from statistics import geometric_mean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import machine, measure, workloads  # noqa: E402
from ldm_fused import _C  # noqa: E402

MODES, LAYOUTS = ("forward", "backward"), ("contiguous", "channels_last")
BY_ESTIMATE = (0, 0, 0, 0)
# two_passes, grid_teams, team, threads: as csrc/cuda/device.h has them
WANTED = [BY_ESTIMATE, (1, 0, 0, 0),
          *((0, 0, team, threads) for team in (1, 2, 4, 8, 16) for threads in (256, 512)),
          *((0, teams, 0, 0) for teams in (1, 2, 3, 4, 6, 8, 11, 16, 22, 33, 44, 66))]  # fmt: skip
REPEAT = 5


def plan_of(w, layout, mode, itemsize):
    """(tier, teams, team, threads) as it is now wanted."""
    spatial = w.numel // w.shape[0] // w.shape[1]
    sizes = w.shape[0], w.shape[1], spatial, w.groups
    return _C.plan(mode == "backward", *sizes, layout == "channels_last", itemsize, torch.cuda.current_device())


def calls(w, layout, mode, dtype):
    """The op as a function, and its inputs in rotation."""
    weight, bias = (torch.randn(w.shape[1], device="cuda", dtype=dtype) for _ in range(2))
    op, arguments = torch.ops.ldm_fused, (w.groups, weight, bias, w.eps, w.activation is not None)
    sets = measure.make_inputs(w.shape, layout, mode, "cuda", dtype, limit=192)
    if mode == "forward":
        return lambda x: op.group_norm_act_inference(x, *arguments), sets
    sets = [(dy, x.detach(), *op.group_norm_act_training(x.detach(), *arguments)[1:]) for x, dy in sets]
    return lambda *inputs: op.group_norm_act_training_backward(*inputs, weight, bias, arguments[-1], True, True,
                                                               True), sets


def microseconds(run, sets):
    timer = measure.graph_timer(run, sets)
    timer.timeit(1)
    return 1e6 * min(timer.repeat(REPEAT, 1)) / len(sets)


@torch.no_grad()
def time_plans(w, layout, mode, dtype):
    """{plan: microseconds}, the chosen one first. One that the GPU refuses has its successor's time."""
    with measure.own_stream("cuda"):
        run, sets = calls(w, layout, mode, dtype)
        found = {}
        try:
            for wanted in WANTED:
                _C.want_plan(*wanted)
                plan = plan_of(w, layout, mode, dtype.itemsize)
                if plan not in found:
                    found[plan] = microseconds(run, sets)
        finally:
            _C.want_plan(*BY_ESTIMATE)
    return found


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seconds", type=float, default=60, help="start no case after so many")
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    p.add_argument("--json", type=Path)
    args = p.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("PyTorch sees no GPU here.")
    begun, dtype, results = time.monotonic(), getattr(torch, args.dtype), []
    environment = machine.describe("cuda")
    print(machine.headline(environment))
    cases = dict.fromkeys(workloads.by_call()[pick] for pick in workloads.SAMPLE)
    cases.update(dict.fromkeys(w for w in workloads.load() if w.activation and w.numel * dtype.itemsize < 1 << 29))
    for w, mode, layout in itertools.product(cases, MODES, LAYOUTS):
        if time.monotonic() - begun > args.seconds:
            break
        if layout not in w.layouts("both") or (mode == "backward" and not w.trained):
            continue
        plans = time_plans(w, layout, mode, dtype)
        chosen, best = next(iter(plans)), min(plans, key=plans.get)
        results.append(dict(shape=w.shape, layout=layout, mode=mode, dtype=args.dtype,
                            plans=[[*plan, round(us, 2)] for plan, us in plans.items()]))  # fmt: skip
        named = [f"{tier}, {teams} x {team} x {threads}: {plans[tier, teams, team, threads]:.1f} us"
                 for tier, teams, team, threads in (chosen, best)]  # fmt: skip
        print(f"{w.shape_text:<20} {layout:<14} {mode:<9} {named[0]:<40} fastest {named[1]}", flush=True)
        if args.json:
            args.json.write_text(json.dumps({"environment": environment, "results": results}) + "\n")
        torch.cuda.empty_cache()
    over = [result["plans"][0][-1] / min(plan[-1] for plan in result["plans"]) for result in results]
    print(f"plans: {len(over)} cases, the chosen one {geometric_mean(over):.3f} x the fastest in the geometric mean,"
          f" {max(over):.2f} x at worst")  # fmt: skip


if __name__ == "__main__":
    main()
