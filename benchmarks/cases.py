"""The op and the block: which cases to run, and one case from fresh data to checked and timed."""

import gc
import sys
import time
from typing import Dict, Iterator, List, Tuple

import torch

from benchmarks import machine, measure, providers, report, workloads
from benchmarks.report import Cell, Progress, Row
from benchmarks.workloads import Workload

Case = Tuple[str, str, Workload, str]


# Seconds after which the overview that runs without --suite or --shape starts nothing new, to end within two minutes.
OVERVIEW = 95


def run(args) -> List[Row]:
    """All cases that the arguments ask for."""
    todo = list(chosen(args))
    if not todo:
        sys.exit("nothing to run: no chosen shape has that layout, or a block, or is of a model that people train")
    progress = Progress(len(todo))
    rows, start = [], time.monotonic()
    for level, mode, w, layout in todo:
        row = Row(w, level, mode, layout, args.dtype, getattr(torch, args.dtype).itemsize, args.device)
        progress.show(row.title)
        needed, free = needed_bytes(row), machine.available_bytes(args.device)
        if is_overview(args) and time.monotonic() - start > OVERVIEW:
            break
        try:
            if needed > free:
                raise MemoryError(f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
            check_and_time(row, args, progress)
        except (MemoryError, RuntimeError) as e:
            if not measure.out_of_memory(e):
                raise
            reason = measure.first_line(e)
            row.cells = {name: row.cells.get(name) or Cell() for name in args.providers}
            for cell in row.cells.values():
                cell.reason = cell.reason or reason
        rows.append(row)
        progress.step()
    progress.close()
    return sorted(rows, key=lambda row: args.levels.index(row.level))


def chosen(args) -> Iterator[Case]:
    """(level, mode, workload, layout) of everything to run, each distinct call once."""
    seen = set()
    for level, w in chosen_workloads(args):
        modes = [mode for mode in args.modes if mode == "forward" or w.trained or args.train_all]
        for layout in w.layouts(args.layout):
            for mode in modes:
                key = (level, mode, w.call, layout)
                if key not in seen:
                    seen.add(key)
                    yield level, mode, w, layout


def chosen_workloads(args) -> List[Tuple[str, Workload]]:
    """("op" or "block", workload), where there is such a block."""
    if is_overview(args):
        return [(level, w) for level, w in workloads.default(args.device) if level in args.levels]
    own = [Workload("custom", shape, groups=args.groups) for shape in args.shape or []]
    found = own or workloads.select(args.suite)
    return [(level, w) for level in args.levels for w in found if level == "op" or w.has_block]


def is_overview(args) -> bool:
    return not args.shape and not args.suite


def needed_bytes(row: Row) -> int:
    """Roughly what a case holds at its worst: the float64 oracle beside the provider that is compared with it."""
    oracle, own = (7 * 8, 4 * row.itemsize) if row.mode == "forward" else (12 * 8, 12 * row.itemsize)
    return row.workload.numel * (oracle + own) * (2 if row.level == "block" else 1)


def check_and_time(row: Row, args, progress: Progress) -> None:
    """Fills in the row: every provider's error, the bytes it keeps, and the time of those that are right."""
    w, dtype = row.workload, getattr(torch, args.dtype)
    torch.compiler.reset()  # or the limit on recompilations would turn later shapes silently into eager
    make = providers.op_contenders if row.level == "op" else providers.block_contenders
    # Eager is the ruler of the check, so it is run even where it is not asked for.
    contenders, oracle = make(w, list(dict.fromkeys(["eager", *args.providers])), args.device, dtype, row.layout)
    # A block's time is its convolutions', which no cache can flatter much.
    limit = 64 if row.level == "op" else 2
    sets = measure.make_inputs(w.shape, row.layout, row.mode, args.device, dtype, limit)

    runs = check(row, contenders, oracle, sets[0], dtype, progress)
    runs = {name: run for name, run in runs.items() if name in args.providers}
    row.cells = {name: row.cells[name] for name in args.providers}
    progress.show(f"{row.title}: timing")
    if row.level == "op":
        runs["copy"] = measure.copy_runner(sets)
    timings = measure.time_in_turn(runs, sets, row.mode, args.min_run_time)
    row.copy = timings.pop("copy", None)
    for name, timing in timings.items():
        row.cells[name].timing = timing
    if args.device == "cuda":  # the next case finds the memory of this one's graphs free
        del timings, runs, sets, contenders, oracle
        gc.collect()
        torch.cuda.empty_cache()


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
            runs[contender.name] = measure.runner(contender, row.mode)
        except measure.CheckFailed as e:
            cell.reason, cell.failed = f"CHECK FAILED, not timed: {e}", True
        except Exception as e:  # torch.compile without a working compiler, or too little memory: the others go on
            cell.reason = measure.first_line(e)
            cell.failed = contender.name != "compile" and not measure.out_of_memory(e)
        if cell.failed:
            progress.say(f"{contender.name}, {row.title} {row.dtype}: {cell.reason}")
    return runs


def summary(rows: List[Row], args) -> str:
    """The table and what follows it."""
    suites: Dict[str, List[Workload]] = {}
    for w in workloads.select(args.suite) if args.suite and not args.shape else []:
        if w.suite not in workloads.SAMPLES:
            suites.setdefault(w.suite, []).append(w)
    total = len(list(chosen(args)))
    left_out = f"{total - len(rows)} of {total} cases left out, to end in two minutes: --suite has no limit."
    parts = [
        report.table(rows, args.providers),
        report.legend(rows),
        report.means(rows, args.providers),
        report.suite_totals(rows, suites, args.providers),
        report.notes(rows),
        left_out if len(rows) < total else "",
    ]
    return "\n" + "\n\n".join(filter(None, parts))
