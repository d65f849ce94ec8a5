"""tools/time_model.py: its terms by hand, and a prediction for everything."""

import json
import re

import emulated
import pytest
import torch

from benchmarks import workloads
from benchmarks.workloads import Workload
from tools import element_costs, time_model
from tools.devices import DEVICES, GPU
from tools.element_costs import Kernel, Phase
from tools.time_model import Machine, Terms

# A cycle is a nanosecond: 128 instructions and 16 MUFU operations of each of 10 multiprocessors, and 100 bytes of all.
PLAIN = GPU("plain", 10, 1e9, 100e9)
PROPERTIES = dict(emulated.DEVICES["H200"], multiprocessors=10)
NOTHING = {"launch": 0, "wait": 0, "hidden_wait": 0, "cluster_wait": 0}
PHASES = ("copy", "statistics", "apply", "sums", "dx")


def kernel(registers=32, **phases):
    return Kernel(registers, {name: phases.get(name, Phase()) for name in PHASES})


def plan_of(tier, **changes):
    """1000 elements in 16 bits for each of 10 blocks of a warp, read and written once."""
    residence = dict(columns=False, vector=8, width=1, items=10, team=1, teams=10, threads=32, chunk=125, rounds=1,
                     steps=4, slots=4, kept=4, held=0, shared_bytes=100 << 10)
    residence.update(changes)
    moved = 2000 * residence["items"] * residence["team"]
    return dict(tier=tier, resident=True, residence=residence, bytes_read=moved, bytes_written=moved)


def terms_of(plan, costs=kernel(), way="forward", estimates=NOTHING):
    r = plan["residence"]
    names = [f"resident_{way}<BFloat16, BFloat16, 8, false, {grid}>" for grid in ("false", "true")]
    return time_model.time_of(PLAIN, PROPERTIES, plan, torch.Size([1, r["items"] * r["team"], 1000]), way, "bfloat16",
                              dict.fromkeys(names, costs), {**NOTHING, **estimates})


@pytest.fixture
def no_latency(monkeypatch):
    for name in ("LATENCY", "BLOCK_WAIT", "L2_TRIP", "CHAIN"):
        monkeypatch.setattr(time_model, name, 0)


@pytest.mark.parametrize("tier", ["block", "cluster", "grid"])
def test_what_is_bound_by_bytes_takes_their_time_at_copy_bandwidth_and_a_launch(tier, no_latency):
    found = terms_of(plan_of(tier), estimates={"launch": 2000})
    assert found == {"bytes": 40_000 / 100, "launch": 2000, **{name: 0 for name in found if name not in
                                                                ("bytes", "launch")}}
    assert found.binds == "launch" and terms_of(plan_of(tier)).binds == "bytes"


def test_what_is_bound_by_issue_takes_its_instructions():
    machine = Machine(PLAIN, NOTHING)
    issue = machine.compute(Phase(instructions=20, elements=32), elements=12_800, warps=64)
    assert issue == Terms(issue=12_800 * 20 / 128)
    assert machine.compute(Phase(instructions=8, mufu=2, elements=32), 12_800, 64) == Terms(MUFU=12_800 * 2 / 16)


def test_few_warps_wait_for_chains_of_dependent_instructions():
    machine = Machine(PLAIN, NOTHING)
    turns = 10  # of each lane of a warp, 32 elements each
    side_by_side = machine.compute(Phase(2, 0, 32, in_a_row=1), 32 * 32 * turns, warps=1)
    assert side_by_side == Terms(chain=turns * (32 * 2 + time_model.CHAIN))
    in_a_row = machine.compute(Phase(2, 0, 32, in_a_row=32), 32 * 32 * turns, warps=1)
    assert in_a_row == Terms(chain=turns * 32 * time_model.CHAIN)
    assert machine.compute(Phase(2, 0, 32, in_a_row=1), 32 * 32 * turns, warps=64).binds == "issue"


def test_a_block_alone_computes_while_nothing_moves(no_latency):
    costs = kernel(statistics=Phase(128, 0, 1000), apply=Phase(1280, 0, 1000))
    found = terms_of(plan_of("block", threads=1024, shared_bytes=1 << 10), costs)
    assert found.time == 200 + 1000 + 10_000  # loads, the reduction, and the stores beside the longer application


def test_segments_let_the_reduction_begin_before_all_is_loaded(no_latency):
    costs = kernel(statistics=Phase(12.8, 0, 1000))  # 100 ns
    options = dict(threads=1024, shared_bytes=1 << 10)
    assert terms_of(plan_of("block", **options), costs).time == 400 + 100
    assert terms_of(plan_of("block", segment=1, **options), costs).time == 400 + 100 / 4


