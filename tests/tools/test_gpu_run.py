"""`make gpu` without a GPU: what fails or runs out of time is reported and stops nothing, and no silence is a pass."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fresh import run_python
from test_gpu_summary import result

from tools import gpu, gpu_summary

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def plain_pytest(monkeypatch):
    """Of the suites here none uses a plugin, and some take seconds to load: hypothesis' takes two."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A Run with these options, which ends what it has started."""
    monkeypatch.setattr(gpu, "describe", lambda device: {"cores": 4, "commit": "abc", "torch": "2.11"})
    runs = []

    def start(*options, part="correct"):
        args = gpu.parse([part, "--out", str(tmp_path / "out"), *options])
        runs.append(gpu.Run(args))
        return runs[-1]

    yield start
    for run in runs:
        run.finish()


def finished(run, code, limit=30.0):
    job = run.python(f"job {len(run.jobs)}", ["-c", code], limit)
    run.wait(job)
    return job


def out(tmp_path, name):
    text = (tmp_path / "out" / name).read_text()
    return json.loads(text) if name.endswith(".json") else text


# ---- commands and stages


def test_a_command_passes_fails_or_cannot_start(start):
    run = start("--device", "cpu")
    assert finished(run, "print('hello')").status == "passed"
    assert finished(run, "raise SystemExit(3)").status == "failed"
    job = run.start("none", ["/no/such/program"], 5)
    run.wait(job)
    assert job.status == "failed" and "No such file" in job.output()
    run.write()
    log = (run.args.out / "log.txt").read_text()
    assert "hello" in log and "=== job 1: failed" in log and "=== none: failed" in log


def test_a_command_is_ended_at_its_limit_with_all_that_it_started(start, tmp_path):
    run = start("--device", "cpu")
    child = "import os, time; open({!r}, 'w').write(str(os.getpid())); time.sleep(60)".format(str(tmp_path / "pid"))
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    job = finished(run, code, limit=3)
    assert job.status == "timed out" and job.seconds < 10
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_no_limit_is_longer_than_what_is_left(start):
    assert start("--device", "cpu", "--seconds", "2").python("job", ["-c", ""], 100).limit <= 2


def broken(run):
    raise KeyError("oops")


@pytest.mark.parametrize("tests, status", [
    (broken, "failed"), (lambda run: ("timed out", ["two parts"]), "timed out"),
    (lambda run: ("not available", []), "not available"), (lambda run: ("passed", []), "passed"),
])
def test_a_stage_that_does_not_pass_stops_none(tmp_path, monkeypatch, capsys, tests, status):
    after = []
    for name in ("build", "instances", "sanitizer"):
        monkeypatch.setitem(gpu.STAGES, name, lambda run, name=name: after.append(name) or ("passed", []))
    monkeypatch.setitem(gpu.STAGES, "tests", tests)
    exit_status = gpu.main(["correct", "--device", "cpu", "--out", str(tmp_path / "out")])
    assert exit_status == (0 if status in ("passed", "not available") else 1)
    assert after == ["build", "instances", "sanitizer"]
    stages = {stage["name"]: stage["status"] for stage in out(tmp_path, "run.json")["stages"]}
    assert stages == {"build": "passed", "tests": status, "instances": "passed", "sanitizer": "passed"}
    summary = out(tmp_path, "summary.md")
    assert status in summary and summary in capsys.readouterr().out
    assert ("oops" in summary) == (tests is broken)


def test_a_run_that_is_stopped_leaves_what_it_had(tmp_path, monkeypatch):
    def stopped(run):
        run.data["tests"] = gpu.totals([record("a", "passed")])
        run.python("long", ["-c", "import time; time.sleep(60)"], 60)
        sys.exit(1)  # as a signal does

    monkeypatch.setitem(gpu.STAGES, "tests", stopped)
    with pytest.raises(SystemExit):
        gpu.main(["correct", "--device", "cpu", "--stages", "tests,sanitizer", "--out", str(tmp_path / "out")])
    data = out(tmp_path, "run.json")
    assert [stage["status"] for stage in data["stages"]] == ["stopped", "not run"] and data["tests"]["passed"] == 1
    assert "=== long: stopped" in out(tmp_path, "log.txt") and "**not run**" in out(tmp_path, "summary.md")


