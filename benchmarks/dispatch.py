"""What a call costs before and behind the kernels, on small CPU tensors, without a GPU.

    python benchmarks/dispatch.py [--rounds 40]

Microseconds of the thread's own time a call (what other programs take is not counted), the minimum and the median of
all rounds, in which the contenders take turns. "CUDA's way" is the way that a CUDA tensor takes: the same Python, and the operators of
csrc/cuda, launchers included, built by tests/emulator for CPU tensors with kernels that do nothing. So it checks,
allocates (by the CPU's allocator), plans and launches (into a stand-in for the CUDA runtime, which checks the launch
and returns; a launch on a GPU costs the host 2 us and more). The others compute what they say on this CPU.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
if "emulated" not in sys.modules:
    os.environ["LDM_FUSED_EMULATOR_FLAGS"] = "-fno-sanitize=thread"  # not watched, which takes time

import emulated  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import ldm_fused  # noqa: E402
from benchmarks import machine  # noqa: E402
from ldm_fused import functional, ops  # noqa: E402

SHAPES = [(1, 32, 1, 2), (1, 320, 8, 8), (2, 1280, 8, 8)]
GROUPS = 32
NO_DEVICE = -1  # for which an answer is kept, as there would be for a device
OPS = ("group_norm_act_training", "group_norm_act_training_backward", "group_norm_act_inference")
ON_THE_CPU = {name: getattr(ops, name) for name in OPS}


def cudas_ops():
    """The same by the emulator, which is compiled where this is called first."""
    return {name: getattr(emulated, name) for name in OPS}


def training(f):
    """A function that calls f and computes the gradients of all its arguments."""
    def step(x, weight, bias):
        y = f(x, weight, bias)
        y.backward(torch.ones_like(y))
        x.grad = weight.grad = bias.grad = None

    return step


def ours(x, weight, bias):
    return ldm_fused.group_norm_silu(x, GROUPS, weight, bias)


def cudas_way(x, weight, bias):
    x.is_cuda, torch.is_autocast_enabled("cuda"), ops.has_cuda_code(NO_DEVICE)  # what is asked of a CUDA tensor besides
    return functional.group_norm_silu(x, GROUPS, weight, bias)


def group_norm(x, weight, bias):
    return F.group_norm(x, GROUPS, weight, bias)


def group_norm_and_silu(x, weight, bias):
    return F.silu(F.group_norm(x, GROUPS, weight, bias))


CONTENDERS = {"F.group_norm": group_norm, "F.silu(F.group_norm)": group_norm_and_silu, "ours": ours,
              "ours, CUDA's way": cudas_way}


def microseconds(f, arguments, calls):
    start = time.thread_time()
    for _ in range(calls):
        f(*arguments)
    return (time.thread_time() - start) / calls * 1e6


def use(found):
    """Ours goes through these ops."""
    for name in OPS:
        setattr(ops, name, found[name])


def measure(shape, trains, rounds, calls):
    """{contender: (minimum, median)}."""
    x = torch.randn(shape, requires_grad=trains)
    arguments = x, torch.ones(shape[1], requires_grad=trains), torch.zeros(shape[1], requires_grad=trains)
    taken = {name: [] for name in CONTENDERS}
    for turn in range(rounds + 1):  # the first one warms up
        for name, f in CONTENDERS.items():
            use(cudas_ops() if f is cudas_way else ON_THE_CPU)
            try:
                with torch.set_grad_enabled(trains):
                    found = microseconds(training(f) if trains else f, arguments, calls)
            finally:
                use(ON_THE_CPU)
            if turn > 0:
                taken[name].append(found)
    return {name: (min(times), statistics.median(times)) for name, times in taken.items()}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--rounds", type=int, default=40)
    p.add_argument("--calls", type=int, default=200, help="of one contender, in a round")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    ops._devices_with_code[NO_DEVICE] = True
    print(machine.headline(machine.describe("cpu")))
    print(f"{'':<28}{'':<10}" + "".join(f"{name:>24}" for name in CONTENDERS))
    with emulated.device(emulated.DEVICES["H200"]), emulated.kernels_that_do_nothing():
        for trains in (False, True):
            for shape in SHAPES:
                found = measure(shape, trains, args.rounds, args.calls)
                row = "".join(f"{least:>15.1f} {median:>8.1f}" for least, median in found.values())
                print(f"{'x'.join(map(str, shape)):<28}{'training' if trains else 'no grad':<10}{row}", flush=True)
        for shape in SHAPES:
            plan = emulated._library.time_plan((shape[0], shape[1], shape[2] * shape[3]), GROUPS, 10000)
            print(f"{'x'.join(map(str, shape)):<28}a plan, of which each pass makes one: {plan:.2f} us")


if __name__ == "__main__":
    main()
