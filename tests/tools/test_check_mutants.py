"""tools/check_mutants.py: it finds each barrier and bound, and fails where a mistake goes unnoticed."""

import os
import re
import signal
import time
from types import SimpleNamespace

import pytest

from tools import check_mutants

KERNEL = """\
struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Vec {
  for (int i = threadIdx.x; i < count; i += 32) {  // i < count
    __syncthreads();  // before the next
    if (a <= b && c > d) cluster.sync();
    end = min(x, y);
"""


def test_switches_are_written_where_mistakes_can_be_made():
    mutants = []
    mutated = check_mutants.mutate(KERNEL, "kernel.cuh", mutants).splitlines()
    assert mutated[0] == KERNEL.splitlines()[0]
    assert "i < mutation::bound(0) < count;" in mutated[1]
    assert mutated[2].strip() == "if (!mutation::is(2)) __syncthreads();"
    assert "a <= mutation::bound(4) <= b && c > mutation::bound(6) > d" in mutated[3]
    assert "if (!mutation::is(3)) cluster.sync();" in mutated[3]
    assert mutated[4].strip() == "end = mutation::least(8, x, y);"
    assert [m.mistake for m in mutants] == ["bound + 1", "bound - 1", "left out", "left out"] + 2 * [
        "bound + 1", "bound - 1"] + ["least + 1", "least - 1"]
    assert [m.line for m in mutants] == [2, 2, 3, 4, 4, 4, 4, 4, 5, 5] and mutants[2].number == 2


@pytest.mark.parametrize("line,mutated", [
    ("cooperative_groups::this_grid().sync();", "if (!mutation::is(0)) cooperative_groups::this_grid().sync();"),
    ("if (size > 1) cluster_wait();",
     "if (size > mutation::bound(1) > 1) if (!mutation::is(0)) cluster_wait();"),
    ("void cluster_wait() {", None),
    ("commit_copies();", "if (!mutation::is(0)) commit_copies();"),
    ("wait_for_copies<2>();", "if (!mutation::is(0)) wait_for_copies<2>();"),
    ("wait_for(counter_, target_);", "if (!mutation::is(0)) wait_for(counter_, target_);"),
    ("while (atomicAdd(&counter_->arrived, 0u) < target_) wait();",
     "while (atomicAdd(&counter_->arrived, 0u) < mutation::bound(0) < target_) wait();"),
    ("at = slot < slots ? slot : 0;", "at = slot < mutation::bound(0) < slots ? slot : 0;"),
    ("if (++slot_ == slots) slot_ = 0;", "if (++slot_ == mutation::bound(0) == slots) slot_ = 0;"),
    ("if (i >= min(a, b)) continue;", "if (i >= mutation::least(0, a, b)) continue;"),
    ("return max(0, min(a, b));", "return mutation::most(2, 0, mutation::least(0, a, b));"),
    ("template <class F> T at(Vec<T, V> v) { return words<T>; }", None),
    ("constexpr int V = vector_of(sizeof(X) < sizeof(Y) ? sizeof(X) : sizeof(Y));", None),
    ("using Held = Vector[kHeld > 0 ? kHeld : 1];", None),
    ("#if __CUDA_ARCH__ >= 900", None),
])
def test_a_switch_in_every_form_of_a_barrier_and_a_bound(line, mutated):
    assert check_mutants.mutate(line, "kernel.cuh", []) == (mutated or line) + "\n"


def test_what_only_a_gpu_compiles_has_no_switch():
    text = "#ifdef __CUDA_ARCH__\nif (a < b) return;\n#else\n__syncthreads();\n#endif\n"
    mutants = []
    assert check_mutants.mutate(text, "kernel.cuh", mutants).splitlines()[1] == "if (a < b) return;"
    assert [m.mistake for m in mutants] == ["left out"]


@pytest.fixture(scope="module")
def mutants():
    return check_mutants.make_copy(in_folder="mutants-of-test")


def test_every_barrier_of_the_kernels_is_left_out_once(mutants):
    sources = [re.sub("//.*", "", path.read_text()) for path in (check_mutants.ROOT / "csrc" / "cuda").glob("*.cuh")]
    barriers = sum(len(re.findall(check_mutants.BARRIER, source)) for source in sources)
    assert sum(m.mistake == "left out" for m in mutants) == barriers > 0


