#!/usr/bin/env python3
"""One command for a GPU machine: builds, tests, sanitizes, times, and writes down what came of it. See --help."""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, List, Optional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_summary  # noqa: E402  (torch is imported only when it is needed: --help answers at once)

EPILOG = """\
stages, in the order of worth; one that fails or runs out of time stops none that follow:
  build      the extension, and beside it the emulator that runs the CUDA kernels on the CPU
  tests      the whole suite, in several processes
  sanitizer  compute-sanitizer's tools over the calls of tests/small_cases.py, where the machine has it
  timings    bench_fused.py over all workloads, in both layouts and two dtypes, for what is left of --seconds

in OUT, written anew every few seconds, so that a run which is killed leaves what it had:
  summary.md                                one page
  run.json                                  the same as data, and every test that failed
  timings.json, timings.csv, timings.png    by bench_fused.py
  log.txt                                   what every command printed

The exit status is 0 if no stage failed. COMMIT=... names the commit where the tree has no git.
"""
SMALL_CASES = ROOT / "tests" / "small_cases.py"
LIMITS = {"build": 180, "tests": 170, "sanitizer": 90}  # seconds; timings have the rest
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# What a tool must say of a mistake on purpose (tests/small_cases.py --wrong), or its silence elsewhere proves nothing.
MISTAKES = {"memcheck": ("outside", r"Invalid .*read"), "initcheck": ("unwritten", "Uninitialized")}
WRITE = 5  # seconds from one writing to the next
LOG = 1 << 20  # characters kept of what one command printed: the last


class Job:
    """A command in a process group of its own, with a time limit; what it prints goes to a file."""

    def __init__(self, name: str, command: list, limit: float, folder: Path, environment: Dict[str, str]) -> None:
        self.name, self.command, self.path = name, list(map(str, command)), folder / f"{name}.log"
        self.begun, self.limit, self.seconds = time.monotonic(), limit, 0.0
        self.status, self.code = "running", None
        with open(self.path, "w") as log:
            try:
                how = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
                self.process = subprocess.Popen(self.command, cwd=ROOT, env=environment, **how)
            except OSError as e:
                self.status = "failed"
                log.write(f"{e}\n")

    def running(self) -> bool:
        """Whether it still runs; at its limit it is ended."""
        if self.status == "running":
            self.code, self.seconds = self.process.poll(), time.monotonic() - self.begun
            if self.code is not None:
                self.status = "passed" if self.code == 0 else "failed"
            elif self.seconds > self.limit:
                self.end("timed out")
        return self.status == "running"

    def end(self, status: str) -> None:
        """Ends it, and all that it started, if it still runs."""
        if self.status == "running":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.status = status

    def output(self) -> str:
        return self.path.read_text(errors="replace")

    def log(self) -> str:
        """Its part of log.txt."""
        text = self.output()
        cut = f"[{len(text) - LOG} characters left out]\n" if len(text) > LOG else ""
        head = f"=== {self.name}: {self.status}, {self.seconds:.0f} s\n$ {shlex.join(self.command)}\n"
        return f"{head}{cut}{text[-LOG:]}\n"