def test_results_of_an_earlier_run_are_not_taken_for_this_one(start, tmp_path):
    (tmp_path / "out").mkdir()
    for name in gpu.RESULTS:
        (tmp_path / "out" / name).write_text("{}")
    start("--device", "cpu")
    assert not any((tmp_path / "out" / name).exists() for name in gpu.RESULTS)


def test_a_failed_build_is_reported(start, tmp_path, monkeypatch):
    (tmp_path / "make").write_text("#!/bin/sh\necho no nvcc, FORCE_CUDA=$FORCE_CUDA\nexit 2\n")
    (tmp_path / "make").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    run = start()
    status, notes = gpu.build(run)
    assert status == "failed" and "build: failed" in notes and "older binary" in notes[-1]
    assert "no nvcc, FORCE_CUDA=1" in run.jobs[0].output()  # on a GPU a build without CUDA kernels is no build
    assert run.data["machine"]["build"]["version"]


def test_stages_are_checked_and_kept_in_order():
    assert gpu.parse(["time", "--stages", "timings,build"]).stages == ["build", "timings"]
    assert gpu.parse(["correct"]).stages == list(gpu.PARTS["correct"])
    for wrong in (["correct", "--stages", "nonsense"], ["nonsense"], []):
        with pytest.raises(SystemExit):
            gpu.parse(wrong)


# Whatever is started hangs; but for the time limits, so would the run. Limits are an eightieth of what they are.
HANGS = """
import sys, time
import torch
from tools import gpu
gpu.describe = lambda device: {"cores": 4}
gpu.LIMITS = {name: limit / 80 for name, limit in gpu.LIMITS.items()}
start = gpu.Run.start
gpu.Run.start = lambda run, name, command, *more, **kwargs: start(run, name, ["sleep", "600"], *more, **kwargs)
if sys.argv[1] == "correct":  # as if there were a GPU and the tools
    gpu.shutil.which = lambda *arguments, **keywords: "compute-sanitizer"
    torch.cuda.is_available = lambda: True
begun = time.monotonic()
status = gpu.main([sys.argv[1], "--out", sys.argv[2], "--seconds", str(gpu.SECONDS / 80), *sys.argv[3:]])
print("seconds", time.monotonic() - begun)
sys.exit(status)
"""


@pytest.mark.parametrize("part, device", [("correct", "cuda"), ("time", "cpu")])
def test_a_part_in_which_everything_hangs_ends_in_time_and_leaves_its_files(tmp_path, part, device):
    arguments = ["gpu.py", part, str(tmp_path / "out"), "--device", device]
    done = run_python(f"import sys\nsys.argv = {arguments!r}\n{HANGS}")
    assert done.returncode == 1, done.stderr
    seconds = float(done.stdout.rsplit("seconds ", 1)[1])
    assert gpu.SECONDS <= 230 and seconds < gpu.SECONDS / 80 + 10  # in which processes end and files are written
    stages = {stage["name"]: stage["status"] for stage in out(tmp_path, "run.json")["stages"]}
    assert list(stages) == list(gpu.PARTS[part]) and "passed" not in stages.values()
    assert "timed out" in stages.values()
    assert "timed out" in out(tmp_path, "summary.md") and "$ sleep 600" in out(tmp_path, "log.txt")


def test_each_stage_has_its_part_of_the_time():
    correct = gpu.LIMITS["build"] + gpu.LIMITS["tests"]
    assert correct <= gpu.SECONDS - 20  # for the sanitizer
    assert gpu.LIMITS["build"] + gpu.LIMITS["compile"] + gpu.DECODER <= gpu.SECONDS - 20  # for timings


CORRECT = ["correct", "--device", "cpu", "--stages", "tests,instances,sanitizer", "--pytest", "tests/test_part.py"]
TIME = ["time", "--device", "cpu", "--stages", "timings,decoder", "--bench",
        "--shape 2,32,4,4 --op --forward --backward --providers eager,ours,again --threads 1 --min-run-time 0.001",
        "--decoder", "--resolution 16 --providers eager,patch --min-run-time 0.001"]


