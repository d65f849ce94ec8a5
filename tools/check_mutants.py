"""Makes mistakes in the CUDA kernels, one at a time, and shows that the tests catch each.

`make mutants` leaves out each barrier and moves each bound of an index by one, up and down. A mutant is caught if a
test of the emulated kernels fails, crashes, or does not come to an end. The run fails (status 1) where a mutant
survives. Then a test is missing, or the mistake changes no result: enter it in HARMLESS with the reason.

Tests are collected once, and run once without a mutant, to see which reach which mutant. Then, for each mutant, a fork
of this process runs the tests that reach it, the quickest first, until one fails.

    tools/check_mutants.py [--only 17,18]
"""

import argparse
import ctypes
import functools
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "mutants"  # the kernels with all mistakes in them, to be switched on
SELECTION = """every_tier and not bfloat16-None or any_tier or every_device and 32-dtype or counts_are and T4 or
smaller_size or each_quarter or same_bits_in_every and (clusters or default) or emulated and (float32-None or
optional or one_gradient or large_mean or misaligned) and not (64-64 or 16385) or test_residual and (emulated and
(float32 or optional) or as_planned) and not 16385""".replace("\n", " ")
TESTS = ["-q", "-s", "--no-header", "--no-summary", "-p", "no:cacheprovider", "tests/test_cuda_kernels.py",
         "tests/tools/test_traffic.py", "tests/test_kernels.py", "tests/test_residual.py", "tests/test_dropout.py",
         "-k", SELECTION]
# The emulator does not watch arrays that a thread keeps to itself: the compiler checks their bounds.
FLAGS = "-fsanitize=bounds -fsanitize-undefined-trap-on-error"
PATIENCE = 8  # a test may take so many times as long as without a mutant: other runs share the machine

# What makes an asynchronous copy arrive counts too. Of functions that the kernels define, only calls are matched.
BARRIER = (r"__syncthreads\(\)|__syncwarp\(\)|__threadfence\(\)|\.sync\(\)|cluster_wait\(\)(?=;)|"
           r"commit_copies\(\)(?=;)|wait_for_copies<\d>\(\)|wait_for\(counter_, target_\)")
# Bounds that the compiler evaluates, and those that choose between ways to the same result.
NO_BOUNDS = ("alignas(", "static_assert(", "constexpr bool", "sizeof(X) < sizeof(Y)", "kHeld > 0")

# Part of a line, the mistake made in that part, and why it changes no result.
HARMLESS = [
    ("team < 32 ? team : 32", "bound + 1", "32 either way"),
    ("team < 32 ? team : 32", "bound - 1", "a team is a power of two"),
    ("if (team > 32)", "bound + 1", "a team of more than 32 threads has 256"),
    ("i < unit.end; i += kInFlight * unit.step", "bound + 1", "each access in the loop is checked by itself"),
    ("InFlight - 1) * unit.step < unit.end", "bound - 1", "the loop behind it takes what this one leaves"),
    ("else if (size > 1)", "bound - 1", "a block alone needs no barrier there, and passes that of its cluster"),
    ("if (!kGrid && size > 1)", "bound - 1", "a barrier more"),
    ("size > 1) cluster_arrive_relaxed()", "bound + 1", "not seen: in the emulator the wait is the whole barrier"),
    ("size > 1 ? in_block_of_cluster", "bound - 1", "a block alone is the first of its cluster"),
    ("first_slot >= r.slots", "bound + 1", "slot_of() takes the end for the start"),
    ("slot >= r.slots ?", "bound + 1", "each_kept() takes the end for the start; for a shift any number will do"),
    ("i + kTogether <= copies", "bound - 1", "the loop behind it takes what this one leaves"),
    ("step + kBatch <= run_ends", "bound - 1", "the loop behind it takes what this one leaves"),
    ("step + kBatch <= end", "bound - 1", "the loop behind it takes what this one leaves"),
    ("end - kBatch >= step", "bound + 1", "the loop behind it takes what this one leaves"),
    ("position_ >= r.kept", "bound + 1", "an empty segment more, and a group of no copies"),
    ("first < r.width", "bound + 1", "each channel behind it is checked by itself"),
    ("min(k + r.slots, 2 * r.kept)", "least - 1", "a vector is copied one step later"),
    ("step < kept; step += r.segment", "bound + 1", "an empty segment more, and a wait for more than is needed"),
    ("e < V; ++e) columns.of[e]", "bound + 1", "not seen: the compiler does not watch the last array of a struct"),
    ("c < kChannels; ++c) of[c]", "bound + 1", "not seen: the compiler does not watch the last array of a struct"),
    ("(round + 1) * r.steps > r.kept", "bound - 1", "all of that round is kept"),
    ("round < r.rounds && round * r", "bound + 1", "no more is kept than all rounds have"),
    ("round * r.steps < r.kept; ++round", "bound + 1", "nothing of that round is kept"),
    ("(i += 32) < number", "bound + 1", "what it reads, of the block's own tables, goes unused"),
    ("if (lane_index() < number)", "bound + 1", "what it reads, of the block's own tables, goes unused"),
    ("span.count > 0 ? slots", "bound + 1", "one vector needs no shift: its mean comes first, and is as good"),
    ("chunk > 0 ?", "bound - 1", "what no vector went into counts for nothing"),
    ("int lanes = kRun; lanes < 32", "bound - 1", "it goes by powers of two"),
    ("count > 0 ? own.count", "bound + 1", "counts are of whole vectors"),
    ("count > 0 ? own.count", "bound - 1", "what no vector went into counts for nothing"),
]