def test_what_is_called_harmless_is_still_there(mutants):
    for part, mistake, why in check_mutants.HARMLESS:
        assert why and any(m.is_in(part) and m.mistake == mistake for m in mutants), part


def test_of_two_bounds_in_a_line_one_may_be_harmless(monkeypatch):
    mutants = []
    check_mutants.mutate("  if (room > 0 && i < count) cluster_wait();", "kernel.cuh", mutants)
    monkeypatch.setattr(check_mutants, "HARMLESS", [("room > 0", "bound + 1", "never one")])
    assert [m.reason for m in mutants] == [None, "never one", None, None, None]


@pytest.fixture
def check(monkeypatch, mutants):
    """main() with tests that find the mutants for which ``caught_by(number)`` says something."""
    def run(*arguments, caught_by=lambda number: "test_it", without=({}, None)):
        made = []
        monkeypatch.setattr(check_mutants, "make_copy", lambda: mutants)
        monkeypatch.setattr(check_mutants, "library", lambda: None)
        monkeypatch.setattr(check_mutants, "with_tests", lambda work: work(None, []))
        monkeypatch.setattr(check_mutants, "Fork", lambda *_: SimpleNamespace(wait=lambda: without))
        monkeypatch.setattr(check_mutants, "run_mutants", lambda suite, items, found, numbers, at_once: [
            (made.append(number) or number, caught_by(number)) for number in numbers])
        return check_mutants.main(arguments), made

    return run


def test_only_those_asked_for_are_made(check, capsys):
    assert check("--only", "5,3") == (0, [3, 5])
    assert capsys.readouterr().out.endswith("mutants: 2 of 2 caught\n")


@pytest.mark.parametrize("survives", [False, True])
def test_a_survivor_fails_the_check(check, capsys, mutants, survives):
    survivor = next(m for m in mutants if m.mistake == "left out")
    wanted = [m.number for m in mutants if m.reason is None]
    caught_by = lambda number: None if survives and number == survivor.number else "test_it"  # noqa: E731
    assert check(caught_by=caught_by) == (survives, wanted)
    out = capsys.readouterr().out
    assert out.endswith(f"mutants: {len(wanted) - survives} of {len(wanted)} caught\n")
    assert (f"Survives: {survivor}\n" in out) == survives


@pytest.mark.parametrize("without", [("test_it", None), (None, "a crash, SIGSEGV")])
def test_tests_that_fail_by_themselves_prove_nothing(check, without):
    with pytest.raises(SystemExit, match=f"Without a mutant the tests fail already:\n{without[0] or without[1]}"):
        check(without=without)


def test_a_fork_returns_what_it_is_for_or_says_how_it_ended():
    assert check_mutants.Fork(lambda: {"a": 1}).wait() == ({"a": 1}, None)
    assert check_mutants.Fork(lambda: os.kill(os.getpid(), signal.SIGKILL)).wait() == (None, "a crash, SIGKILL")
    assert "ZeroDivisionError" in check_mutants.Fork(lambda: 1 / 0).wait()[1]
    endless = lambda: (signal.alarm(1), time.sleep(60))  # noqa: E731
    assert check_mutants.Fork(endless).wait() == (None, "a test that does not come to an end")


class Suite:
    """Tests are numbers; those from 2 on fail."""

    failed = ["2"]

    def passes(self, item, following):
        return int(item.name) < 2


def test_a_mutant_meets_the_tests_that_reach_it_the_quickest_first(monkeypatch):
    class Library:
        def set_mutant(self, mutant):
            pass

    monkeypatch.setattr(check_mutants, "library", Library)
    items = [SimpleNamespace(name=str(i)) for i in range(4)]
    found = [(0.1, {0, 1}), (0.2, {0}), (0.4, {0, 2}), (0.3, {0, 2})]
    caught = dict(check_mutants.run_mutants(Suite(), items, found, [0, 1, 2, 3], 2))
    assert caught == {0: "3", 1: None, 2: "3", 3: None}
