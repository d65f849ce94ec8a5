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

from benchmarks import autoencoder, bench_fused, cases, dispatch, machine, measure, model, providers, report  # noqa: E402
from benchmarks import workloads  # noqa: E402

TINY = "--device cpu --dtype float32 --threads 1 --min-run-time 0.001 --shape 2,32,4,4".split()
UNCOMPILED = ["--providers", "eager,F.silu,ours"]


@pytest.fixture(autouse=True)
def threads():
    """The benchmark sets the number of threads for good, and where memory comes from."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    machine.keep_freed_memory()


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
    (["--block", "--train"], True), (["--block"], False), (["--train"], False),
    (["--op", "--block", "--train"], False), (["--block", "--train", "--providers", "eager,ours"], False)])
def test_recomputation_is_a_provider_where_it_differs_from_ours(monkeypatch, options, expected):
    asked = []
    monkeypatch.setattr(cases, "run", lambda args, *_: asked.append(args.providers) or sys.exit())
    with pytest.raises(SystemExit):
        bench_fused.main(["--device", "cpu", *options])
    assert ("recompute" in asked[0]) == expected


@pytest.mark.parametrize("options", [["--op", "--forward"], ["--op", "--fresh-memory"], ["--layout", "both"]])
def test_results_come_out(tmp_path, capsys, options):
    assert bench(*options, "--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv") == 0
    printed = capsys.readouterr().out
    assert "of copy" in printed and "2x32x4x4" in printed and "geometric mean" in printed

    found = json.loads((tmp_path / "r.json").read_text())
    named = found["environment"]
    assert named["torch"] == torch.__version__ and named["machine"] and named["date"] and "commit" in named
    assert named["fresh_memory"] == ("--fresh-memory" in options)
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
    monkeypatch.setattr(model, "AutoencoderKL", functools.partial(
        autoencoder.AutoencoderKL, ch=32, ch_mult=(1, 2), num_res_blocks=1))


def test_state_dict_does_not_depend_on_the_block():
    made = []
    for name in ("eager", "F.silu", "ours"):
        torch.manual_seed(0)
        provider = providers.PROVIDERS[name]
        made.append(autoencoder.AutoencoderKL(provider.block, provider.norm_act, ch=32, ch_mult=(1, 2)).state_dict())
    for other in made[1:]:
        assert list(made[0]) == list(other) and all(torch.equal(a, b) for a, b in zip(made[0].values(), other.values()))


def test_ways_are_those_that_help_names():
    assert tuple(model.WAYS) == workloads.WAYS


def benchmark_model(tmp_path, *options, ways="eager,patch,patch+both"):
    """The rows of the JSON file."""
    path = tmp_path / "r.json"
    arguments = [*TINY[:-2], "--model", "--resolution", 16, "--providers", ways, "--json", path, *options]
    assert bench_fused.main(list(map(str, arguments))) == 0
    found = json.loads(path.read_text())
    assert found["chosen"] == len(found["results"])
    return found["results"]


def test_a_model_is_timed_in_each_way_with_its_memory_and_its_error(small, tmp_path, capsys):
    ways = "eager,channels_last,patch,patch+both,patch+recompute"
    results = benchmark_model(tmp_path, ways=ways)
    assert [r["mode"] for r in results] == ["encode", "decode", "training"]
    for result in results:
        eager = result["providers"]["eager"]
        assert eager["speedup"] == eager["error_over_eager"] == 1
        for name, numbers in result["providers"].items():
            assert numbers["wall_seconds"] > 0 and numbers["peak_bytes"] > 0 and not numbers["reason"], name
            assert numbers["speedup"] == eager["wall_seconds"] / numbers["wall_seconds"]
            assert (numbers["kept_bytes"] is not None) == (result["mode"] == "training")
            assert numbers["error_over_eager"] < 4 and 100 < numbers["psnr"] < 160, name
        if result["mode"] == "training":
            kept = [result["providers"][name]["kept_bytes"] for name in ("patch+recompute", "patch", "eager")]
            assert kept == sorted(kept) and len(set(kept)) == 3
    *_, time, memory, accuracy = capsys.readouterr().out.rstrip().split("\n")
    assert time.startswith("  time: decode is ") and "x eager and " in time and "; training is " in time
    assert memory.startswith("  memory, of eager's: decode peak ") and ", kept for the backward pass 0." in memory
    assert accuracy.startswith("  against float64: error at most ") and accuracy.endswith(" dB or more")


def test_a_task_of_a_model_is_chosen_by_name(small, tmp_path):
    def run(*options):
        return [(r["mode"], r["resolution"]) for r in benchmark_model(tmp_path, *options, ways="eager")]

    assert run("--decode", "--resolution", "8,16") == [("decode", 8), ("decode", 16)]
    assert run("--forward") == [("encode", 16), ("decode", 16)]
    assert run("--encode", "--train") == [("encode", 16), ("training", 16)]
    with pytest.raises(SystemExit, match="--backward is for the op and the block"):
        run("--backward")


def test_ways_by_default_are_those_of_the_task_and_the_device():
    def ways(task, *options):
        args = bench_fused.parser().parse_args(["--model", "--device", "cpu", *options])
        bench_fused.complete(args, torch)
        args.device = "cuda" if task == "on cuda" else args.device
        return set(model.ways_of("decode" if task == "on cuda" else task, args))

    everywhere = set(workloads.WAYS) - {"patch+both+graph", "patch+recompute", "compile+patch+both", "again"}
    assert ways("decode") == everywhere
    assert ways("training") == everywhere | {"patch+recompute"}
    assert ways("on cuda") == everywhere | {"patch+both+graph"}
    assert ways("training", "--providers", "patch,patch+both+graph,ours") == {"patch"}
    with pytest.raises(SystemExit, match="none of them is for --model"):
        ways("decode", "--providers", "ours,F.silu")
    with pytest.raises(SystemExit, match="none of them is for op"):
        bench("--op", "--providers", "patch")


def test_a_compiled_model_runs_before_it_is_patched_and_after(small, monkeypatch):
    """Without a compiler, in what order things are done."""
    done = []
    patch, unpatch = model.ldm_fused.patch, model.ldm_fused.unpatch
    monkeypatch.setattr(torch, "compile", lambda f, **options: lambda x: done.append("call") or f(x))
    monkeypatch.setattr(model.ldm_fused, "patch", lambda m, **options: done.append("patch") or patch(m, **options))
    monkeypatch.setattr(model.ldm_fused, "unpatch", lambda m: done.append("unpatch") or unpatch(m))
    models = model.Models("ldm", "cpu", torch.float32)
    x = model.input_of(models.bases[False], "decode", 16)
    for name, order in (("patch+both+compile", ["patch", "call"]),
                        ("compile+patch+both", ["patch", "unpatch", "call", "patch", "call"]), ("compile", ["call"])):
        done.clear()
        models.contender(name, "decode", x).call(x)
        assert done == order


def test_all_copies_of_a_model_share_two_sets_of_weights(small):
    models = model.Models("ldm", "cpu", torch.float32)
    ways = [name for name, way in model.WAYS.items() if not way.compiled]
    places = {name: [p.data_ptr() for p in models.copy(name).parameters()] for name in ways}
    assert len({tuple(each) for each in places.values()}) == 2
    assert places["patch"] == places["eager"] != places["channels_last"] == places["patch+both"]
    assert not models.copy("eager").decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_peak_bytes_are_those_that_live_at_a_time():
    x = torch.randn(1000)

    def run():
        a = x + 1
        b = a + 1  # two at a time, and never three
        del a
        return (b + 1).sum()

    assert 2 * x.nbytes <= machine.peak_bytes(run, "cpu") < 2.5 * x.nbytes


def test_errors_of_a_model_are_root_mean_squares(monkeypatch):
    truth = [torch.tensor(each).double() for each in ([3.0, -1.0], [1.0, 1.0], [1.0], [0.0])]
    found = [t.float() + off for t, off in zip(truth, (0.5, 0.0, 0.3, 0.4))]
    y, dx, dp = model.errors(found, truth)
    assert math.isclose(y, math.sqrt(0.5 / 10)) and dx == 0 and math.isclose(dp, 0.5, rel_tol=1e-6)
    assert math.isclose(model.psnr(y, truth[0]), 20 * math.log10(4 / 0.5))
    with pytest.raises(measure.CheckFailed, match="the parameters' gradient is off by 0.5"):
        model.check([0, 0, dp], [0, 0, 0], torch.float32)
    with pytest.raises(measure.CheckFailed):
        model.check(model.errors([torch.full((2,), math.nan)], truth[:1]), [0.0], torch.float32)


@pytest.mark.parametrize("name", ["diffusers-vae", "diffusers-flux-vae", "diffusers-unet"])
def test_models_of_diffusers(name, monkeypatch, tmp_path, capsys):
    """Before patch and after, where there is diffusers or something like it."""
    output = types.SimpleNamespace

    class Like(torch.nn.Module):
        def __init__(self, latent_channels=4, **config):
            super().__init__()
            self.config = types.SimpleNamespace(latent_channels=latent_channels, **config)
            self.channels = channels = 4 if name == "diffusers-unet" else 3
            self.conv_in = torch.nn.Conv2d(channels, 32, 3, padding=1)
            self.block = providers.reference.ResnetBlock(in_channels=32, dropout=0.0)
            self.conv_out = torch.nn.Conv2d(32, channels, 3, padding=1)
            self.from_latent = torch.nn.Conv2d(latent_channels, channels, 1)

        def forward(self, x, *others):
            y = self.conv_out(self.block(self.conv_in(x)))
            return output(sample=y + 0 * sum(p.sum() for p in self.from_latent.parameters()))

        def encode(self, x):
            return output(latent_dist=output(mean=self(x).sample))

        def decode(self, z):
            return self(self.from_latent(z))

    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(AutoencoderKL=Like, UNet2DConditionModel=Like))
    results = benchmark_model(tmp_path, "--model", name, ways="eager,patch,patch+recompute")
    assert "FLUX" in capsys.readouterr().out or "flux" not in name
    modes = ["step", "training"] if name == "diffusers-unet" else ["encode", "decode", "training"]
    assert [(r["model"], r["mode"]) for r in results] == [(name, mode) for mode in modes]
    eager, ours, recompute = (results[-1]["providers"][way]["kept_bytes"] for way in
                              ("eager", "patch", "patch+recompute"))
    assert recompute < ours < eager


def test_without_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit, match="needs diffusers"):
        bench_fused.main(["--device", "cpu", "--model", "diffusers-vae"])


def test_a_wrong_model_is_caught_and_not_timed(small, monkeypatch, capsys, tmp_path):
    def forget(m, **options):
        for block in m.modules():
            if isinstance(block, providers.reference.ResnetBlock) and block.in_channels == block.out_channels:
                block.forward = lambda x, b=block: x + b.conv2(F.silu(b.conv1(F.silu(b.norm1(x)))))  # without norm2

    monkeypatch.setattr(model.ldm_fused, "patch", forget)
    arguments = [*TINY[:-2], "--model", "--encode", "--resolution", "16", "--providers", "eager,patch", "--json"]
    assert bench_fused.main([*arguments, str(tmp_path / "r.json")]) == 1
    assert "CHECK FAILED" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "r.json").read_text())["results"]
    assert result["providers"]["patch"]["wall_seconds"] is None and result["providers"]["eager"]["wall_seconds"] > 0


def test_too_little_memory_for_float64_is_reported(small, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.machine.available_bytes", lambda device: 1)
    assert bench_fused.main([*TINY[:-2], "--model", "--decode", "--resolution", "16", "--providers", "eager"]) == 0
    assert "MemoryError: float64" in capsys.readouterr().out


def test_a_model_is_drawn(small, tmp_path):
    pytest.importorskip("matplotlib")
    benchmark_model(tmp_path, "--plot", tmp_path / "model.png", "--op", "--shape", "2,32,4,4", ways="eager,ours,patch")
    assert (tmp_path / "model.png").read_bytes().startswith(b"\x89PNG")


def test_resolutions_are_multiples_of_8(capsys):
    with pytest.raises(SystemExit):
        bench("--model", "--resolution", 20)
    assert "'20': the models need multiples of 8" in capsys.readouterr().err


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


def test_dispatch_takes_the_emulated_ops(monkeypatch):
    calls = []
    ways = {name: lambda *a, name=name, op=op: calls.append(name) or op(*a) for name, op in dispatch.cudas_ops().items()}
    monkeypatch.setattr(dispatch, "cudas_ops", lambda: ways)
    for trains in (False, True):
        dispatch.measure((2, 64, 4), trains, rounds=1, calls=1)  # and one that warms up
    training = ["group_norm_act_training", "group_norm_act_training_backward"]
    assert calls == 2 * ["group_norm_act_inference"] + 2 * training