def test_both_parts_on_a_cpu(tmp_path, monkeypatch, capsys):
    (tmp_path / "test_part.py").write_text("def test_it(): pass\n")
    (tmp_path / "small_cases.py").write_text("print('cases right: 3')")
    monkeypatch.setattr(gpu, "SMALL_CASES", tmp_path / "small_cases.py")
    pytest_arguments = f"{tmp_path}/test_part.py --rootdir {tmp_path}"
    assert gpu.main([*CORRECT[:-1], pytest_arguments, "--out", str(tmp_path / "out")]) == 0
    run = out(tmp_path, "run.json")
    assert run["part"] == "correct" and run["instances"] == ["cases right: 3"] and run["tests"]["passed"] == 1
    assert [stage["status"] for stage in run["stages"]] == ["passed", "not available", "not available"]

    monkeypatch.setattr(gpu_summary, "QUIET", (0, 1e9))  # other programs run here
    assert gpu.main([*TIME, "--out", str(tmp_path / "out")]) == 0, capsys.readouterr()
    modes = [result["mode"] for result in out(tmp_path, "timings.json")["results"]]
    assert modes == ["forward", "backward"] and out(tmp_path, "run.json")["again"]["cases"] == 2
    assert [(r["model"], r["mode"]) for r in out(tmp_path, "decoder.json")["results"]] == [("ldm", "decode")]
    summary = out(tmp_path, "summary.md")
    assert "| ldm | decode | 16 pixels | float32 | patch |" in summary and "Ours against itself: " in summary


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU"):
        gpu.main(["correct"])


# ---- tests


def record(*pairs, chosen=()):
    """What a part writes down; a test with "gpu" in its id used one."""
    lines = [{"chosen": list(chosen)}] if chosen else []
    for i, outcome in zip(pairs[::2], pairs[1::2]):
        lines.append({"id": i, "outcome": outcome, "why": f"why {i}", "on_gpu": "gpu" in i})
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_totals():
    found = gpu.totals([
        record("t.py::a[gpu]", "passed", "t.py::b[gpu]", "failed", "u.py", "skipped"),
        record("t.py::c[cuda]", "skipped", "t.py::a[cpu]", "passed", "t.py::a[cpu]", "failed", "u.py", "skipped",
               "t.py::d[cuda]", "passed",
               chosen=["t.py::a[cpu]", "t.py::d", "t.py::e"]) + '{"id": "t.py::d", "outc',
    ])
    assert (found["passed"], found["failed"], found["skipped"]) == (2, 2, 2)
    assert found["on_gpu"] == {"passed": 1, "failed": 1, "skipped": 0}
    assert found["failures"] == {"t.py::a[cpu]": "why t.py::a[cpu]", "t.py::b[gpu]": "why t.py::b[gpu]"}
    assert found["without_outcome"] == ["t.py::d", "t.py::e"] and found["interrupted"] == ["t.py::d"]


@pytest.mark.parametrize("text, reason", [
    (record("a[cuda]", "skipped", "a[cpu]", "passed"), "no test that used the GPU passed"),
    (record("a[cuda]", "passed"), "no test that used the GPU passed"),
    (record("a[gpu]", "passed", "b", "failed"), "1 failed"),
    (record("a[gpu]", "passed", chosen=["a[gpu]", "b"]), "1 have no outcome: their process died, or was ended"),
])
def test_what_is_no_pass(text, reason):
    found = gpu.totals([text])
    assert gpu.judged(found, "cuda") == [reason]
    assert gpu.judged(gpu.totals([""]), "cpu") == ["no test passed"]
    assert gpu.judged(gpu.totals([record("a[cuda]", "skipped", "b", "passed")]), "cpu") == []


SUITE = """
import os, pytest, sys, types
stats = {"allocation.all.allocated": 100}
cuda = types.SimpleNamespace(is_initialized=lambda: True, memory_stats=lambda: stats)
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)  # stands in for one that has a GPU
@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not os.environ.get("PRETEND"):
        pytest.skip("no CUDA device")
    return request.param
@pytest.mark.parametrize("i", range(6))
def test_it(device, i):
    stats["allocation.all.allocated"] += device == "cuda"
"""