@dataclass(frozen=True)
class Mutant:
    number: int
    file: str
    line: int
    source: str
    column: int  # of the source, where the mistake is
    mistake: str

    def __str__(self):
        return f"{self.number} {self.file}:{self.line}: {self.mistake}: {self.source}"

    @property
    def reason(self):
        """Why it is harmless; None where it is not."""
        return next((why for part, mistake, why in HARMLESS if self.is_in(part) and mistake == self.mistake), None)

    def is_in(self, part):
        start = self.source.find(part)
        return 0 <= start <= self.column < start + len(part)


def mutate(text, file, mutants):
    """The text with switches for mistakes in it; appends what they are to ``mutants``."""
    lines, is_compiled = text.splitlines(), True  # by the emulator's compiler
    for i, line in enumerate(lines):
        code = line.split("//")[0]
        if code.startswith("#"):
            is_compiled = not re.match(r"#(ifdef|elif) .*__CUDA_ARCH__", code)
        if not is_compiled:
            continue
        if code.lstrip().startswith("#") or any(part in code for part in NO_BOUNDS):
            continue

        original, indent = code, len(line) - len(line.lstrip())

        def switch(pattern, mistakes, text, code):
            """The code with ``text(match, number of the first mistake)`` where the original matches the pattern."""
            columns = iter([match.start("at") - indent for match in re.finditer(pattern, original)])

            def replace(match):
                first, column = len(mutants), next(columns)
                for mistake in mistakes:
                    mutants.append(Mutant(len(mutants), file, i + 1, line.strip(), column, mistake))
                return text(match, first)

            return re.sub(pattern, replace, code)

        def comparison(match, k):
            return f" {match['at']} mutation::bound({k}) {match['at']} "

        code = switch(rf"(?<!\S)(?P<at>[\w.:()]*(?:{BARRIER}))", ["left out"],
                      lambda match, k: f"if (!mutation::is({k})) {match['at']}", code)
        # A bound that is a minimum is moved inside of it, below.
        code = switch(r" (?P<at><=|>=|<|>) (?!min\()", ["bound + 1", "bound - 1"], comparison, code)
        for name, meaning in (("min", "least"), ("max", "most")):
            code = switch(rf"\b(?P<at>{name})\(", [f"{meaning} + 1", f"{meaning} - 1"],
                          lambda match, k, meaning=meaning: f"mutation::{meaning}({k}, ", code)
        code = switch(r"(?<=\+\+)(?P<counter>\w+) (?P<at>==) ", ["bound + 1", "bound - 1"],
                      lambda match, k: match["counter"] + comparison(match, k), code)
        lines[i] = code
    return "\n".join(lines) + "\n"


def make_copy(in_folder=COPY.name):
    """Copies the sources, with a switch for each mutant in the kernels. Returns the mutants."""
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


class Suite:
    """A plugin of pytest, which collects the tests and leaves the rest to ``work``."""

    def __init__(self, work):
        self.work, self.failed = work, []

    def pytest_collection_modifyitems(self):
        import torch

        torch.set_num_threads(1)  # the runs are side by side

    def pytest_runtestloop(self, session):
        self.work(self, session.items)
        return True

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)

    def passes(self, item, following):
        """Runs one test; ``following`` is the next one, for which fixtures are kept."""
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        return not self.failed


