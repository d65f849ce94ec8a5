"""The page that sums up a GPU run: it says what there is, and what was not measured."""

from tools import gpu_summary


def result(shape, times, *, dtype="bfloat16", mode="forward", clock="device", share=0.5, reason=""):
    """A case: of each provider the device and the wall time; None where it was not measured."""
    providers = {}
    for name, (device, wall) in times.items():
        providers[name] = {"device_seconds": device, "wall_seconds": wall, "reason": "" if wall else reason,
                           "share_of_copy": share if name == "ours" else None}
    return {"level": "op", "mode": mode, "layout": "contiguous", "dtype": dtype, "device": "cuda", "clock": clock,
            "shape": shape, "tensor_bytes": 1 << 30, "copy_bytes_per_second": 2e12, "providers": providers}


TIMINGS = {
    "chosen": 5,
    "results": [
        result([1, 64], {"eager": (4, 8), "F.silu": (2, 4), "compile": (1, 2), "ours": (1, 4)}, share=0.9),
        result([2, 64], {"eager": (1, 8), "F.silu": (2, 4), "compile": (None, None), "ours": (1, 4)}, share=0.4,
               reason="out of memory"),
        result([3, 64], {"eager": (3, 3), "ours": (6, 6)}, dtype="float32", mode="training", clock="wall"),
    ],
}
RUN = {
    "part": "time",
    "device": "cuda",
    "started": "2026-01-02 03:04:05 UTC",
    "seconds": 400.0,
    "machine": {"gpu": "NVIDIA H100", "driver": "580.1", "torch": "2.11.0", "cuda": "13.0", "commit": "abc+",
                "build": {"cuda": "13.0", "cuda_archs": ["9.0"]}},
    "stages": [{"name": "tests", "status": "failed", "seconds": 61.4, "notes": ["1 failed"]},
               {"name": "timings", "status": "not run", "seconds": 0, "notes": []}],
    "tests": {"passed": 10, "failed": 1, "skipped": 2, "on_gpu": {"passed": 4, "failed": 1, "skipped": 0},
              "failures": {"t.py::a[cuda]": "assert 1 == 2"}, "interrupted": [], "without_outcome": [],
              "skips": {"one GPU only": 2}},
}


def test_the_summary_says_what_there_is():
    summary = gpu_summary.summary(RUN, TIMINGS)
    for line in (
        "NVIDIA H100, driver 580.1  ", "torch 2.11.0, CUDA 13.0, kernels by nvcc 13.0 for 9.0  ",
        "commit abc+, 2026-01-02 03:04:05 UTC, 400 s in all", "| tests | **failed** | 61 | 1 failed |",
        "| timings | **not run** | 0 |  |", "- failed: `t.py::a[cuda]`: assert 1 == 2",
        "- skipped, 2 times: one GPU only",
        "Tests: 10 passed, 1 failed, 2 skipped. Of those that put a tensor on the GPU, 4 passed and 1 failed.",
        # by device time: sqrt(0.9 * 0.4), sqrt(4 * 1), 2 and 2, and one case
        "| bfloat16 | forward | contiguous | 2 | 60% (40%) | 2.00x (1.00x) | 2.00x (2.00x) | 1.00x (1.00x)"
        " | n/a | n/a |",
        "| float32 | training | contiguous | 1 | 50% (50%) | 0.50x (0.50x) | n/a | n/a | n/a | n/a |",
        "| forward, of copy, the worst from 32 MB on | 90% | 40% | 2 | **missed** |",
        "| forward, vs eager, geometric mean | 4.00x | 2.00x | 2 | **missed** |",
        "| forward, vs compile, the worst | 1.00x | 1.00x | 1 | met |",
        "- bfloat16, forward, contiguous: 40% of copy at 2x64; 1.00x the fastest other at 1x64",
        "| bfloat16 | forward | contiguous | 2.00x (2.00x) | 1.00x (1.00x) | 0.50x (0.50x) | n/a | n/a |",
    ):
        assert line in summary.splitlines(), line
    assert "up to 2000 GB/s" in summary


def test_the_summary_has_no_numbers_where_there_are_none():
    run = {**RUN, "machine": {}, "tests": None}
    for timings in (None, {"chosen": 5, "results": []}):
        summary = gpu_summary.summary(run, timings)
        assert "commit unknown" in summary and "vs eager" not in summary and "Tests:" not in summary


def test_the_summary_stays_one_page():
    failures = {f"t.py::t[{i}]": "why" for i in range(500)}
    summary = gpu_summary.summary({**RUN, "tests": {**RUN["tests"], "failures": failures}}, TIMINGS)
    assert "and 490 more such lines" in summary and len(summary.splitlines()) < 70


def test_what_was_not_measured_is_said():
    assert gpu_summary.gaps(TIMINGS) == [
        "time was out: 2 of 5 cases not measured (measured: 2 bfloat16, 1 float32)",
        "1 times compile: out of memory",
        "1 cases compared by wall time, for want of device time",
    ]
    assert gpu_summary.gaps(None) == []