class Run:
    """The stages so far; `data` is what run.json holds."""

    def __init__(self, args) -> None:
        self.args, self.begun, self.written = args, time.monotonic(), 0.0
        self.jobs: List[Job] = []
        self.prepare: Optional[Job] = None
        self.folder = Path(tempfile.mkdtemp(prefix="ldm_fused-gpu-"))
        self.data: dict = {
            "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "seconds": 0.0,
            "device": args.device,
            "machine": describe(args.device),
            "stages": [{"name": name, "status": "not run", "seconds": 0.0, "notes": []} for name in args.stages],
        }
        args.out.mkdir(parents=True, exist_ok=True)
        for name in ("timings.json", "timings.csv", "timings.png"):  # of an earlier run
            (args.out / name).unlink(missing_ok=True)

    def left(self) -> float:
        return self.args.seconds - (time.monotonic() - self.begun)

    def start(self, name: str, command: list, limit: float, **environment: str) -> Job:
        path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
        outer = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
        environment = {**outer, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment}
        job = Job(name, command, max(1, min(limit, self.left())), self.folder, environment)
        self.jobs.append(job)
        return job

    def python(self, name: str, arguments: list, limit: float, **environment: str) -> Job:
        return self.start(name, [sys.executable, *arguments], limit, **environment)

    def wait(self, *jobs: Job, look: Callable[[], None] = lambda: None) -> None:
        """Until all of them have ended; `look` brings `data` up to date before it is written."""
        while any([job.running() for job in jobs]):
            if time.monotonic() - self.written > WRITE:
                look()
                self.write()
            time.sleep(0.1)
        look()

    def write(self) -> None:
        """Brings OUT up to date. Each file is replaced as a whole, and can be read whenever the run is killed."""
        self.written = time.monotonic()
        self.data["seconds"] = round(self.written - self.begun, 1)
        texts = {
            "run.json": json.dumps(self.data, indent=1) + "\n",
            "log.txt": "\n".join(job.log() for job in self.jobs),
            "summary.md": gpu_summary.summary(self.data, read_json(self.args.out / "timings.json")),
        }
        for name, text in texts.items():
            part = self.args.out / f"{name}.part"
            part.write_text(text)
            part.replace(self.args.out / name)

    def finish(self) -> int:
        """Ends what is left, writes, and returns the exit status."""
        for job in self.jobs:
            job.end("stopped")
        for stage in self.data["stages"]:
            stage["status"] = "stopped" if stage["status"] == "running" else stage["status"]
        self.write()
        shutil.rmtree(self.folder, ignore_errors=True)
        return 0 if all(stage["status"] in gpu_summary.GOOD for stage in self.data["stages"]) else 1


def describe(device: str) -> dict:
    """Where the results come from; of the GPU what nvidia-smi says."""
    import torch

    from benchmarks import machine

    found = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0]}
    found.update(cpu=machine.cpu_name(), cores=machine.cores(), commit=machine.commit())
    if device == "cuda":
        query = "--query-gpu=name,driver_version,memory.total,compute_cap"
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            lines = subprocess.check_output(["nvidia-smi", query, "--format=csv,noheader"], text=True, timeout=20)
            values = map(str.strip, lines.split("\n")[0].split(","))
            found.update(zip(("gpu", "driver", "memory", "capability"), values))
    return found


def read_json(path: Path) -> Optional[dict]:
    return json.loads(path.read_text()) if path.exists() else None


def worst(statuses) -> str:
    """One status for all of them."""
    return next(s for s in ("timed out", "failed", "passed", "not available") if s in statuses)


# ---- the stages: each returns its status and notes, and leaves the rest in run.data


def build(run: Run):
    """The extension and the emulator's modules, side by side; then what the binary says of itself."""
    force = {"FORCE_CUDA": "1"} if run.args.device == "cuda" else {}  # or no nvcc would mean no kernels, and no error
    jobs = [run.start("build", ["make", "build", f"PYTHON={sys.executable}"], LIMITS["build"], **force)]
    for module in ("library", "emulator_selftest"):
        code = f"from emulator import build; build.load({module!r})"
        jobs.append(run.python(f"build emulator {module}", ["-c", code], LIMITS["build"]))
    run.wait(*jobs)
    code = "import json, ldm_fused; print(json.dumps(ldm_fused.build_info()))"
    info = run.python("build info", ["-c", code], 60)
    run.wait(info)
    if info.status == "passed":
        run.data["machine"]["build"] = json.loads(info.output().splitlines()[-1])
    notes = [f"{job.name}: {job.status}" for job in [*jobs, info] if job.status != "passed"]
    if jobs[0].status != "passed":
        notes.append("what follows is about an older binary, if there is one")
    return worst([job.status for job in [*jobs, info]]), notes


