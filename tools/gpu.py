#!/usr/bin/env python3
"""Runs on a GPU in two parts of four minutes, `correct` and `time`, and writes down the results of each."""

import argparse
import contextlib
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

# torch is imported only when it is needed: --help answers at once
from tools import gpu_summary  # noqa: E402
from tools.gpu_verdicts import judged, sanitized, totals, worst  # noqa: E402

EPILOG = """\
stages; one that fails or runs out of time stops none that follow:
  correct
    build      the extension
    tests      those that use the GPU, in several processes
    instances  every instance of every kernel, with the plan's tier enforced (LDM_FUSED_STRICT_PLAN=1), beside the tests
    sanitizer  compute-sanitizer's tools over the calls of tools/small_cases.py, for the time that is left
  time
    build      the same, which has little to do after the other part
    timings    bench_fused.py --sample, with what torch.compile makes of it compiled ahead
    decoder    the decoder of an autoencoder, for the time that is left

in OUT, written anew every few seconds, so that a run which is killed leaves what it had:
  summary.md                    one page
  run.json                      the same as data, and every test that failed
  timings.json, timings.csv     by bench_fused.py
  decoder.json                  the same
  log.txt                       what every command printed

The exit status is 0 if no stage failed. COMMIT=... names the commit where git does not know it.
benchmarks/results/README.md says how to read and compare the files.
"""
SMALL_CASES = ROOT / "tools" / "small_cases.py"
PARTS = {"correct": ("build", "tests", "instances", "sanitizer"), "time": ("build", "timings", "decoder")}
SECONDS = 225  # of a part: with the start and the end it takes no more than four minutes
LIMITS = {"build": 120, "tests": 75, "compile": 60}  # seconds; what comes last has the rest
DECODER = 25  # seconds that timings leave to the decoder
# The tests that use the device. The emulated ones stay out, for the emulator compiles for minutes; one of them that
# these do not name is skipped, by LDM_FUSED_EMULATOR=none.
USES = "{} and not emulated"
WITHOUT = ("tests/tools", "tests/test_cuda_kernels.py", "tests/test_emulator.py")
PROVIDERS = "eager,F.silu,compile,triton,ours,again"  # cooperative was slower than compile, and compiles as long
WAYS = "eager,channels_last,patch,patch+both,patch+both+graph,again"
RESULTS = ("timings.json", "timings.csv", "decoder.json")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# What a tool must say of a mistake on purpose (tools/small_cases.py --wrong): else its silence proves nothing.
MISTAKES = {"memcheck": ("outside", r"Invalid .*read"), "initcheck": ("unwritten", "Uninitialized")}
WRITE = 5  # seconds from one writing to the next
LOG = 1 << 20  # so many of the last characters that a command printed are kept


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
        self.instances: Optional[Job] = None
        self.folder = Path(tempfile.mkdtemp(prefix="ldm_fused-gpu-"))
        self.data: dict = {
            "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "seconds": 0.0,
            "part": args.part,
            "device": args.device,
            "machine": describe(args.device),
            "stages": [{"name": name, "status": "not run", "seconds": 0.0, "notes": []} for name in args.stages],
        }
        args.out.mkdir(parents=True, exist_ok=True)
        for name in RESULTS:  # of an earlier run
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
        """Waits until all of them have ended. `look` brings `data` up to date before it is written."""
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
            "summary.md": gpu_summary.summary(self.data, *(read_json(self.args.out / f"{name}.json")
                                                           for name in ("timings", "decoder"))),
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
    """The machine, the versions and the commit; nvidia-smi describes the GPU."""
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


# ---- the stages: each returns its status and notes, and leaves the rest in run.data