def test_another_wave_of_blocks_costs_what_one_block_takes_alone(no_latency):
    one, two = (terms_of(plan_of("block", items=items, shared_bytes=200 << 10), estimates=NOTHING)
                for items in (10, 20))
    assert two.time == 2 * one.time
    more = terms_of(plan_of("block", items=11, shared_bytes=200 << 10), kernel(apply=Phase(1280, 0, 1000)))
    assert more["waves"] > 0.8 * terms_of(plan_of("block", shared_bytes=200 << 10),
                                          kernel(apply=Phase(1280, 0, 1000))).time


def test_blocks_that_share_a_multiprocessor_overlap(no_latency):
    costs = kernel(statistics=Phase(25.6, 0, 1000))  # 200 ns of each 1000 elements
    alone, beside = (terms_of(plan_of("block", items=100, threads=1024, shared_bytes=kilobytes << 10), costs).time
                     for kilobytes in (200, 100))
    assert alone == 10 * (400 + 200)
    assert beside < 0.85 * alone


def test_blocks_side_by_side_are_limited_by_memory_threads_and_registers():
    machine = Machine(DEVICES["H200"], NOTHING)

    def blocks(registers=32, cluster=False, **residence):
        r = {"shared_bytes": 1 << 10, "threads": 256, "team": 1, **residence}
        return time_model.abreast(machine, emulated.DEVICES["H200"], r, kernel(registers), cluster)

    assert blocks() == 8 * 132
    assert blocks(shared_bytes=100 << 10) == 2 * 132
    assert blocks(registers=128) == 2 * 132
    assert blocks(registers=255, threads=512) == 132  # never none
    assert blocks(registers=128, threads=512, team=16, cluster=True) == 8 * 16, "a cluster stays in its GPC"
    assert blocks(registers=128, threads=512, team=2, cluster=True) == 132


def test_a_grid_waits_at_each_item_and_less_while_the_next_one_is_loaded(no_latency):
    waits = {"wait": 2000, "hidden_wait": 500}
    short, long = (terms_of(plan_of("grid", items=50, teams=10, slots=slots), estimates=waits) for slots in (4, 6))
    assert short["exchange"] == 5 * 2000
    assert long.time == 200 + 5 * 2000, "then one block's waits are longer than all that moves"
    long = terms_of(plan_of("grid", items=50, teams=10, slots=6), estimates={"wait": 300, "hidden_wait": 100})
    assert long == {**long, "bytes": 50 * 40, "exchange": 5 * 100}


def test_channel_sums_of_a_team_are_trips_to_L2(no_latency, monkeypatch):
    monkeypatch.setattr(time_model, "L2_TRIP", 200)
    monkeypatch.setattr(time_model, "RANKS_A_TRIP", 4)
    costs = kernel(apply=Phase(1280, 0, 1000), dx=Phase(1280, 0, 1000))  # longer than all that moves
    plan = plan_of("grid", items=1, team=10, teams=1)
    assert terms_of(plan, costs, "backward").time - terms_of(plan, costs).time == 3 * 200
    assert terms_of(plan, way="backward").time - terms_of(plan).time <= 2 * 200, "hidden behind what moves"


def test_plain_loads_take_as_long_as_too_few_bytes_in_flight(monkeypatch):
    monkeypatch.setattr(time_model, "LATENCY", 1000)
    machine = Machine(PLAIN, NOTHING)
    assert machine.starve(1000, in_flight=5000) == Terms(latency=1000 / 50 - 1000 / 100)
    assert machine.starve(1000, in_flight=20_000).time == 0


def test_what_is_read_again_comes_from_L2_as_far_as_that_keeps_it(no_latency):
    plan = plan_of("grid", kept=2, slots=2)  # half of it is read twice
    plan["bytes_read"] = 30_000
    small, large = (time_model.time_of(PLAIN, {**PROPERTIES, "l2_bytes": l2_bytes}, plan, torch.Size([1, 10, 1000]),
                                       "forward", "bfloat16", {
                                           "resident_forward<BFloat16, BFloat16, 8, false, true>": kernel()}, NOTHING)
                    for l2_bytes in (0, 1 << 20))
    assert small["bytes"] == 500 and large["bytes"] == 400 + 10_000 / (10 * 32)


# ---- Predictions


@pytest.mark.parametrize("dtype", element_costs.TYPES)
def test_every_workload_has_a_prediction_on_every_device(dtype):
    chosen = workloads.load()
    found = time_model.predict_all(chosen, dtype=dtype)
    shapes = {(w.shape, w.groups): len(w.layouts("both")) for w in chosen}
    assert len(found) == len(DEVICES) * 2 * sum(shapes.values())
    for p in found:
        assert 0 < p.share < 1 and p.terms["launch"] > 0 and all(value >= 0 for value in p.terms.values())
        assert p.eager >= p.microseconds > p.bytes * 2 / DEVICES[p.device].copy_bytes_per_second * 1e6


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("way", time_model.WAYS)
@pytest.mark.parametrize("device", ["H200", "RTX 4090"])
def test_more_pixels_take_longer(device, way, layout):
    times = [time_model.predict(Workload("custom", (1, 128, size, size)), layout, way, device).microseconds
             for size in (32, 128, 512, 1024, 2048)]
    assert times == sorted(times) and times[-1] > 8 * times[-3]


