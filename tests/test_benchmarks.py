"""The benchmark's command: it never times a wrong result, and says what it left out.

test_benchmark_measures.py has what it measures.
"""

import concurrent.futures
import csv
import dataclasses
import functools
import json
import math
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_benchmark_measures import SMALL, timed

ROOT = Path(__file__).resolve().parent.parent

from benchmarks import autoencoder, bench_fused, cases, dispatch, measure, model, providers, report, workloads  # noqa: E402

TINY = "--device cpu --dtype float32 --threads 1 --min-run-time 0.001 --shape 2,32,4,4".split()
UNCOMPILED = ["--providers", "eager,F.silu,ours"]


@pytest.fixture(autouse=True)
def threads():
    """The benchmark sets the number of threads for good."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bench(*options):
    return bench_fused.main([*TINY, *UNCOMPILED, *map(str, options)])


def test_list_names_every_suite(capsys):
    assert bench_fused.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(suite in printed for suite in workloads.SUITES) and "2x1280x8x8" in printed


def test_help_needs_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    script = ROOT / "benchmarks" / "bench_fused.py"
    command = [sys.executable, str(script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0 and "--suite" in done.stdout, done.stderr


# ---- the command


def test_training_of_blocks_alone_has_recomputation_beside_it(capsys):
    assert bench_fused.main(["--device", "cpu", "--block", "--train", "--shape", "2,32,8,8", "--providers",
                             "eager,ours,recompute", "--min-run-time", "0.01"]) == 0
    found = re.search(r"block, 1 case +(\S+)x ours +(\S+)x recompute", capsys.readouterr().out)
    ours, recompute = map(float, found.groups())
    assert ours <= 0.505 and recompute <= 0.255


@pytest.mark.parametrize("options,expected", [
    (["--block", "--train"], True), (["--model", "--train"], True), (["--block"], False), (["--train"], False),
    (["--op", "--block", "--train"], False), (["--block", "--train", "--providers", "eager,ours"], False)])
def test_recomputation_is_a_provider_where_it_differs_from_ours(monkeypatch, options, expected):
    asked = []
    for module in (cases, model):
        monkeypatch.setattr(module, "run", lambda args, *_: asked.append(args.providers) or sys.exit())
    with pytest.raises(SystemExit):
        bench_fused.main(["--device", "cpu", *options])
    assert ("recompute" in asked[0]) == expected


@pytest.mark.parametrize("options", [["--op", "--forward"], ["--layout", "both"]])
def test_results_come_out(tmp_path, capsys, options):
    assert bench(*options, "--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv") == 0
    printed = capsys.readouterr().out
    assert "of copy" in printed and "2x32x4x4" in printed and "geometric mean" in printed

    found = json.loads((tmp_path / "r.json").read_text())
    named = found["environment"]
    assert named["torch"] == torch.__version__ and named["machine"] and named["date"] and "commit" in named
    levels = {r["level"] for r in found["results"]}
    assert levels == ({"op"} if "--op" in options else {"op", "block"})
    for result in found["results"]:
        assert set(result["providers"]) == {"eager", "F.silu", "ours"}
        for numbers in result["providers"].values():
            assert numbers["wall_seconds"] > 0 and numbers["relative_error"] < 1e-3
            assert (numbers["kept_bytes"] is not None) == (result["mode"] == "training")
            assert (numbers["share_of_copy"] is not None) == (result["level"] == "op")

    lines = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert len(lines) == 3 * len(found["results"])
    assert all(line["torch"] == torch.__version__ and float(line["wall_seconds"]) > 0 for line in lines)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    assert bench("--plot", tmp_path / "out.png") == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_says_so(monkeypatch):
    monkeypatch.setattr("benchmarks.charts.available", lambda: False)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        bench("--plot", "out.png")


def scaled_up(x, *arguments, **keywords):
    return providers.reference.group_norm_act(x, *arguments, **keywords) * 1.001


def wrong_gradient(x, num_groups, weight, bias, eps, *, activation):
    y = providers.reference.group_norm_act(x, num_groups, weight, bias.detach(), eps, activation=activation)
    return y + 0 * bias.sum()


@pytest.mark.parametrize("wrong, mode", [(scaled_up, "--forward"), (scaled_up, "--train"), (wrong_gradient, "--train")])
def test_a_wrong_result_is_caught_and_not_timed(tmp_path, capsys, monkeypatch, wrong, mode):
    monkeypatch.setitem(providers.PROVIDERS, "ours", dataclasses.replace(providers.PROVIDERS["ours"], op=wrong))
    assert bench("--op", mode, "--json", tmp_path / "r.json") == 1
    assert "CHECK FAILED" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "r.json").read_text())["results"]
    assert result["providers"]["ours"]["wall_seconds"] is None and result["providers"]["eager"]["wall_seconds"] > 0


def test_nan_is_caught():
    with pytest.raises(measure.CheckFailed):
        errors = measure.errors([torch.full((3,), math.nan)], [torch.ones(3).double()])
        measure.check(errors, [0.0], "op", torch.float32)


def test_without_a_compiler_the_others_go_on(tmp_path, capsys, monkeypatch):
    def no_compiler(*arguments, **keywords):
        raise RuntimeError("no working C++ compiler\n(a long story)")

    broken = dataclasses.replace(providers.PROVIDERS["compile"], op=no_compiler, compiled=False)
    monkeypatch.setitem(providers.PROVIDERS, "compile", broken)
    assert bench_fused.main([*TINY, "--op", "--forward"]) == 0
    printed = capsys.readouterr().out
    assert "n/a  compile: RuntimeError: no working C++ compiler" in printed and "long story" not in printed


def test_the_overview_ends_in_time_and_says_what_it_left_out(capsys, monkeypatch):
    first = workloads.DEFAULT[:1] + (("op", "sd15-unet-512", (2, 1280, 8, 8)),)
    monkeypatch.setattr(workloads, "DEFAULT", first)
    monkeypatch.setattr("benchmarks.cases.OVERVIEW", 0)
    assert bench_fused.main([*TINY[:-2], *UNCOMPILED, "--op", "--forward"]) == 0
    assert "2 of 2 cases left out" in capsys.readouterr().out


def test_what_a_user_wants_to_know_ends_the_output(capsys, monkeypatch):
    assert bench("--op", "--layout", "both") == 0
    head, forward, training = capsys.readouterr().out.rstrip().split("\n")[-3:]
    assert head == "In short, ours is, in the geometric mean:"
    assert forward.startswith("  the op, forward: ") and training.startswith("  the op, forward and backward: ")

    args = bench_fused.parser().parse_args([*TINY[:-2], "--suite", "seed", "--op", "--budget", "0"])
    bench_fused.complete(args, torch)
    rows = [timed(SMALL, eager=4.0, ours=1.0)]  # one of many, so that the summary also says how many are missing
    *_, left_out, short = cases.summary(rows, args).split("\n\n")
    assert "cases left out" in left_out and short == report.in_short(rows, workloads.PROVIDERS)


def test_tensors_over_max_mb_are_left_out(tmp_path, capsys):
    def chosen(*options):
        args = bench_fused.parser().parse_args(["--suite", "all", "--layout", "both", *options])
        bench_fused.complete(args, torch)
        return cases.chosen(args)

    dtypes = ["--dtype", "float32,bfloat16"]
    everything, small = chosen(*dtypes), chosen(*dtypes, "--max-mb", "30")
    assert 0 < len(small) < len(everything)
    assert [r.title for r in small] == [r.title for r in everything if r.bytes <= 30e6]
    exact = ["--shape", "2,32,4,4", "--max-mb", "0.004096"]  # float32 has just that, bfloat16 half of it
    assert len(chosen("--op", "--forward", *exact)) == 2

    options = ["--op", "--forward", "--shape", "2,32,8,8", "--max-mb", 0.005, "--json", tmp_path / "r.json"]
    assert bench(*options) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["chosen"] == 1 and [r["shape"] for r in found["results"]] == [[2, 32, 4, 4]]
    assert "left out" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="nothing to run: .* --max-mb"):
        bench("--max-mb", 0.004)


def test_a_budget_lets_the_suites_take_turns(tmp_path, capsys):
    dtypes = ["--dtype", "bfloat16,float32"]
    args = bench_fused.parser().parse_args(["--suite", "all", "--op", "--layout", "both", *dtypes])
    bench_fused.complete(args, torch)
    rows = cases.chosen(args)
    turns = cases.suites_in_turn(rows)
    assert len(turns) == len(rows) and {id(row) for row in turns} == {id(row) for row in rows}
    assert [row.dtype for row in turns] == ["bfloat16"] * (len(rows) // 2) + ["float32"] * (len(rows) // 2)
    named = list(dict.fromkeys(row.workload.suite for row in rows))
    assert [row.workload.suite for row in turns[: len(named)]] == named

    options = ["--suite", "seed", "--op", "--budget", 0, *dtypes, "--json", tmp_path / "r.json"]
    assert bench_fused.main([*TINY[:-2], *UNCOMPILED, *map(str, options)]) == 0
    assert "8 of 8 cases left out, after 0 s: --budget" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["chosen"] == 8


def test_results_are_saved_as_they_come(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "SAVE", 0)
    measured, whole = [], cases.check_and_time

    def check_and_time(row, *arguments):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(row)
        return whole(row, *arguments)

    monkeypatch.setattr(cases, "check_and_time", check_and_time)
    with pytest.raises(KeyboardInterrupt):
        bench("--op", "--layout", "both", "--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv")
    assert len(json.loads((tmp_path / "r.json").read_text())["results"]) == 3
    assert len(list(csv.DictReader((tmp_path / "r.csv").open()))) == 9


def test_several_dtypes_have_means_of_their_own(capsys):
    assert bench("--op", "--forward", "--dtype", "float32,bfloat16") == 0
    printed = capsys.readouterr().out
    assert "op forward, float32, 1 case" in printed and "op forward, bfloat16, 1 case" in printed


def test_compiling_ahead_says_what_did_not_compile(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # or an earlier run may have compiled it
    assert bench_fused.main([*TINY, "--op", "--forward", "--prepare", "1"]) == 0
    assert "0 of 1 cases compiled; 1 failed, the first with " in capsys.readouterr().out

    uncompiled = dataclasses.replace(providers.PROVIDERS["compile"], compiled=False)
    monkeypatch.setitem(providers.PROVIDERS, "compile", uncompiled)
    for mode in ("forward", "backward", "training"):
        row = report.Row(workloads.Workload("custom", (2, 32, 4)), "op", mode, "contiguous", "float32", 4, "cpu")
        assert cases.compile_case(row, "compile", None) == ""


def test_compiling_ahead_ends_what_runs_when_its_time_is_over(capsys, monkeypatch):
    class Pool(concurrent.futures.ThreadPoolExecutor):
        def __init__(self, workers, context):
            super().__init__(workers)

    ended = []
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", Pool)
    monkeypatch.setattr(cases, "compile_case", lambda *arguments: time.sleep(0.2) or ended.append(arguments) or "")
    options = ["--suite", "seed", "--layout", "both", "--op", "--device", "cpu", "--prepare", "1", "--budget", "0.1"]
    assert bench_fused.main(options) == 0
    assert 1 <= len(ended) <= 2 and f"{len(ended)} of 8 cases compiled\n" in capsys.readouterr().out


def test_too_little_memory_is_reported(capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.machine.available_bytes", lambda device: 1)
    assert bench("--op", "--forward") == 0
    assert "MemoryError: needs about" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [["--shape", "8"], ["--providers", "theirs"], ["--suite", "none"], ["--dtype", "int8"]]
)
def test_bad_options_are_refused(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench(*options)
    assert stopped.value.code == 2 and options[1] in capsys.readouterr().err


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(SystemExit, match="32 channels are no multiple of 5 groups"):
        bench("--groups", 5)


def test_missing_folders_are_noticed_before_the_run(tmp_path):
    with pytest.raises(SystemExit, match="no such folder"):
        bench("--json", tmp_path / "missing" / "r.json")


# ---- the model


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(model, "AutoencoderKL", functools.partial(autoencoder.AutoencoderKL, ch=32, ch_mult=(1, 2)))


def test_state_dict_does_not_depend_on_the_block():
    made = []
    for name in ("eager", "F.silu", "ours"):
        torch.manual_seed(0)
        provider = providers.PROVIDERS[name]
        made.append(autoencoder.AutoencoderKL(provider.block, provider.norm_act, ch=32, ch_mult=(1, 2)).state_dict())
    for other in made[1:]:
        assert list(made[0]) == list(other) and all(torch.equal(a, b) for a, b in zip(made[0].values(), other.values()))


def test_model(small, tmp_path, capsys):
    assert bench("--model", "--resolution", 16, "--layout", "both", "--json", tmp_path / "r.json") == 0
    assert "LDM kl-f8 autoencoder" in capsys.readouterr().out
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [(r["level"], r["mode"], r["layout"]) for r in results] == [
        ("model", mode, layout) for layout in ("contiguous", "channels_last") for mode in ("forward", "training")
    ]
    for numbers in (r["providers"]["ours"] for r in results):
        assert numbers["wall_seconds"] > 0 and numbers["peak_bytes"] > 0 and numbers["difference"] < 1e-4


@pytest.mark.parametrize("name", ["diffusers-vae", "diffusers-unet"])
def test_models_of_diffusers(name, monkeypatch, tmp_path, capsys):
    """Before patch and after, where there is diffusers or something like it."""

    class Output:
        def __init__(self, sample):
            self.sample = sample

    class Like(torch.nn.Module):
        def __init__(self, **config):
            super().__init__()
            channels = 3 if name == "diffusers-vae" else 4
            self.config = types.SimpleNamespace(**config)
            self.conv_in = torch.nn.Conv2d(channels, 32, 3, padding=1)
            self.block = providers.reference.ResnetBlock(in_channels=32, dropout=0.0)
            self.conv_out = torch.nn.Conv2d(32, channels, 3, padding=1)

        def forward(self, x, *others):
            return Output(self.conv_out(self.block(self.conv_in(x))))

    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(AutoencoderKL=Like, UNet2DConditionModel=Like))
    options = ("--resolution", 16, "--providers", "eager,ours,recompute", "--json", tmp_path / "r.json")
    assert bench("--model", name, *options) == 0
    assert "Stable Diffusion 1.5" in capsys.readouterr().out
    for result in json.loads((tmp_path / "r.json").read_text())["results"]:
        eager, ours, recompute = (result["providers"][provider] for provider in ("eager", "ours", "recompute"))
        assert result["model"] == name and ours["wall_seconds"] > 0
        if result["mode"] == "training":
            assert recompute["kept_bytes"] < ours["kept_bytes"] < eager["kept_bytes"]


def test_without_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit, match="needs diffusers"):
        bench("--model", "diffusers-vae")


def test_a_wrong_model_is_caught(small, monkeypatch, capsys):
    class Forgetful(providers.reference.ResnetBlock):
        def forward(self, x, temb=None):
            if self.in_channels != self.out_channels:
                return super().forward(x)
            return x + self.conv2(F.silu(self.conv1(F.silu(self.norm1(x)))))  # without norm2

    monkeypatch.setitem(providers.PROVIDERS, "ours", dataclasses.replace(providers.PROVIDERS["ours"], block=Forgetful))
    assert bench("--model", "--forward", "--resolution", 16) == 1
    assert "CHECK FAILED" in capsys.readouterr().out


def test_pictures(tmp_path):
    numpy = pytest.importorskip("numpy")
    assert model.picture(None, 32).shape == (1, 3, 32, 32)
    numpy.save(tmp_path / "bytes.npy", numpy.full((40, 64, 3), 255, numpy.uint8))
    numpy.save(tmp_path / "floats.npy", numpy.full((3, 40, 64), 0.5))
    for name, value in (("bytes", 1.0), ("floats", 0.5)):
        image = model.picture(str(tmp_path / f"{name}.npy"), 16)
        assert image.shape == (1, 3, 16, 16) and image.dtype == torch.float32
        torch.testing.assert_close(image, torch.full_like(image, value))


def test_bad_pictures_are_refused_in_a_sentence(small, tmp_path):
    numpy = pytest.importorskip("numpy")
    numpy.save(tmp_path / "flat.npy", numpy.zeros((8, 8)))
    for path in ("flat.npy", "missing.npy", "missing.png"):
        with pytest.raises(SystemExit) as stopped:
            bench("--model", "--image", tmp_path / path)
        assert path in str(stopped.value.code) or "Pillow" in str(stopped.value.code)
    with pytest.raises(SystemExit, match="multiple of 8"):
        bench("--model", "--resolution", 20)


# ---- dispatch


def test_dispatch_is_timed_in_turns_and_leaves_the_ops_as_they_were(capsys):
    before = {name: getattr(dispatch.ops, name) for name in dispatch.OPS}
    dispatch.main(["--rounds", "2", "--calls", "2"])
    assert before == {name: getattr(dispatch.ops, name) for name in dispatch.OPS}
    lines = capsys.readouterr().out.splitlines()
    for shape in ("1x32x1x2", "1x320x8x8", "2x1280x8x8"):
        for way in ("no grad", "training"):
            times = [float(n) for line in lines if line.startswith(f"{shape} ") and f" {way} " in line
                     for n in line.split(way)[1].split()]
            assert len(times) == 8 and all(0 < least <= median for least, median in zip(times[::2], times[1::2]))


def test_dispatch_takes_cudas_way(monkeypatch):
    calls = []
    ways = {name: lambda *a, name=name, op=op: calls.append(name) or op(*a) for name, op in dispatch.EMULATED.items()}
    monkeypatch.setattr(dispatch, "EMULATED", ways)
    for trains in (False, True):
        dispatch.measure((2, 64, 4), trains, rounds=1, calls=1)  # and one that warms up
    assert calls == 2 * ["group_norm_act_inference"] + 2 * ["group_norm_act", "group_norm_act_backward"]
