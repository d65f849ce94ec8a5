"""The benchmark's workloads are those of real models, it counts bytes rightly, and its means are right."""

import collections
import math
import platform
import resource

import pytest
import torch
from torch import nn

from benchmarks import autoencoder, machine, measure, providers, report, workloads


# ---- workloads


def test_workloads_are_well_formed():
    for w in workloads.load():
        assert w.suite in workloads.SUITES
        assert w.shape[1] % w.groups == 0 and min(w.shape) > 0 and len(w.shape) >= 3
        assert w.activation in ("silu", None) and w.eps > 0 and w.count > 0
    assert {w.suite for w in workloads.load()} == set(workloads.SUITES)


def test_videos_come_in_channels_last_too():
    for w in workloads.select("video-vae"):
        assert len(w.shape) == 5 and w.layouts("both") == ["contiguous", "channels_last"] and not w.has_block
    x = measure.random_tensor((1, 8, 2, 3, 4), "channels_last", "cpu", torch.float32)
    assert x.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_default_workloads_exist(device):
    cases = workloads.default(device)
    assert {level for level, _ in cases} == {"op", "block"}
    assert all(w.trained and w.has_block for _, w in cases)


def test_training_workloads_are_those_of_the_autoencoder():
    with torch.device("meta"):
        ldm = autoencoder.AutoencoderKL(providers.reference.ResnetBlock, providers.NormSwish)
        x = torch.empty(4, 3, 256, 256)
    calls = collections.Counter()
    attention = {m.norm for m in ldm.modules() if isinstance(m, autoencoder.AttnBlock)}

    def count(norm, inputs):
        shape = tuple(inputs[0].shape)
        # The workloads have attention's norm over a sequence, as diffusers calls it.
        calls[(*shape[:2], shape[2] * shape[3]) if norm in attention else shape, norm not in attention] += 1

    for m in ldm.modules():
        if isinstance(m, nn.GroupNorm):
            m.register_forward_pre_hook(count)
    assert ldm(x).shape == x.shape
    rows = workloads.select("ldm-kl-f8-train-256")
    assert calls == {(w.shape, w.activation == "silu"): w.count for w in rows}


# ---- measures


def test_byte_model():
    assert measure.limit_bytes(1000, 4, "forward") == 2 * 4000
    assert measure.limit_bytes(1000, 2, "training") == 5 * 2000


