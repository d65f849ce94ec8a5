"""tools/traffic.py: what the emulator counts is what the plan predicts, and is reported as what it is."""

import re

import emulated
import pytest
import torch
from emulator import build

if not build.watches():
    pytest.skip("AddressSanitizer takes the place of the emulator's own watch", allow_module_level=True)

from benchmarks import workloads
from benchmarks.workloads import Workload
from tools import traffic

CASES = [((1, 640, 16, 16), "contiguous"), ((1, 640, 16, 16), "channels_last"), ((1, 320, 45, 8), "channels_last"),
         ((1, 96, 40, 40), "contiguous"), ((3, 1280, 8, 8), "channels_last"), ((40, 64, 1, 1), "contiguous")]


@pytest.mark.parametrize("name", emulated.DEVICES)
@pytest.mark.parametrize("shape,layout", CASES, ids=str)
def test_counts_are_what_the_plan_predicted(shape, layout, name):
    for moved in traffic.measure(Workload("custom", shape), layout, emulated.DEVICES[name]):
        assert moved.counted_over_planned == pytest.approx(1, abs=traffic.AGREEMENT)
        assert moved.over_limit > 1 and 0 < moved.sector_efficiency <= 1


@pytest.fixture
def smaller(monkeypatch):
    """What is emulated of the seed's suite; `make traffic` takes seconds for each shape."""
    monkeypatch.setattr(traffic, "LARGEST", traffic.LARGEST // 8)


def test_report(capsys, smaller):
    assert traffic.main(["--suite", "seed"]) == 0
    *rows, last = capsys.readouterr().out.splitlines()
    tiers = [re.findall("block|cluster|grid|two passes", row) for row in rows if re.match(r"\d+x", row)]
    assert tiers == [["block", "block"], ["block", "block"], ["grid", "grid"], ["grid", "grid"]]
    number = r"(\d+\.\d+) x"
    found = re.fullmatch(f"traffic: forward worst {number}, weighted {number}; backward worst {number}, weighted "
                         rf"{number}; sector efficiency worst (\d+) %", last)
    worst, weighted, backward_worst, backward_weighted = map(float, found.groups()[:4])
    assert 1 <= weighted <= worst and 1 <= backward_weighted <= backward_worst


@pytest.mark.parametrize("name", emulated.DEVICES)
@pytest.mark.parametrize("shape,layout", CASES[:4], ids=str)
def test_counts_of_a_block_are_what_the_plans_predicted(shape, layout, name):
    forward, backward = traffic.measure_block(Workload("custom", shape), layout, emulated.DEVICES[name])
    size = 2 * torch.Size(shape).numel()
    assert sum(m.limit for m in forward) == 7 * size and sum(m.limit for m in forward + backward) == 15 * size
    for moved in forward + backward:
        assert moved.counted_over_planned == pytest.approx(1, abs=traffic.AGREEMENT)
        assert moved.over_limit > 1


def test_block_report(capsys, monkeypatch):
    monkeypatch.setattr(traffic.workloads, "select", lambda suite: [Workload("seed", (2, 128, 32, 32))])
    assert traffic.main(["--suite", "seed", "--block"]) == 0
    *_, inference, training = capsys.readouterr().out.splitlines()
    number = r"(\d+\.\d+) B"
    for line, way, limit, eager in ((inference, "inference", 7, 23), (training, "training", 15, 62)):
        found = re.fullmatch(f"block traffic: {way} {number} weighted, {number} at worst; the limit is {limit} B, and "
                             f"eager moves {eager} B", line)
        weighted, worst = map(float, found.groups())
        assert limit <= weighted <= worst < 1.2 * limit


def test_videos_have_no_blocks(capsys):
    with pytest.raises(SystemExit):
        traffic.main(["--suite", "video-vae", "--block"])
    assert "this suite has no blocks" in capsys.readouterr().err


def test_block_targets(capsys, monkeypatch):
    monkeypatch.setattr(traffic, "BLOCK_TARGETS", {"inference": 7.0, "training": 15.0})
    monkeypatch.setattr(traffic.workloads, "select", lambda suite: [Workload("seed", (2, 320, 16, 16))])
    assert traffic.main(["--suite", "seed", "--block"]) == 1
    assert re.search(r"Blocks in inference move 7\.\d\d B, more than 7.0 B\.", capsys.readouterr().out)


def test_plan_that_is_wrong_is_reported(capsys, monkeypatch):
    monkeypatch.setattr(traffic, "bytes_of", lambda plan: 2 * (plan["bytes_read"] + plan["bytes_written"]))
    monkeypatch.setattr(traffic.workloads, "select", lambda suite: [Workload("seed", (2, 64, 8, 8))])
    assert traffic.main(["--suite", "seed"]) == 1
    assert ("The plan predicts other bytes than were counted for 2x64x8x8 contiguous forward."
            in capsys.readouterr().out)


def totals_of(limit=100, planned=101, sector_efficiency=0.99):
    totals = {key: traffic.Total() for key in traffic.TARGETS}
    for total in totals.values():
        total.add(traffic.Moved(limit, planned, "", "", 1, sector_efficiency), 1)
    return totals


def test_targets():
    assert traffic.missed(totals_of()) == []
    assert traffic.missed(totals_of(planned=120)) == [
        "contiguous backward of images moves 1.200 x the limit, more than 1.14 x."]
    assert len(traffic.missed(totals_of(planned=176))) == 12
    assert traffic.missed(totals_of(sector_efficiency=0.94)) == [
        f"contiguous {what} uses 94 % of its sectors at worst, less than 95 %."
        for what in ("forward of images", "backward of images", "forward of videos")]


def test_totals_weigh_bytes_not_ratios():
    total = traffic.Total()
    for limit, planned, count in ((100, 300, 1), (1000, 1000, 2)):
        total.add(traffic.Moved(limit, planned, "", "", counted_over_planned=1, sector_efficiency=1), count)
    assert total.text == "worst 3.00 x, weighted 1.095 x"  # 2300 bytes where 2100 are the limit


def test_videos_are_counted_forward_and_apart(capsys, monkeypatch):
    small = [Workload("video-vae", (1, 64, 4, 8, 8)), Workload("seed", (2, 64, 8, 8))]
    monkeypatch.setattr(traffic.workloads, "select", lambda suite: small)
    assert traffic.main(["--suite", "video-vae"]) == 0
    printed = capsys.readouterr().out
    assert re.search("videos, channels_last: forward worst .*; backward none", printed)
    assert re.search("images, channels_last: forward worst .*; backward worst", printed)


def test_groups_narrower_than_a_sector_share_their_rows():
    """One group of this video is 8 channels of 16 bits, half a sector."""
    forward, backward = traffic.measure(Workload("custom", (1, 256, 4, 128, 128)), "channels_last",
                                        emulated.DEVICES["H200"])
    for moved in (forward, backward):
        assert moved.sector_efficiency > 0.98


@pytest.mark.parametrize("shape,layout", [((1, 128, 1024, 1024), "channels_last"), ((1, 128, 1024, 1024), "contiguous"),
                                          ((4, 128, 256, 256), "channels_last"), ((1, 512, 64, 64), "contiguous"),
                                          ((1, 256, 17, 256, 256), "channels_last")],
                         ids=str)
def test_what_is_counted_at_a_smaller_size_is_the_same_tier(shape, layout):
    for moved in traffic.measure(Workload("custom", shape), layout, emulated.DEVICES["H200"]):
        assert moved.tier == moved.counted_tier
        assert moved.counted_over_planned == pytest.approx(1, abs=0.01)


def test_small_tensors_are_emulated_as_they_are_and_large_ones_shrink_with_the_device():
    assert traffic.shrunk((2, 640, 16, 16)) == ((2, 640, 16, 16), 1)
    shape, factor = traffic.shrunk((1, 512, 16, 180, 320))
    assert shape[:2] == (1, 512) and shape[2] * shape[3] * shape[4] * 512 <= traffic.LARGEST
    assert factor == 512


def test_each_shape_is_measured_once_and_counts_for_all_its_calls():
    rows = traffic.distinct(workloads.load())
    assert len({(w.shape, w.groups) for w, *_ in rows}) == len(rows)
    assert sum(forward for _, forward, _ in rows) == sum(w.count for w in workloads.load())
    assert sum(backward for *_, backward in rows) == sum(w.count for w in workloads.load() if w.trained)
