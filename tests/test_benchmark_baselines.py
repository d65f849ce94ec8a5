"""What benchmarks time beside ours on a GPU: Triton's two passes, the backward pass alone, ours twice; and the cases."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

from benchmarks import measure, providers, workloads  # noqa: E402
from benchmarks.workloads import Workload  # noqa: E402

SMALL = Workload("custom", (2, 20, 9, 7), groups=2)

# Triton looks at TRITON_INTERPRET when it is imported.
TRITON = """
import torch
from benchmarks import measure, providers
from benchmarks.workloads import Workload
for activation in ("silu", None):
    for layout in ("contiguous", "channels_last"):
        w = Workload("custom", (2, 20, 9, 7), groups=2, activation=activation)
        contenders, oracle = providers.op_contenders(w, ["eager", "triton"], "cpu", torch.float32, layout)
        inputs = measure.make_inputs(w.shape, layout, "training", "cpu", torch.float32)[0]
        inputs64 = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in inputs)
        truth = measure.results(oracle, "training", inputs64)
        eager, found = (measure.errors(measure.results(c, "training", inputs), truth) for c in contenders)
        measure.check(found, eager, "op", torch.float32)
print("right")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_two_passes_of_triton_are_right():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", TRITON], capture_output=True, text=True, env=environment)
    assert done.stdout == "right\n", done.stderr


@pytest.mark.parametrize("name", ["eager", "compile", "ours"])
def test_the_backward_pass_alone_has_the_gradients_of_each_input(name):
    """It runs again and again after one forward pass for each input; a compiled one, too."""
    with measure.compiled_for("backward"):
        (contender,), _ = providers.op_contenders(SMALL, [name], "cpu", torch.float32, "contiguous")
        sets = measure.make_inputs(SMALL.shape, "contiguous", "backward", "cpu", torch.float32, limit=2)
        calls, call = [], contender.call
        contender.call = lambda x: calls.append(x) or call(x)
        run = measure.runner(contender, "backward")
        found = [[run(*inputs) for inputs in sets] for _ in range(2)]
    assert len(calls) == len(sets) == 2
    for inputs, first, second in zip(sets, *found):
        expected = torch.autograd.grad(call(inputs[0]), [inputs[0], *contender.parameters], inputs[1])
        for a, b, c in zip(first, second, expected):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c)


def test_rounds_go_there_and_back(monkeypatch):
    order = []
    monkeypatch.setattr(measure.Turn, "measure", lambda turn, seconds: order.append(turn.note))
    monkeypatch.setattr(measure, "enough_rounds", lambda slowest: 2)
    monkeypatch.setattr(measure.Turn, "timing", lambda turn: None)

    def prepare(run, sets, mode, graphs):
        turn = measure.Turn({}, note=run)
        turn.times["wall"].append(0.0)
        return turn

    monkeypatch.setattr(measure, "prepare", prepare)
    measure.time_in_turn({"a": "A", "b": "B"}, [], "forward", 1.0)
    assert order == ["A", "B", "B", "A"]


def test_the_interval_of_a_median():
    timing = measure.Timing(device=measure.Measurement(1, [float(i) for i in range(101)], None), replayed=10)
    low, high = timing.interval("device")
    assert timing.seconds("device") == 5.0 and (low, high) == (4.0, 6.0) and timing.interval("wall") is None
    # By simulation of a skewed distribution: its median is inside 95 times in a hundred.
    generator, inside = torch.Generator().manual_seed(0), 0
    for _ in range(1000):
        times = torch.empty(40).exponential_(generator=generator).tolist()
        low, high = measure.Timing(wall=measure.Measurement(1, times, None)).interval("wall")
        inside += low <= 0.6931 <= high
    assert 920 < inside < 990


def test_a_sample_has_a_dozen_shapes_of_all_kinds():
    rows = list(workloads.sample())
    ops = [row for row in rows if row[0] == "op"]
    assert len(ops) == 12 * 4 + 4 * 4 and len(set(rows)) == len(rows)
    assert {mode for _, _, mode, *_ in ops} == {"forward", "backward"}
    suites = {"seed", "sd15-unet-512", "sdxl-unet-1024", "ldm-kl-f8-train-256", "vae-decode-1024", "video-vae"}
    assert {w.suite for _, w, *_ in ops} == suites
    assert all(w.has_block for level, w, *_ in rows if level == "block")
    assert {row[2] for row in rows if row[0] == "block"} == {"forward", "training"}