def test_bandwidth_and_share_of_copy():
    second = measure.Timing(wall=measure.Measurement(1, [1.0], None))
    row = report.Row(workloads.Workload("custom", (2, 32, 10)), "op", "training", "contiguous", "float32", 4, "cpu")
    row.cells["ours"], row.copy = report.Cell(timing=second), second
    assert row.bandwidth() == 5 * 640 * 4 and row.copy_bandwidth() == 2 * 640 * 4 and row.copy_share() == 2.5


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no such switch")
def test_freed_memory_is_handed_out_again_unless_fresh_memory_is_wanted():
    def faults(keep):
        machine.keep_freed_memory(keep)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(64):
            torch.ones(2**20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    fresh, kept = faults(False), faults(True)  # the first of the latter are of fresh memory too
    assert fresh >= 64 and kept < fresh / 8


def test_kept_bytes_count_each_storage_once_and_no_parameter():
    w = torch.ones(8, requires_grad=True)
    x = torch.randn(4, 8, requires_grad=True)

    def call(x):
        y = x.exp()  # keeps its result
        return y * y[:] * w  # keeps y twice, the product, and the parameter

    contender = providers.Contender("it", call, [w])
    assert measure.kept_bytes(contender, x) == 2 * x.nbytes


def test_eager_keeps_three_tensors_and_ours_one():
    w = workloads.Workload("custom", (2, 64, 16, 16))
    contenders, _ = providers.op_contenders(w, ["eager", "F.silu", "ours"], "cpu", torch.float32, "contiguous")
    x = torch.randn(w.shape, requires_grad=True)
    kept = [round(measure.kept_bytes(c, x) / x.nbytes) for c in contenders]
    assert kept == [3, 2, 1]


@pytest.mark.parametrize("shape", [(2, 32, 3), (2, 32, 4, 4), (2, 32, 2, 4, 4)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_inputs_have_the_layout_and_differ(shape, layout):
    w = workloads.Workload("custom", shape)
    if layout not in w.layouts("both"):
        assert len(shape) == 3
        return
    (x, dy), (x2, _), *_ = measure.make_inputs(shape, layout, "training", "cpu", torch.float32)
    assert x.requires_grad and not dy.requires_grad and not torch.equal(x, x2)
    channels_inside = x.stride(1) == 1
    assert channels_inside == (layout == "channels_last") and dy.stride() == x.stride()


def test_geometric_mean():
    assert math.isclose(report.geometric_mean([1.0, 4.0]), 2.0)
    assert report.geometric_mean([]) is None


# ---- what the CPU kernels are held to


def timed(shape, dtype="float32", *, mode="forward", layout="contiguous", level="op", device="cpu", **seconds):
    """A row whose providers took so many seconds; `silu` is F.silu."""
    itemsize = getattr(torch, dtype).itemsize
    row = report.Row(workloads.Workload("custom", shape), level, mode, layout, dtype, itemsize, device)
    for name, value in seconds.items():
        timing = measure.Timing(wall=measure.Measurement(1, [value], None))
        row.cells["F.silu" if name == "silu" else name] = report.Cell(timing=timing)
    return row


SMALL, OTHER = (2, 32, 4, 4), (1, 64, 8, 8)


def test_in_short_takes_the_faster_peer_of_each_row_and_names_where_ours_gains_least():
    rows = [
        timed(SMALL, eager=2.0, silu=4.0, compile=8.0, ours=1.0),
        timed(OTHER, "bfloat16", layout="channels_last", eager=16.0, silu=6.0, compile=2.0, ours=2.0),
        timed(OTHER, eager=6.0, silu=8.0, compile=6.0, ours=3.0),  # 2x eager and compile
        timed(SMALL, mode="training", eager=3.0, silu=2.0, compile=1.5, ours=1.0),
        timed(SMALL, level="block", eager=1.1, silu=1.2, compile=1.3, ours=1.0),
        timed(SMALL, mode="training", level="block", eager=1.1, silu=1.2, compile=1.3, ours=1.0),
        timed(SMALL, eager=900.0, silu=900.0, compile=900.0),  # ours was wrong, and so not timed
        timed((1, 32, 30, 15626), eager=900.0, silu=900.0, compile=900.0, ours=1.0),  # page faults rule there
    ]
    best = "as fast as the best of F.silu and compile"
    assert report.in_short(rows, workloads.PROVIDERS).split("\n") == [
        "In short, ours is, in the geometric mean:",
        f"  the op, forward: 3.17x as fast as eager, 2.00x {best} (3 cases); "  # 32 ** (1/3)
        "least: 1.00x at 1x64x8x8 channels_last bfloat16",
        f"  the op, forward and backward: 3.00x as fast as eager, 1.50x {best} (1 case); "
        "least: 1.50x at 2x32x4x4 contiguous float32",
        f"  the block: 1.10x as fast as eager, 1.20x {best} (2 cases); least: 1.20x at 2x32x4x4 contiguous float32",
    ]


def test_a_tensor_of_30_mb_is_no_large_one():
    rows = [timed((1, 32, 15, 15625), eager=5.0, silu=3.0, compile=4.0, ours=1.0)]
    assert "5.00x as fast as eager, 3.00x" in report.in_short(rows, workloads.PROVIDERS)


def test_in_short_names_only_what_was_timed():
    without_compile = timed(SMALL, eager=4.0, silu=3.0, ours=1.0)
    without_compile.cells["compile"] = report.Cell(reason="no working C++ compiler")
    end = "x as fast as F.silu (1 case); least: 3.00x at 2x32x4x4 contiguous float32"

    def line(names, row=without_compile):
        return report.in_short([row], names).partition("\n  the op, forward: ")[2]

    assert line(workloads.PROVIDERS) == f"4.00x as fast as eager, 3.00{end}"
    assert line(["F.silu", "compile", "ours"]) == f"3.00{end}"
    assert line(["eager", "ours"]) == "4.00x as fast as eager (1 case)"
    assert line(["ours"]) == line(["eager", "F.silu", "compile"]) == ""
    assert report.in_short([timed(SMALL, eager=4.0, silu=3.0)], workloads.PROVIDERS) == ""
    assert report.in_short([], workloads.PROVIDERS) == ""


def test_kept_ratios_are_of_all_cases_together():
    rows = [timed(SMALL, mode="training", level="block", eager=1.0, ours=1.0, recompute=1.0) for _ in range(2)]
    for row, kept in zip(rows, ((800, 400, 200), (200, 200, 50))):
        for name, value in zip(("eager", "ours", "recompute"), kept):
            row.cells[name].kept_bytes = value
    forward = timed(SMALL, level="block", eager=1.0, ours=1.0, recompute=1.0)
    names = ["eager", "ours", "recompute"]
    assert report.kept_ratios([*rows, forward], names).split("\n") == [
        "Kept for the backward pass, of what eager keeps:", "  block, 2 cases  0.600x ours   0.250x recompute"]
    assert report.kept_ratios([forward], names) == report.kept_ratios(rows, ["ours", "recompute"]) == ""