def test_share_is_that_of_a_copy_which_is_launched_too():
    p = time_model.predict(Workload("custom", (1, 128, 512, 512)), "contiguous", "forward", "H200")
    copy = emulated.ESTIMATES["launch"] + time_model.LATENCY + 4 * 128 * 512 * 512 / 4300
    assert p.share == pytest.approx(copy / p.terms.time)


def test_a_device_that_moves_more_is_no_slower():
    for way in time_model.WAYS:
        w = Workload("custom", (1, 128, 1024, 1024))
        assert (time_model.predict(w, "contiguous", way, "H200").terms.time
                <= time_model.predict(w, "contiguous", way, "H100").terms.time)


def test_launches_and_exchanges_cost_what_the_plan_believes():
    source = (time_model.ROOT / "csrc" / "cuda" / "estimates.h").read_text()
    constants = {name: float(value) for name, value in re.findall(r"constexpr double k(\w+) = (\d+);", source)}
    assert {"".join(part.capitalize() for part in name.split("_")): value
            for name, value in emulated.ESTIMATES.items()} == constants
    assert constants["BytesPerNanosecond"] * 132 == pytest.approx(DEVICES["H200"].copy_bytes_per_second / 1e9, rel=0.05)

    w = Workload("custom", (1, 128, 20, 256, 256))
    found = time_model.predict(w, "contiguous", "forward", "H200")
    assert found.tier == "grid" and found.terms["launch"] == constants["Launch"]
    assert found.terms["exchange"] in (32 * constants["Wait"], 32 * constants["HiddenWait"])
    found = time_model.predict(Workload("custom", (2, 640, 64, 64)), "contiguous", "backward", "H200")
    assert found.tier == "cluster" and found.terms["launch"] == 2 * constants["Launch"]
    assert found.terms["exchange"] >= constants["ClusterWait"]


def test_report_is_written_as_a_prediction(tmp_path, monkeypatch, capsys):
    notes = tmp_path / "NOTES.md"
    notes.write_text(f"before\n{time_model.MARKS[0]}\nold\n{time_model.MARKS[1]}\nafter\n")
    monkeypatch.setattr(time_model, "RESULTS", tmp_path)
    monkeypatch.setattr(time_model, "NOTES", notes)
    monkeypatch.setattr(element_costs, "MEASURED", tmp_path / "none")
    assert time_model.main(["--suite", "video-vae", "--device", "H200", "--write"]) == 0
    printed = capsys.readouterr().out
    assert "Predictions, not measurements" in printed and "What takes the most time" in printed
    written = json.loads((tmp_path / "prediction-bfloat16.json").read_text())
    assert "prediction" in written["what"] and len(written["predictions"]) == 9
    assert {len(row) for row in written["predictions"]} == {len(written["columns"])} == {3}
    calls = [call for row in written["predictions"] for call in row[2]]
    assert len(calls) == 9 * 2 * 2 and {len(call) for call in calls} == {len(written["columns"][2]) - 1}
    wanted = r"before\n.*\n\nOf tensors.*\| 1x256x17x256x256 \| channels_last \| .*\nafter\n"
    assert re.search(wanted, notes.read_text(), re.DOTALL) and "old" not in notes.read_text()


def test_counts_of_make_sass_are_taken(tmp_path, monkeypatch):
    phase = dict(instructions=9.12345, mufu=2.0, exponentials=1.0, elements=32.0, loop="0x10")
    monkeypatch.setattr(element_costs, "MEASURED", tmp_path / "issue.json")
    monkeypatch.setattr(element_costs, "SNAPSHOT", tmp_path / "snapshot.json")
    names = ["resident_forward<Half, Half, 8, true, true>", "resident_forward<Half, float, 8, true, true>",
             "apply_rows<Half, Half, 8>", "residual_rows<Half, 8>"]
    (tmp_path / "issue.json").write_text(json.dumps({
        name: {"copy": {**phase, "exponentials": 0}, "apply": phase} for name in names}
        | {names[2]: {"apply": phase, "registers": 40, "alone": 32}}))
    element_costs.take()
    kernels = element_costs.read()
    assert set(kernels) == {names[0], names[2]}
    assert kernels[names[0]] == Kernel(255, {"copy": Phase(9.123, 2, 32, 0), "apply": Phase(9.123, 2, 32, 1)})
    assert kernels[names[2]] == Kernel(40, {"apply": Phase(9.123, 2, 32, 32)})