@pytest.mark.parametrize("pretend, more, status", [
    ("", "", "failed"),
    ("1", "", "passed"),
    ("1", "def test_that_fails():\n    assert 1 == 2\n", "failed"),
    ("1", "def test_that_dies():\n    os._exit(0)\n", "failed"),
    ("1", "import no_such_module\n", "failed"),
], ids=["all skipped", "good", "failing", "dying", "unimportable"])
def test_the_suite_in_parts(start, tmp_path, monkeypatch, pretend, more, status):
    (tmp_path / "test_suite.py").write_text(SUITE + more)
    monkeypatch.setenv("PRETEND", pretend)
    stages = "tests,instances" if "fails" in more else "tests"
    run = start("--stages", stages, "--pytest", f"{tmp_path} --rootdir {tmp_path}")
    found, notes = gpu.tests(run)
    totals = run.data["tests"]
    assert ("--instances" in str([job.command for job in run.jobs])) == ("instances" in stages)
    assert found == status and (status == "passed") == (not notes)
    if more.startswith("import"):
        assert "no_such_module" in totals["failures"]["test_suite.py"]
    else:
        ended = totals["passed"] + totals["skipped"] + totals["failed"]
        assert ended + len(totals["without_outcome"]) == 12 + bool(more)
        assert totals["on_gpu"] == {"passed": 6 * bool(pretend), "failed": 0, "skipped": 0} or "dies" in more
    if "fails" in more:
        assert totals["failures"] == {"test_suite.py::test_that_fails": "assert 1 == 2"}
    if "dies" in more:
        assert totals["interrupted"] == ["test_suite.py::test_that_dies"]
        assert "`test_suite.py::test_that_dies`" in gpu_summary.tests(totals)
    if not pretend:
        assert notes == ["no test that used the GPU passed"] and totals["skips"] == {"no CUDA device": 6}


def test_a_suite_that_hangs_is_ended(start, tmp_path, monkeypatch):
    monkeypatch.setitem(gpu.LIMITS, "tests", 8)
    monkeypatch.setattr(gpu, "WRITE", 0.5)
    totals, seen = gpu.totals, []
    monkeypatch.setattr(gpu, "totals", lambda records: seen.append(totals(records)) or seen[-1])
    (tmp_path / "test_suite.py").write_text("import time\ndef test_a(): pass\ndef test_hangs(): time.sleep(60)\n")
    run = start("--device", "cpu", "--pytest", f"{tmp_path} --rootdir {tmp_path}")
    status, notes = gpu.tests(run)
    assert status == "timed out" and notes == ["1 have no outcome: their process died, or was ended"]
    assert run.data["tests"]["passed"] == 1 == seen[-3]["passed"] and len(seen) > 5  # written while it ran, too


# ---- compute-sanitizer

