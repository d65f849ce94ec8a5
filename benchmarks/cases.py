"""The op and the block: which cases to run, and one case from fresh data to checked and timed."""

import collections
import concurrent.futures
import gc
import itertools
import math
import multiprocessing
import os
import sys
import time
from typing import Callable, Dict, List, Optional, Tuple

import torch

from benchmarks import machine, measure, providers, report, workloads
from benchmarks.report import Cell, Progress, Row
from benchmarks.workloads import Workload

# Seconds after which the overview that runs without --suite or --shape starts nothing new, to end within two minutes.
OVERVIEW = 95
SAVE = 5  # seconds between two savings of what there is


def run(args, save: Callable[[List[Row]], None] = lambda rows: None) -> List[Row]:
    """All cases that the arguments ask for; `save` gets those that are done, every few seconds."""
    todo = chosen(args)
    if not todo:
        sys.exit("nothing to run: no chosen shape has that layout, or a block, or is of a model that people train, or"
                 " is within --max-mb")  # fmt: skip
    machine.keep_freed_memory(not args.fresh_memory)
    places = {id(row): (args.levels.index(row.level), i) for i, row in enumerate(todo)}
    in_order = lambda rows: sorted(rows, key=lambda row: places[id(row)])  # noqa: E731
    progress, limit = Progress(len(todo)), budget(args)
    rows, start, saved = [], time.monotonic(), time.monotonic()
    for row in todo if args.budget is None or args.sample else suites_in_turn(todo):
        progress.show(row.title)
        needed, free = needed_bytes(row), machine.available_bytes(args.device)
        if time.monotonic() - start > limit:
            break
        try:
            if needed > free:
                raise MemoryError(f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
            with measure.own_stream(args.device):
                check_and_time(row, args, progress)
        except (MemoryError, RuntimeError) as e:
            if not measure.out_of_memory(e):
                save(in_order(rows))  # a GPU that a kernel has broken gives no more results
                raise
            reason = measure.first_line(e)
            row.cells = {name: row.cells.get(name) or Cell() for name in args.providers}
            for cell in row.cells.values():
                cell.reason = cell.reason or reason
        rows.append(row)
        progress.step()
        if time.monotonic() - saved > SAVE:
            save(in_order(rows))
            saved = time.monotonic()
    progress.close()
    return in_order(rows)


def budget(args) -> float:
    """Seconds after which no case is started."""
    return args.budget if args.budget is not None else OVERVIEW if is_overview(args) else math.inf


def chosen(args) -> List[Row]:
    """Everything to run, each distinct call once."""
    largest = math.inf if args.max_mb is None else args.max_mb * 1e6
    if args.sample:
        rows = (Row(w, level, mode, layout, dtype, getattr(torch, dtype).itemsize, args.device)
                for level, w, mode, layout, dtype in workloads.sample() if level in args.levels)  # fmt: skip
        return [row for row in rows if row.bytes <= largest]
    rows: Dict[Tuple, Row] = {}
    for dtype in args.dtypes:
        itemsize = getattr(torch, dtype).itemsize
        for level, w in chosen_workloads(args):
            modes = [mode for mode in args.modes if mode == "forward" or w.trained or args.train_all]
            for layout in w.layouts(args.layout):
                for mode in modes:
                    row = Row(w, level, mode, layout, dtype, itemsize, args.device)
                    if row.bytes <= largest:
                        rows.setdefault((dtype, level, mode, w.call, layout), row)
    return list(rows.values())


def suites_in_turn(rows: List[Row]) -> List[Row]:
    """Orders the cases by dtype, and takes the suites in turns: the first case of each, then the second of each, and so
    on. A sample keeps its own order."""
    seen: Dict[Tuple, int] = collections.Counter()
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    turns = {}
    for row in rows:
        suite = row.dtype, row.workload.suite
        turns[id(row)] = dtypes.index(row.dtype), seen[suite]
        seen[suite] += 1
    return sorted(rows, key=lambda row: turns[id(row)])


def chosen_workloads(args) -> List[Tuple[str, Workload]]:
    """("op" or "block", workload), where there is such a block."""
    if is_overview(args):
        return [(level, w) for level, w in workloads.default(args.device) if level in args.levels]
    own = [Workload("custom", shape, groups=args.groups) for shape in args.shape or []]
    found = own or workloads.select(args.suite)
    return [(level, w) for level in args.levels for w in found if level == "op" or w.has_block]


def is_overview(args) -> bool:
    return not args.shape and not args.suite and not args.sample


def needed_bytes(row: Row) -> int:
    """A rough bound of a case's memory in bytes: the float64 oracle and the provider that is compared with it."""
    oracle, own = (7 * 8, 4 * row.itemsize) if row.mode == "forward" else (12 * 8, 12 * row.itemsize)
    return row.workload.numel * (oracle + own) * (2 if row.level == "block" else 1)


def check_and_time(row: Row, args, progress: Progress) -> None:
    """Fills in the row: every provider's error, the bytes it keeps, and the time of those that are right."""
    w, dtype = row.workload, getattr(torch, row.dtype)
    torch.compiler.reset()  # or the limit on recompilations would turn later shapes silently into eager
    make = providers.op_contenders if row.level == "op" else providers.block_contenders
    # Eager is the ruler of the check, so it is run even where it is not asked for.
    contenders, oracle = make(w, dict.fromkeys(["eager", *providers_of(row, args)]), args.device, dtype, row.layout)
    # On CUDA as many as it takes: the smallest tensor is 300 KB. A block's time is its convolutions', which no cache
    # can flatter much.
    limit = 2 if row.level == "block" else 512 if args.device == "cuda" else 64
    sets = measure.make_inputs(w.shape, row.layout, row.mode, args.device, dtype, limit)

    with measure.compiled_for(row.mode):
        runs = check(row, contenders, oracle, sets[0], dtype, progress)
    runs = {name: run for name, run in runs.items() if name in args.providers}
    row.cells = {name: row.cells.get(name, Cell(reason="it has no block")) for name in args.providers}
    progress.show(f"{row.title}: timing")
    if row.level == "op":
        runs["copy"] = measure.copy_runner(sets)
    with measure.compiled_for(row.mode):
        timings = measure.time_in_turn(runs, sets, row.mode, args.min_run_time)
    row.copy = timings.pop("copy", None)
    for name, timing in timings.items():
        row.cells[name].timing = timing
    if args.device == "cuda":  # the next case finds the memory of this one's graphs free
        del timings, runs, sets, contenders, oracle
        gc.collect()
        torch.cuda.empty_cache()


def providers_of(row: Row, args) -> List[str]:
    """The providers that were asked for and have what the row compares."""
    return [name for name in args.providers if row.level == "op" or providers.PROVIDERS[name].block]


def check(row: Row, contenders, oracle, inputs, dtype, progress: Progress) -> Dict[str, object]:
    """Compares every provider with the oracle; returns what is to be timed of those that are right."""
    inputs64 = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in inputs)
    truth = measure.results(oracle, row.mode, inputs64)
    ruler, runs = None, {}
    for contender in contenders:
        progress.show(f"{row.title}: checking {contender.name}")
        cell = row.cells[contender.name] = Cell()
        try:
            errors = measure.errors(measure.results(contender, row.mode, inputs), truth)
            ruler = ruler or errors
            cell.error = max(errors)
            measure.check(errors, ruler, row.level, dtype)
            if row.mode == "training":
                cell.kept_bytes = measure.kept_bytes(contender, inputs[0])
                if row.level == "block" and row.device == "cuda":
                    cell.peak_bytes = measure.peak_bytes(contender, row.mode, inputs)
            runs[contender.name] = measure.runner(contender, row.mode)
        except measure.CheckFailed as e:
            cell.reason, cell.failed = f"CHECK FAILED, not timed: {e}", True
        except Exception as e:  # torch.compile without a working compiler, or too little memory: the others go on
            cell.reason = measure.first_line(e)
            cell.failed = contender.name not in providers.OTHERS and not measure.out_of_memory(e)
        if cell.failed:
            progress.say(f"{contender.name}, {row.title} {row.dtype}: {cell.reason}")
    return runs


