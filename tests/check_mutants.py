"""Makes mistakes in the CUDA kernels, one at a time, and shows that the tests catch each.

`make mutants` leaves out each barrier and moves each bound of an index by one, up and down: a mutant is caught if a
test of the emulated kernels fails, if they crash, or if they do not come to an end. It fails (status 1) where one
survives: that is a test that is missing, or a mistake that is none, which is then entered below with the reason.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "mutants"  # the kernels with all mistakes in them, to be switched on
SELECTION = """same_bits_in_every or every_device and H200 or counts_are and H200 or emulated and (float32-None or
bfloat16-None or optional or one_gradient or large_mean or misaligned) and not (64-64 or 16385)""".replace("\n", " ")
TESTS = ["-x", "-q", "-p", "no:cacheprovider", "tests/test_cuda_kernels.py", "tests/test_traffic.py",
         "tests/test_kernels.py", "-k", SELECTION]
# The emulator watches memory; of arrays that a thread keeps to itself the compiler can watch the bounds.
FLAGS = "-fsanitize=bounds -fsanitize-undefined-trap-on-error"
PATIENCE = 2  # how many times what the tests take without a mutant

BARRIER = r"__syncthreads\(\)|__syncwarp\(\)|__threadfence\(\)|\.sync\(\)"
# Bounds that the compiler evaluates, and those that choose between ways to the same result.
NO_BOUNDS = ("alignas(", "sizeof(X) < sizeof(Y)")

# Part of a line, the mistake in it, and why it changes no result.
HARMLESS = [
    ("team < 32 ? team : 32", "bound + 1", "32 either way"),
    ("team < 32 ? team : 32", "bound - 1", "a team is a power of two"),
    ("if (team > 32)", "bound + 1", "a team of more than 32 threads has 256"),
    ("i < unit.end; i += kInFlight * unit.step", "bound + 1", "each access in the loop is checked by itself"),
    ("InFlight - 1) * unit.step < unit.end", "bound - 1", "the loop behind it takes what this one leaves"),
]


@dataclass(frozen=True)
class Mutant:
    number: int
    file: str
    line: int
    source: str
    mistake: str

    def __str__(self):
        return f"{self.file}:{self.line}: {self.mistake}: {self.source}"

    @property
    def reason(self):
        """Why it is harmless; None where it is not."""
        return next((why for part, mistake, why in HARMLESS if part in self.source and mistake == self.mistake), None)


def mutate(text, file, mutants):
    """The text with switches for mistakes in it; appends what they are to ``mutants``."""
    lines = text.splitlines()
    for i, line in enumerate(lines):
        code = line.split("//")[0]
        if code.lstrip().startswith("#") or any(part in code for part in NO_BOUNDS):
            continue

        def add(*mistakes):
            first = len(mutants)
            for mistake in mistakes:
                mutants.append(Mutant(len(mutants), file, i + 1, line.strip(), mistake))
            return first

        def barrier(match):
            return f"{match[1]}if (!mutation::is({add('left out')})) {match[2]}"

        def comparison(match):
            return f" {match[1]} mutation::bound({add('bound + 1', 'bound - 1')}) {match[1]} "

        def least(match):
            return f"mutation::least({add('least + 1', 'least - 1')}, "

        code = re.sub(rf"(^|\s)([\w.]*(?:{BARRIER}))", barrier, code)
        code = re.sub(r" (<=|>=|<|>) ", comparison, code)
        code = re.sub(r"\bmin\(", least, code)
        lines[i] = code
    return "\n".join(lines) + "\n"


def make_copy(in_folder=COPY.name):
    """All mutants, of which the copy has the switches."""
    copy = COPY.with_name(in_folder)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    shutil.copytree(ROOT / "tests" / "emulator", copy / "tests" / "emulator",
                    ignore=shutil.ignore_patterns("__pycache__"))
    mutants = []
    for path in sorted((copy / "csrc" / "cuda").glob("*.cuh")):
        path.write_text(mutate(path.read_text(), str(path.relative_to(copy)), mutants))
    common = copy / "csrc" / "cuda" / "common.cuh"
    common.write_text(common.read_text().replace("#include <cuda_runtime.h>\n",
                                                 '#include <cuda_runtime.h>\n\n#include "mutation.h"\n', 1))
    return mutants


def run_tests(number, limit=None):
    """(whether they passed, what they said last) with that mutant, in ``limit`` seconds; -1: with none."""
    environment = {**os.environ, "LDM_FUSED_MUTANT": str(number), "LDM_FUSED_EMULATOR_ROOT": str(COPY),
                   "LDM_FUSED_EMULATOR_FLAGS": FLAGS}
    try:
        result = subprocess.run([sys.executable, "-m", "pytest", *TESTS], cwd=ROOT, env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit)
    except subprocess.TimeoutExpired:
        return False, "it does not come to an end"
    failure = re.search(r"^(?:FAILED|ERROR) \S+::(.+?)(?: - |$)", result.stdout, re.M)
    if result.returncode == 1 and failure:
        return False, failure[1]
    if result.returncode < 0:
        return False, f"killed by signal {-result.returncode}"
    return result.returncode == 0, result.stdout[-2000:]


def main():
    mutants = make_copy()
    wanted = [m for m in mutants if m.reason is None]
    print(f"{len(mutants)} mutants, of which {len(mutants) - len(wanted)} are harmless. First without any.", flush=True)
    run_tests(-1)  # the emulator is built here
    start = time.monotonic()
    passed, said = run_tests(-1)
    if not passed:
        sys.exit(f"Without a mutant the tests fail already:\n{said}")
    limit = 10 + PATIENCE * (time.monotonic() - start)

    survivors, start = [], time.monotonic()
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:
        mutant_of = {pool.submit(run_tests, mutant.number, limit): mutant for mutant in wanted}
        for done, run in enumerate(as_completed(mutant_of), 1):
            mutant, (passed, said) = mutant_of[run], run.result()
            if passed:
                survivors.append(mutant)
            verdict = "SURVIVES" if passed else f"caught by {said}"
            print(f"[{done}/{len(wanted)}, {time.monotonic() - start:.0f} s] {mutant}\n    {verdict}", flush=True)
    for mutant in survivors:
        print(f"Survives: {mutant}")
    print(f"mutants: {len(wanted) - len(survivors)} of {len(wanted)} caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