CLEAN = "========= COMPUTE-SANITIZER\ncases right: 116\n========= ERROR SUMMARY: 0 errors\n"
OUTSIDE = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at void ldm_fused::statistics_rows<float, (int)4>(ldm_fused::ForwardParams)+0x310
=========     by thread (0,0,0) in block (2,0,0)
=========     Address 0x7f1e2b008000 is out of bounds
========= ERROR SUMMARY: 32 errors
"""
UNWRITTEN = """\
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 16 bytes
=========     at void ldm_fused::statistics_rows<float, (int)4>(ldm_fused::ForwardParams)+0x310
cases right: 116
========= ERROR SUMMARY: 1 error
"""
RACES = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at void ldm_fused::merge_statistics<float>(...)+0x90
=========     and Read access at void ldm_fused::merge_statistics<float>(...)+0x110 [64 hazards]
cases right: 116
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
NO_RACES = "cases right: 116\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
REFUSED = ('========= Error: Device not supported. Please refer to the "Supported Devices" section of the sanitizer '
           "documentation\n")


@pytest.mark.parametrize("log, ended, sign, status, errors", [
    (CLEAN, "passed", "", "passed", 0),
    (NO_RACES, "passed", "", "passed", 0),
    (OUTSIDE, "failed", "", "failed", 32),
    (UNWRITTEN, "passed", "", "failed", 1),
    (RACES, "failed", "", "failed", 1),
    (CLEAN, "timed out", "", "timed out", 0),
    ("cases right so far: 20\n", "timed out", "", "timed out", None),
    (CLEAN, "failed", "", "failed", 0),
    (CLEAN.replace("cases right", "Error"), "passed", "", "failed", 0),
    ("Traceback ...\nAssertionError: y\n", "failed", "", "failed", None),
    (REFUSED, "failed", "", "not available", None),
    (OUTSIDE, "failed", r"Invalid .*read", "passed", 32),
    (UNWRITTEN, "failed", "Uninitialized", "passed", 1),
    (CLEAN, "passed", "Uninitialized", "failed", 0),  # a tool that looks at none of our kernels finds no mistake
    (RACES, "failed", "Uninitialized", "failed", 1),
])
def test_what_a_tool_says(log, ended, sign, status, errors):
    verdict = gpu.sanitized(log, ended, sign)
    assert (verdict["status"], verdict["errors"]) == (status, errors)
    assert ("20 cases right so far" in verdict["why"]) == ("so far: 20" in log)


FAKE = r"""#!/bin/sh
echo "$@" >>ARGUMENTS
echo "caching off: $PYTORCH_NO_CUDA_MEMORY_CACHING" >>ARGUMENTS
case "$* " in
*"outside "*) echo "========= Invalid __global__ read"; echo "========= ERROR SUMMARY: 2 errors"; exit 99;;
*"unwritten "*) UNWRITTEN ;;
*"racecheck "*) echo "cases right: 5"; echo "========= RACECHECK SUMMARY: HAZARDS displayed (0 errors)";;
*) echo "cases right: 5"; echo "========= ERROR SUMMARY: 0 errors";;
esac
"""
FOUND = 'echo "========= Uninitialized __global__ memory read"; echo "========= ERROR SUMMARY: 1 error"'
UNSEEN = 'echo "========= ERROR SUMMARY: 0 errors"'


@pytest.mark.parametrize("hazards, unwritten, status, expected", [
    ("0 hazards", FOUND, "passed", []),
    ("3 hazards", FOUND, "failed", [f"racecheck, part {i} of 2: 3 errors" for i in (1, 2)]),
    ("0 hazards", UNSEEN, "failed", ["initcheck, a mistake on purpose: the mistake went unseen"]),
    ("0 hazards", "sleep 60", "timed out",
     ["initcheck, a mistake on purpose: it ran out of time, no cases right so far"]),
])
def test_the_tools_run(start, tmp_path, monkeypatch, hazards, unwritten, status, expected):
    fake = tmp_path / "compute-sanitizer"
    replaced = {"ARGUMENTS": str(tmp_path / "arguments"), "HAZARDS": hazards, "UNWRITTEN": unwritten}
    text = FAKE
    for name, value in replaced.items():
        text = text.replace(name, value)
    fake.write_text(text)
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    run = start("--seconds", "10")
    found, notes = gpu.sanitizer(run)
    assert found == status and notes == expected
    called = (tmp_path / "arguments").read_text()
    for tool in gpu.TOOLS:
        assert f"--tool {tool} " in called
    assert called.count("--kernel-name kns=ldm_fused") == called.count("caching off: 1") == 10
    assert len({line.split("--port ")[1].split()[0] for line in called.splitlines() if "--port" in line}) == 10
    summary = gpu_summary.summary(run.data, None)
    assert "| memcheck, part 2 of 2 | passed | 0 | 5 cases right |" in summary


def test_without_the_tools_the_stage_is_not_available(start, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu.sanitizer(start()) == ("not available", ["compute-sanitizer is not installed"])
    assert gpu.sanitizer(start("--device", "cpu")) == ("not available", ["it needs a GPU"])


# ---- instances


@pytest.mark.parametrize("device, code, status, notes", [
    ("cuda", "print('cases right: 3\\ninstances run: 1 of 1; not run: none')", "passed",
     ["cases right: 3", "instances run: 1 of 1; not run: none"]),
    ("cuda", "print('cases right: 3\\ninstances run: 1 of 2; not run: b'); raise SystemExit(1)", "failed",
     ["cases right: 3", "instances run: 1 of 2; not run: b"]),
    ("cuda", "import os; assert os.environ['LDM_FUSED_STRICT_PLAN'] != '1', 'the tier is enforced'", "failed",
     ["AssertionError: the tier is enforced"]),
    ("cpu", "print('cases right: 3')", "not available", ["cases right: 3", "kernels have instances on a GPU alone"]),
])
def test_instances_run(start, tmp_path, monkeypatch, device, code, status, notes):
    (tmp_path / "small_cases.py").write_text(code)
    monkeypatch.setattr(gpu, "SMALL_CASES", tmp_path / "small_cases.py")
    assert gpu.instances(start("--device", device)) == (status, notes)


# ---- timings


def test_timings_on_the_cpu(start, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_summary, "QUIET", (0, 1e9))
    cases = ("--op --shape 2,32,4,4 --forward --dtype bfloat16,float32 --layout both "
             "--providers eager,F.silu,ours,again --threads 1 --min-run-time 0.001")
    run = start("--device", "cpu", "--bench", cases, part="time")
    assert gpu.timings(run) == ("passed", [])
    found = out(tmp_path, "timings.json")
    assert [(r["dtype"], r["layout"]) for r in found["results"]] == [
        (dtype, layout) for dtype in ("bfloat16", "float32") for layout in ("contiguous", "channels_last")
    ]
    assert found["chosen"] == 4 and len(out(tmp_path, "timings.csv").splitlines()) == 1 + 4 * 4
    low, high = found["results"][0]["providers"]["ours"]["wall_interval"]
    assert low <= found["results"][0]["providers"]["ours"]["wall_seconds"] <= high
    run.write()
    summary = out(tmp_path, "summary.md")
    assert "| bfloat16 | forward | channels_last | 1 |" in summary and "says nothing about CUDA" in summary


@pytest.mark.parametrize("ratio, status", [(1.0, "passed"), (0.97, "noisy"), (1.03, "noisy")])
def test_a_run_whose_own_times_differ_is_noisy(start, tmp_path, monkeypatch, ratio, status):
    """Stand-ins for what measures: ours again takes `ratio` times as long."""
    measured = {"chosen": 1, "results": [result([1, 64], {"ours": (1, 1), "again": (ratio, ratio)})]}
    program = f"import sys; open(sys.argv[sys.argv.index('--json') + 1], 'w').write({json.dumps(measured)!r})"
    run = start("--device", "cpu", part="time")
    python = run.python

    def stand_in(name, arguments, limit, **environment):
        code = program if name == "timings" else ""
        return python(name, ["-c", code, *map(str, arguments[1:])], limit, **environment)

    run.python = stand_in
    found, notes = gpu.timings(run)
    assert found == status and bool(notes) == (status == "noisy")
    assert ("**NOISY**" in gpu_summary.summary(run.data, measured)) == (status == "noisy")


@pytest.mark.parametrize("limit, bench, note, status", [
    (1, "--op --shape 2,32,4 --forward --providers eager,ours --min-run-time 0.001", "timed out", "passed"),
    (30, "--no-such-option", "failed", "failed"),
])
def test_compiling_ahead_ends_before_anything_is_timed(start, monkeypatch, limit, bench, note, status):
    monkeypatch.setitem(gpu.LIMITS, "compile", limit)  # a second is less than it takes to import torch
    run = start("--device", "cpu", f"--bench={bench}", part="time")
    found, notes = gpu.timings(run)
    assert found == status and notes[0] == f"compiling ahead for torch.compile {note}"
    assert [job.name for job in run.jobs] == ["compile", "timings"] and run.jobs[0].status == note


def test_no_time_for_timings_is_a_failure(start):
    run = start("--device", "cpu", "--seconds", "0", part="time")
    status, notes = gpu.timings(run)
    assert status in ("failed", "timed out") and notes[-1] == "nothing was measured"


# ---- the command


def test_help_needs_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    command = [sys.executable, str(ROOT / "tools" / "gpu.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0 and "summary.md" in done.stdout, done.stderr
