"""benchmarks/plans.py times each plan once. On a GPU it does what is stood in for here."""

import contextlib
import types

import torch

import ldm_fused
from benchmarks import plans
from benchmarks.workloads import Workload


def test_every_plan_is_timed_once_and_the_chosen_one_first(monkeypatch):
    wanted, timed = [], []

    def plan(backward, batch, channels, spatial, groups, channels_last, itemsize, device):
        assert (backward, batch, channels, spatial, groups, channels_last, itemsize, device) == (
            False, 2, 64, 48, 32, True, 2, 0)
        two_passes, grid_teams, team, threads = wanted[-1]
        return ("two passes", 0, 0, 0) if two_passes else ("grid", min(grid_teams, 4), 0, 512) if grid_teams else (
            "cluster", 9, team or 2, threads or 256)

    monkeypatch.setattr(plans, "_C", types.SimpleNamespace(plan=plan, want_plan=lambda *each: wanted.append(each)))
    monkeypatch.setattr(plans, "calls", lambda *arguments: (None, None))
    monkeypatch.setattr(plans, "microseconds", lambda run, sets: timed.append(wanted[-1]) or len(timed))
    monkeypatch.setattr(plans.measure, "own_stream", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(plans.torch.cuda, "current_device", lambda: 0)
    found = plans.time_plans(Workload("custom", (2, 64, 6, 8)), "channels_last", "forward", torch.bfloat16)
    assert next(iter(found.items())) == (("cluster", 9, 2, 256), 1) and wanted[-1] == plans.BY_ESTIMATE
    assert len(timed) == len(found) == 1 + 1 + 9 + 4  # what is chosen; two passes; the other blocks and clusters; grids


def test_the_plans_that_are_wanted_are_those_of_the_op():
    assert len(set(plans.WANTED)) == len(plans.WANTED) == 24
    x = torch.randn(2, 64, 6, 8)
    expected = ldm_fused.group_norm_silu(x, 32)
    plans._C.want_plan(1, 0, 0, 0)  # a CPU has no plans
    try:
        assert torch.equal(ldm_fused.group_norm_silu(x, 32), expected)
    finally:
        plans._C.want_plan(*plans.BY_ESTIMATE)