class Fork:
    """Runs ``work()`` in a fork of this process, which has loaded all that takes time, and brings its result back."""

    def __init__(self, work):
        self.output, self.found = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile()
        self.pid = os.fork()
        if self.pid == 0:
            for descriptor in 1, 2:
                os.dup2(self.output.fileno(), descriptor)
            try:
                pickle.dump(work(), self.found)
                self.found.flush()
            except BaseException:  # it must not go on as if it were this process
                self.output.write(traceback.format_exc())
                self.output.flush()
                os._exit(1)
            os._exit(0)

    def result(self):
        """None while it runs; else (what it returned, None) or (None, how it ended instead)."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            return None
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            return None, "a test that does not come to an end" if name == "SIGALRM" else f"a crash, {name}"
        self.found.seek(0)
        if os.WEXITSTATUS(status) == 0:
            return pickle.load(self.found), None
        self.output.seek(0)
        return None, self.output.read()[-2000:]

    def wait(self):
        while (result := self.result()) is None:
            time.sleep(0.02)
        return result


@functools.cache
def library():
    """The emulator with all mutants in it."""
    os.environ.update(LDM_FUSED_EMULATOR_ROOT=str(COPY), LDM_FUSED_EMULATOR_FLAGS=FLAGS)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import emulated

    return ctypes.CDLL(emulated._library.__file__)


def reached_by(suite, items, count):
    """Runs the tests without a mutant: the seconds of each and the mutants that it reaches, or the test that failed."""
    reached, found = (ctypes.c_ubyte * count).in_dll(library(), "reached_mutants"), []
    for item, following in zip(items, [*items[1:], None]):
        ctypes.memset(reached, 0, count)
        start = time.monotonic()
        if not suite.passes(item, following):
            return suite.failed[0]
        found.append((time.monotonic() - start, {i for i, once in enumerate(reached) if once}))
    return found


def first_failure(suite, items, limits, mutant):
    """The first of the tests that fails with the mutant, or None. Each has its limit of seconds: an alarm ends all."""
    library().set_mutant(mutant)
    for item, following, limit in zip(items, [*items[1:], None], limits):
        signal.alarm(limit)
        if not suite.passes(item, following):
            return item.name
    return None


def run_mutants(suite, items, found, numbers, at_once):
    """Yields each mutant's number with what caught it, or None; ``at_once`` forks side by side."""
    waiting, running = list(numbers), {}
    while waiting or running:
        while waiting and len(running) < at_once:
            number = waiting.pop(0)
            tests = sorted((seconds, i) for i, (seconds, reached) in enumerate(found) if number in reached)
            chosen, limits = [items[i] for _, i in tests], [10 + int(PATIENCE * seconds) for seconds, _ in tests]
            running[number] = Fork(functools.partial(first_failure, suite, chosen, limits, number))
        for number, fork in list(running.items()):
            result = fork.result()
            if result is not None:
                del running[number]
                yield number, result[0] or result[1]
        time.sleep(0.005)


def with_tests(work):
    """Calls ``work`` with the plugin and the tests, in a session of pytest."""
    pytest.main(TESTS, [Suite(work)])


def main(arguments=()):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", metavar="NUMBERS", type=lambda text: {int(number) for number in text.split(",")},
                        help="of the mutants those with these numbers, which each line of the output begins with")
    only = parser.parse_args(arguments).only
    os.chdir(ROOT)
    mutants = make_copy()
    wanted = [m for m in mutants if (m.reason is None if only is None else m.number in only)]
    harmless = sum(m.reason is not None for m in mutants)
    print(f"{len(mutants)} mutants, of which {harmless} are harmless. First without any.", flush=True)
    library()
    at_once = int(os.environ.get("MAX_JOBS") or os.cpu_count())
    survivors = []

    def judge(suite, items):
        found, ended = Fork(functools.partial(reached_by, suite, items, len(mutants))).wait()
        if ended or isinstance(found, str):
            sys.exit(f"Without a mutant the tests fail already:\n{ended or found}")
        start = time.monotonic()
        results = run_mutants(suite, items, found, [m.number for m in wanted], at_once)
        for done, (number, caught_by) in enumerate(results, 1):
            mutant = mutants[number]
            reached = sum(number in reached for _, reached in found)
            if caught_by is None:
                survivors.append(mutant)
            verdict = f"caught by {caught_by}" if caught_by else f"SURVIVES {reached} tests that reach it"
            print(f"[{done}/{len(wanted)}, {time.monotonic() - start:.0f} s] {mutant}\n    {verdict}", flush=True)

    with_tests(judge)
    for mutant in survivors:
        print(f"Survives: {mutant}")
    print(f"mutants: {len(wanted) - len(survivors)} of {len(wanted)} caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