def summary(rows: List[Row], args) -> str:
    """The table and what follows it."""
    suites: Dict[str, List[Workload]] = {}
    for w in workloads.select(args.suite) if args.suite and not args.shape else []:
        if w.suite not in workloads.SAMPLES:
            suites.setdefault(w.suite, []).append(w)
    total = len(chosen(args))
    why = "to end in two minutes: --suite has no limit" if args.budget is None else f"after {args.budget:g} s: --budget"
    left_out = f"{total - len(rows)} of {total} cases left out, {why}."
    parts = [
        report.table(rows, args.providers),
        report.legend(rows),
        report.means(rows, args.providers),
        report.kept_ratios(rows, args.providers),
        report.suite_totals(rows, suites, args.providers),
        report.notes(rows),
        left_out if len(rows) < total else "",
        report.in_short(rows, args.providers),
    ]
    return "\n" + "\n\n".join(filter(None, parts))


# ---- torch.compile ahead of time


def prepare(args) -> str:
    """Compiles every case in processes side by side, into torch.compile's cache on disk; says how many."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # the processes are parallel enough
    names = [name for name in args.providers if providers.PROVIDERS[name].compiled]
    rows = chosen(args) if args.sample else suites_in_turn(chosen(args))
    todo = list(itertools.product(rows, names))
    progress = Progress(len(todo))
    context = multiprocessing.get_context("spawn")
    begun = time.monotonic()
    with concurrent.futures.ProcessPoolExecutor(args.prepare, context) as pool:
        jobs = [pool.submit(compile_case, row, name, args.threads) for row, name in todo]
        for _ in concurrent.futures.as_completed(jobs):
            progress.step()
            progress.show("compiled")
            if args.budget is not None and time.monotonic() - begun > args.budget:
                pool.shutdown(cancel_futures=True)  # waits for those that run: half a file is worse than none
                break
    progress.close()
    done = [job for job in jobs if not job.cancelled()]
    reasons = list(filter(None, (job.result() for job in done)))
    failed = f"; {len(reasons)} failed, the first with {reasons[0]}" if reasons else ""
    return f"{len(done) - len(reasons)} of {len(todo)} cases compiled{failed}"


def compile_case(row: Row, name: str, threads: Optional[int]) -> str:
    """Calls a compiled provider as `check` does, without comparing; why it failed, or nothing."""
    if threads:
        torch.set_num_threads(threads)
    torch.compiler.reset()
    w, dtype = row.workload, getattr(torch, row.dtype)
    make = providers.op_contenders if row.level == "op" else providers.block_contenders
    try:
        (contender,), _ = make(w, [name], row.device, dtype, row.layout)
        inputs, *_ = measure.make_inputs(w.shape, row.layout, row.mode, row.device, dtype, limit=1)
        with measure.compiled_for(row.mode):
            measure.results(contender, row.mode, inputs)
            if row.mode == "training":
                measure.kept_bytes(contender, inputs[0])
    except Exception as e:
        return measure.first_line(e)
    finally:
        if row.device == "cuda":
            torch.cuda.empty_cache()
    return ""