def build(run: Run):
    """The extension; then what the binary says of itself."""
    force = {"FORCE_CUDA": "1"} if run.args.device == "cuda" else {}  # else a missing nvcc would raise no error
    job = run.start("build", ["make", "build", f"PYTHON={sys.executable}"], LIMITS["build"], **force)
    run.wait(job)
    code = "import json, ldm_fused; print(json.dumps(ldm_fused.build_info()))"
    info = run.python("build info", ["-c", code], 60)
    run.wait(info)
    if info.status == "passed":
        run.data["machine"]["build"] = json.loads(info.output().splitlines()[-1])
    notes = [f"{each.name}: {each.status}" for each in (job, info) if each.status != "passed"]
    if job.status != "passed":
        notes.append("what follows is about an older binary, if there is one")
    return worst([job.status, info.status]), notes


def tests(run: Run):
    """The tests that use the device, in parts side by side; and beside them every instance of the kernels."""
    cores = run.data["machine"]["cores"]
    parts = max(1, min(8, cores // 2))
    if "instances" in run.args.stages:
        run.instances = start_instances(run)
    jobs, records = [], []
    for part in (f"{i}/{parts}" for i in range(1, parts + 1)):
        records.append(run.folder / f"part-{len(records)}.jsonl")
        options = ["-q", "--tb=short", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
        options += ["-o", f"faulthandler_timeout={LIMITS['tests'] - 30}"]
        options += ["-p", "tools.part", f"--part={part}", f"--record={records[-1]}"]
        if run.args.pytest:
            options += shlex.split(run.args.pytest)
        else:
            options += ["-k", USES.format(run.args.device), *(f"--ignore={path}" for path in WITHOUT)]
        name, threads = f"tests {part}".replace("/", " of "), str(max(2, cores // parts))
        environment = dict(OMP_NUM_THREADS=threads, LDM_FUSED_EMULATOR="none")
        jobs.append(run.python(name, ["-m", "pytest", *options], LIMITS["tests"], **environment))

    def look() -> None:
        run.data["tests"] = totals([record.read_text() for record in records if record.exists()])

    run.wait(*jobs, look=look)
    notes = judged(run.data["tests"], run.args.device)
    # 5: a part in which -k leaves nothing. Whether anything ran at all is among the notes.
    return worst([*(job.status for job in jobs if job.code != 5), "failed" if notes else "passed"]), notes


def start_instances(run: Run) -> Job:
    options = [SMALL_CASES, "--device", run.args.device, "--instances"]
    return run.python("instances", options, LIMITS["tests"] + 15, LDM_FUSED_STRICT_PLAN="1")


def instances(run: Run):
    """Every instance of every kernel, each case against float64."""
    job = run.instances or start_instances(run)
    run.wait(job)
    found = re.findall(r"^(?:cases right|instances run): .*", job.output(), re.M)
    run.data["instances"] = found
    if job.status == "passed" and run.args.device == "cpu":
        return "not available", [*found[:1], "kernels have instances on a GPU alone"]
    return job.status, found or job.output().strip().splitlines()[-1:]


def sanitizer(run: Run):
    """Each tool over the small cases, side by side; two of them also over a mistake that they must find."""
    toolkit = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    path = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), toolkit]))
    if run.args.device == "cpu" or not path:
        return "not available", ["it needs a GPU" if run.args.device == "cpu" else "compute-sanitizer is not installed"]
    # Each tool's cases in two processes, with ports of their own.
    runs = [(tool, f"part {i} of 2", ["--part", f"{i}/2"]) for tool in TOOLS for i in (1, 2)]
    runs += [(tool, "a mistake on purpose", ["--wrong", mistake]) for tool, (mistake, _) in MISTAKES.items()]
    jobs, limit = {}, run.left() - 3
    for tool, what, arguments in runs:
        command = [path, "--tool", tool, "--error-exitcode", 99, "--print-limit", 20]
        command += ["--kernel-name", "kns=ldm_fused"]  # not PyTorch's kernels: the script keeps them out of the way
        if tool == "memcheck":  # or an access beyond a tensor may hit the next one, which is as good
            command += ["--padding", 4096]
        command += ["--port", 49152 + 64 * len(jobs), sys.executable, SMALL_CASES, *arguments]
        name = f"sanitizer {tool}, {what}"
        jobs[tool, what] = run.start(name, command, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1", OMP_NUM_THREADS="1")
    run.wait(*jobs.values())
    verdicts = {}
    for (tool, what), job in jobs.items():
        sign = MISTAKES[tool][1] if "mistake" in what else ""
        verdicts[f"{tool}, {what}"] = sanitized(job.output(), job.status, sign)
    run.data["sanitizer"] = verdicts
    notes = [f"{name}: {verdict['why']}" for name, verdict in verdicts.items() if verdict["status"] != "passed"]
    return worst([verdict["status"] for verdict in verdicts.values()]), notes


def timings(run: Run):
    """What torch.compile needs, compiled on all cores; then bench_fused.py, for all but the decoder's time."""
    fixed = ["benchmarks/bench_fused.py", "--device", run.args.device, *shlex.split(run.args.bench)]
    notes, out = [], run.args.out
    limit = min(LIMITS["compile"], run.left() / 2)
    options = [*fixed, "--prepare", max(1, run.data["machine"]["cores"] - 1), "--budget", limit / 2]
    prepare = run.python("compile", options, limit)  # its budget is half of that, so what it has begun can end
    run.wait(prepare)
    if prepare.status != "passed":
        notes.append(f"compiling ahead for torch.compile {prepare.status}")
    left = run.left() - (DECODER if "decoder" in run.args.stages else 0)
    # The rest is for the start and for the case in which the budget ends.
    options = [*fixed, "--budget", max(1, round(left - 14))]
    options += ["--json", out / "timings.json", "--csv", out / "timings.csv"]
    job = run.python("timings", options, left)
    run.wait(job)
    found = read_json(out / "timings.json")
    notes += gpu_summary.gaps(found)
    if not found or not found["results"]:
        return worst([job.status, "failed"]), [*notes, "nothing was measured"]
    run.data["again"] = again = gpu_summary.again(found["results"])
    if job.status == "passed" and again and again["noisy"]:
        return "noisy", [*notes, gpu_summary.noise(again)]
    return job.status, notes


def decoder(run: Run):
    """Decoding with random weights, for the time that is left."""
    options = ["benchmarks/bench_fused.py", "--device", run.args.device, "--model", "ldm", "--decode"]
    options += [*shlex.split(run.args.decoder), "--json", run.args.out / "decoder.json"]
    job = run.python("decoder", options, run.left())
    run.wait(job)
    found = read_json(run.args.out / "decoder.json")
    return job.status, [] if found and found["results"] else ["nothing was measured"]


STAGES = {"build": build, "tests": tests, "instances": instances, "sanitizer": sanitizer, "timings": timings,
          "decoder": decoder}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add("part", choices=PARTS)
    add("--out", type=Path, metavar="OUT", help="folder for the results (build/gpu/ and the part's name)")
    add("--seconds", type=float, default=SECONDS, metavar="S", help="for all stages together (%(default)s)")
    add("--stages", type=stage_list, metavar="A,B", help="only these of the part")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try this script, not the CUDA kernels")
    add("--pytest", default="", metavar="ARGS", help="other tests: arguments for pytest")
    add("--bench", default=f"--sample --providers {PROVIDERS} --min-run-time 0.03", metavar="ARGS",
        help="other cases: arguments for bench_fused.py (%(default)s)")  # fmt: skip
    add("--decoder", default=f"--resolution 1024 --dtype bfloat16 --providers {WAYS}", metavar="ARGS",
        help="arguments for its --model ldm --decode (%(default)s)")
    return p


def stage_list(text: str) -> List[str]:
    unknown = [name for name in text.split(",") if name not in STAGES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no stage {unknown[0]!r}: choose from {', '.join(STAGES)}")
    return text.split(",")


def parse(argv=None) -> argparse.Namespace:
    args = parser().parse_args(argv)
    args.stages = [name for name in PARTS[args.part] if args.stages is None or name in args.stages]
    args.out = (args.out or ROOT / "build" / "gpu" / args.part).resolve()
    return args


def main(argv=None) -> int:
    args = parse(argv)
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