def tests(run: Run):
    """The suite in parts side by side; on the other cores what torch.compile will be timed with is compiled."""
    cores = run.data["machine"]["cores"]
    parts = max(1, min(8, cores // 2))
    if "timings" in run.args.stages and run.args.device == "cuda":
        options = ["benchmarks/bench_fused.py", *cases(run), "--prepare", max(1, cores - parts - 1)]
        run.prepare = run.python("prepare", options, run.args.seconds)
    jobs, records = [], []
    for part in (f"{i}/{parts}" for i in range(1, parts + 1)):
        records.append(run.folder / f"part-{len(records)}.jsonl")
        options = ["-q", "--tb=short", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
        options += ["-o", f"faulthandler_timeout={LIMITS['tests'] - 30}"]
        options += ["-p", "part", f"--part={part}", f"--record={records[-1]}", *shlex.split(run.args.pytest)]
        name, threads = f"tests {part}".replace("/", " of "), str(max(2, cores // parts))
        jobs.append(run.python(name, ["-m", "pytest", *options], LIMITS["tests"], OMP_NUM_THREADS=threads))

    def look() -> None:
        run.data["tests"] = totals([record.read_text() for record in records if record.exists()])

    run.wait(*jobs, look=look)
    notes = judged(run.data["tests"], run.args.device)
    # 5: a part in which -k leaves nothing. Whether anything ran at all is among the notes.
    return worst([*(job.status for job in jobs if job.code != 5), "failed" if notes else "passed"]), notes


def totals(records: List[str]) -> dict:
    """From what the parts wrote down: the counts, those of tests that used the GPU, and what failed."""
    outcomes, whys, on_gpu, lost, interrupted = {}, {}, set(), [], []
    for record in records:
        chosen = []
        for text in record.splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # cut off when its process was ended
                continue
            if "chosen" in line:
                chosen = line["chosen"]
            elif outcomes.get(line["id"]) != "failed":  # what passed can still fail when it is taken down
                outcomes[line["id"]], whys[line["id"]] = line["outcome"], line["why"]
            if line.get("on_gpu"):
                on_gpu.add(line["id"])
        left = [i for i in chosen if i not in outcomes]
        lost, interrupted = lost + left, interrupted + left[:1]

    def counts(ids) -> Dict[str, int]:
        return {kind: sum(outcomes[i] == kind for i in ids) for kind in ("passed", "failed", "skipped")}

    return {
        **counts(outcomes),
        "on_gpu": counts(on_gpu),
        "failures": {i: whys[i] for i in sorted(outcomes) if outcomes[i] == "failed"},
        "interrupted": interrupted,
        "without_outcome": lost,
        "skips": gpu_summary.counted(whys[i] for i in outcomes if outcomes[i] == "skipped"),
    }


def judged(found: dict, device: str) -> List[str]:
    """Why such totals are no pass."""
    lost = len(found["without_outcome"])
    reasons = {
        f"{found['failed']} failed": found["failed"],
        f"{lost} have no outcome: their process died, or was ended": lost,
        "no test passed": not found["passed"],
        "no test that used the GPU passed": device == "cuda" and not found["on_gpu"]["passed"],
    }
    return [reason for reason, is_so in reasons.items() if is_so]


def sanitizer(run: Run):
    """Each tool over the small cases, side by side; two of them also over a mistake that they must find."""
    toolkit = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    path = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), toolkit]))
    if run.args.device == "cpu" or not path:
        return "not available", ["it needs a GPU" if run.args.device == "cpu" else "compute-sanitizer is not installed"]
    jobs, limit = {}, LIMITS["sanitizer"]
    for tool, mistake in [(tool, "") for tool in TOOLS] + [(tool, name) for tool, (name, _) in MISTAKES.items()]:
        command = [path, "--tool", tool, "--error-exitcode", 99, "--print-limit", 20]
        command += ["--kernel-name", "kns=ldm_fused"]  # not PyTorch's kernels: the script keeps them out of the way
        command += ["--port", 49152 + 64 * len(jobs)]  # tools side by side, each with ports of its own
        command += [sys.executable, SMALL_CASES, *(["--wrong", mistake] if mistake else [])]
        name = " ".join(filter(None, ["sanitizer", tool, mistake]))
        jobs[tool, mistake] = run.start(name, command, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    kernels = run.python("sanitizer kernels", [SMALL_CASES, "--kernels"], limit)
    run.wait(*jobs.values(), kernels)
    verdicts = {}
    for (tool, mistake), job in jobs.items():
        sign = MISTAKES[tool][1] if mistake else ""
        verdicts[f"{tool}, a mistake on purpose" if mistake else tool] = sanitized(job.output(), job.status, sign)
    reached = re.search(r"^kernels run: (.*)", kernels.output(), re.M)
    run.data["sanitizer"] = {"tools": verdicts, "kernels": reached[1] if reached else f"not known, {kernels.status}"}
    notes = [f"{name}: {verdict['why']}" for name, verdict in verdicts.items() if verdict["status"] != "passed"]
    return worst([verdict["status"] for verdict in verdicts.values()]), notes


def sanitized(log: str, status: str, sign: str = "") -> dict:
    """What the output of a tool comes to: status, number of errors, and why. With `sign`, a pattern, the run has a
    mistake in it, and passes if the tool says so."""

    def verdict(status: str, why: str) -> dict:
        return {"status": status, "errors": errors, "why": why}

    counts = re.findall(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", log, re.M)
    errors = sum(map(int, counts)) if counts else None
    if status == "timed out":
        return verdict("timed out", "it ran out of time")
    if re.search(r"^=+ .*Device not supported", log, re.M):
        return verdict("not available", "it does not support this device")
    if errors is None:
        said = re.search(r"^=+ Error: (.*)", log, re.M)
        return verdict("failed", f"no summary{f': {said[1]}' if said else ''}")
    if sign:
        found = errors and re.search(f"^=+ .*{sign}", log, re.M)
        return verdict("passed", "found") if found else verdict("failed", "the mistake went unseen")
    cases = re.search(r"^cases right: (\d+)", log, re.M)
    if errors:
        return verdict("failed", f"{errors} errors")
    if status != "passed" or not cases:
        return verdict("failed", "no error, but the cases did not end well")
    return verdict("passed", f"{cases[1]} cases right")


def timings(run: Run):
    """bench_fused.py for the time that is left."""
    notes = []
    if run.prepare and run.prepare.running():
        run.prepare.end("stopped")  # it would disturb the timings
    if run.prepare and run.prepare.status != "passed":
        notes.append(f"compiling ahead for torch.compile {run.prepare.status}".replace("stopped", "was stopped"))
    out, left = run.args.out, run.left()
    # The rest is for the start, the case in which the budget ends, and the plot.
    options = [*cases(run), "--budget", max(5, round(left - 45))]
    options += ["--json", out / "timings.json", "--csv", out / "timings.csv"]
    if importlib.util.find_spec("matplotlib"):
        options += ["--plot", out / "timings.png"]
    else:
        notes.append("no plot: matplotlib is not installed")
    job = run.python("timings", ["benchmarks/bench_fused.py", *options], left)
    run.wait(job)
    found = read_json(out / "timings.json")
    notes += gpu_summary.gaps(found)
    if not found or not found["results"]:
        return worst([job.status, "failed"]), [*notes, "nothing was measured"]
    return job.status, notes


def cases(run: Run) -> list:
    """bench_fused.py's options that say what to time."""
    fixed = ["--op", "--device", run.args.device, "--dtype", "bfloat16,float32", "--layout", "both"]
    return [*fixed, "--min-run-time", "0.03", *shlex.split(run.args.bench)]


STAGES = {"build": build, "tests": tests, "sanitizer": sanitizer, "timings": timings}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add("--out", type=Path, default=ROOT / "build" / "gpu", metavar="OUT", help="folder for the results (build/gpu)")
    add("--seconds", type=float, default=520, metavar="S", help="for all stages together (520)")
    add("--stages", type=stage_list, default=list(STAGES), metavar="A,B", help="only these")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try this script, not the CUDA kernels")
    add("--pytest", default="", metavar="ARGS", help="more arguments for pytest")
    add("--bench", default="--suite all", metavar="ARGS", help="other cases for bench_fused.py (--suite all)")
    return p


def stage_list(text: str) -> List[str]:
    unknown = [name for name in text.split(",") if name not in STAGES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no stage {unknown[0]!r}: choose from {', '.join(STAGES)}")
    return [name for name in STAGES if name in text.split(",")]


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    args.out = args.out.resolve()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("PyTorch sees no GPU here. --device cpu tries the script without one.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what runs is ended, and what there is written
    run = Run(args)
    try:
        for stage in run.data["stages"]:
            begun, stage["status"] = time.monotonic(), "running"
            run.write()
            print(f"{stage['name']} ...", flush=True)
            try:
                stage["status"], stage["notes"] = STAGES[stage["name"]](run)
            except Exception as e:  # a mistake in this script costs one stage, not the others
                stage["status"], stage["notes"] = "failed", [f"{type(e).__name__}: {e}"]
            finally:
                stage["seconds"] = round(time.monotonic() - begun, 1)
            lines = [f"{stage['name']}: {stage['status']}, {stage['seconds']:.0f} s", *stage["notes"]]
            print("\n  ".join(lines), flush=True)
    finally:
        status = run.finish()
    print("\n" + (args.out / "summary.md").read_text())
    return status


if __name__ == "__main__":
    sys.exit(main())
