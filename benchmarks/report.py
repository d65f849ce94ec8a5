"""What the reader sees: progress, one table, the means, and the same as CSV or JSON."""

import contextlib
import csv
import itertools
import json
import math
import os
import shutil
import statistics
import sys
from dataclasses import dataclass, field
from typing import Dict, Iterable, List, Optional, Sequence

from benchmarks.measure import PASSES, Timing, limit_bytes
from benchmarks.workloads import Workload

# On a CPU, new memory of this size comes from the kernel page by page: faults then rule every provider's time.
LARGE_CPU_TENSOR = 30e6

# What the CPU kernels are held to, in the geometric mean over the op's cases: how many times as fast as eager, and as
# the faster of the peers at each case. Large tensors are exempt, as no kernel can win back the time of page faults.
PEERS = ("F.silu", "compile")


@dataclass
class Cell:
    """What one provider did at one case: either timed, or `reason` says why not."""

    timing: Optional[Timing] = None
    kept_bytes: Optional[int] = None
    peak_bytes: Optional[int] = None
    error: Optional[float] = None
    psnr: Optional[float] = None  # of a model, in decibels
    reason: str = ""
    failed: bool = False

    def seconds(self, clock: str) -> Optional[float]:
        return self.timing.seconds(clock) if self.timing else None


@dataclass
class Row:
    """One case: a workload, the op or the block, forward or training, in one memory format and dtype."""

    workload: Workload
    level: str
    mode: str
    layout: str
    dtype: str
    itemsize: int
    device: str
    cells: Dict[str, Cell] = field(default_factory=dict)
    copy: Optional[Timing] = None

    @property
    def title(self) -> str:
        return f"{self.level} {self.mode} {self.workload.shape_text} {self.layout}"

    @property
    def clock(self) -> str:
        """The clock that speed-ups and bandwidths are taken from."""
        cells = [cell for cell in self.cells.values() if cell.timing]
        return "device" if cells and all(cell.seconds("device") for cell in cells) else "wall"

    @property
    def bytes(self) -> int:
        return self.workload.numel * self.itemsize

    @property
    def large(self) -> bool:
        return self.device == "cpu" and self.bytes > LARGE_CPU_TENSOR

    def seconds(self, provider: str, clock: Optional[str] = None) -> Optional[float]:
        cell = self.cells.get(provider)
        return cell.seconds(clock or self.clock) if cell else None

    def speedup(self, baseline: str, provider: str = "ours", clock: Optional[str] = None) -> Optional[float]:
        """How many times as fast as the baseline."""
        mine, other = self.seconds(provider, clock), self.seconds(baseline, clock)
        return other / mine if mine and other else None

    def bandwidth(self, provider: str = "ours") -> Optional[float]:
        """The limit's bytes a second; None for a block, whose time is its convolutions'."""
        seconds = self.seconds(provider)
        if self.level != "op" or not seconds:
            return None
        return limit_bytes(self.workload.numel, self.itemsize, self.mode) / seconds

    def copy_bandwidth(self) -> Optional[float]:
        seconds = self.copy and self.copy.seconds(self.clock)
        return 2 * self.bytes / seconds if seconds else None

    def copy_share(self, provider: str = "ours") -> Optional[float]:
        mine, copy = self.bandwidth(provider), self.copy_bandwidth()
        return mine / copy if mine and copy else None


# ---- progress


class Progress:
    """A bar on a terminal's standard error; elsewhere a line for every tenth of the way."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.tty, self.tenth = max(total, 1), 0, sys.stderr.isatty(), -1

    def show(self, doing: str) -> None:
        filled = 30 * self.done // self.total
        if self.tty:
            self.line(f"[{'#' * filled}{'.' * (30 - filled)}] {self.done}/{self.total}  {doing}")
        elif 10 * self.done // self.total > self.tenth:
            self.tenth = 10 * self.done // self.total
            print(f"[{self.done}/{self.total}] {doing}", file=sys.stderr, flush=True)

    def line(self, text: str) -> None:
        """Writes over the line that the cursor is in."""
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:width]:<{width}}", end="", file=sys.stderr, flush=True)

    def step(self) -> None:
        self.done += 1

    def say(self, text: str) -> None:
        """A line that stays, above the bar."""
        self.close()
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.tty:
            self.line("")
            print(end="\r", file=sys.stderr, flush=True)


# ---- numbers as text


def three_digits(value: Optional[float]) -> str:
    if value is None:
        return "n/a"
    decimals = 0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3
    return f"{value:.{decimals}f}"


def scaled(value: Optional[float], factor: float) -> str:
    return three_digits(None if value is None else value * factor)


def times(value: Optional[float]) -> str:
    return "n/a" if value is None else f"{value:.{1 if value >= 10 else 2}f}x"


def percent(value: Optional[float]) -> str:
    return "n/a" if value is None else f"{100 * value:.0f}%"


def aligned(lines: Sequence[Sequence[str]], left: int) -> str:
    """Columns as wide as their widest cell, the first `left` of them flush left."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(f"{c:<{w}}" if i < left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    )


# ---- the table


def table(rows: Sequence[Row], names: Sequence[str]) -> str:
    """All rows, two lines of head above them."""
    clocks = ["device", "wall"] if any(row.clock == "device" for row in rows) else ["wall"]
    baselines = [name for name in names if name != "ours"] if "ours" in names else []
    training = any(row.mode == "training" for row in rows)
    ops = any(row.level == "op" for row in rows) and "ours" in names
    columns: List[tuple] = [
        ("", "what", lambda r: r.level),
        ("", "mode", lambda r: r.mode),
        ("", "shape", lambda r: r.workload.shape_text + ("*" if r.large else "")),
        ("", "layout", lambda r: r.layout),
        ("", "dtype", lambda r: r.dtype),
    ]
    for name in names:
        for clock in clocks:
            unit = f"{clock} ms" if len(clocks) > 1 else "ms"
            columns.append((name, unit, lambda r, n=name, c=clock: scaled(r.seconds(n, c), 1e3)))
    for name in baselines:
        columns.append(("ours vs", name, lambda r, n=name: times(r.speedup(n))))
    if ops:
        columns.append(("ours", "GB/s", lambda r: op_only(r, scaled(r.bandwidth(), 1e-9))))
        columns.append(("ours", "of copy", lambda r: op_only(r, percent(r.copy_share()))))
    for name in names if training else []:
        columns.append(("kept MB", name, lambda r, n=name: kept(r, n)))
    for name in names if any(cell.peak_bytes for row in rows for cell in row.cells.values()) else []:
        columns.append(("peak MB", name, lambda r, n=name: peak(r, n)))
    heads = [[c[0] for c in columns], [c[1] for c in columns]]
    body = [[c[2](row) for c in columns] for row in rows]
    text = aligned(heads + body, left=5).split("\n")
    return "\n".join([*text[:2], "-" * max(map(len, text)), *text[2:]])


def op_only(row: Row, text: str) -> str:
    return text if row.level == "op" else "-"


def kept(row: Row, name: str) -> str:
    if row.mode != "training":
        return "-"
    cell = row.cells.get(name)
    return scaled(cell.kept_bytes if cell else None, 1e-6)


def peak(row: Row, name: str) -> str:
    cell = row.cells.get(name)
    return scaled(cell.peak_bytes, 1e-6) if cell and cell.peak_bytes else "-"


LEGEND = """\
training: forward and backward; backward: it alone. ms: median of one call. ours vs: how many times as fast ours is.
GB/s: the least bytes the op can move (forward: x read, y written; backward: x and dy read, dx written) over the time;
of copy: that against torch's copy_, timed in turn with it. kept MB: what autograd keeps for the backward pass,
parameters not counted."""


def legend(rows: Sequence[Row]) -> str:
    lines = [LEGEND]
    if any(row.clock == "device" for row in rows):
        lines.append("device: GPU time by CUDA-graph replay; wall: what a caller waits. Speed-ups and GB/s: device.")
    if any(cell.peak_bytes for row in rows for cell in row.cells.values()):
        lines.append("peak MB: the most memory in use during a pass, above what was in use before it (weights, inputs).")
    if any(row.large for row in rows):
        lines.append("*: over 30 MB on a CPU, where page faults of fresh memory rule every provider's time.")
    return "\n".join(lines)


# ---- means


def geometric_mean(values: Iterable[float]) -> Optional[float]:
    values = list(values)
    return statistics.geometric_mean(values) if values else None


def means(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Ours against each baseline over all shapes, a line a dtype; large CPU tensors on lines of their own."""
    lines = []
    baselines = [name for name in names if name != "ours"]
    dtypes = dict.fromkeys(row.dtype for row in rows)
    for level, mode, dtype, large in itertools.product(("op", "block"), PASSES, dtypes, (False, True)):
        group = [r for r in rows if (r.level, r.mode, r.dtype, r.large) == (level, mode, dtype, large)]
        group = [r for r in group if r.seconds("ours")]
        for clock in ("device", "wall"):
            speedups = {n: [r.speedup(n, clock=clock) for r in group] for n in baselines}
            found = {n: geometric_mean(filter(None, each)) for n, each in speedups.items()}
            if not any(found.values()):
                continue
            size = "over 30 MB" if large else ""
            clock_name = f"{clock} time" if any(r.clock == "device" for r in group) else ""
            count = f"{len(group)} case{'s' * (len(group) != 1)}"
            named = dtype if len(dtypes) > 1 else ""
            title = ", ".join(filter(None, [f"{level} {mode}", named, size, clock_name, count]))
            lines.append([title, *(f"{times(value)} {name}" for name, value in found.items() if value)])
    width = max((len(line[0]) for line in lines), default=0)
    if not lines:
        return ""
    return "\n".join(["Ours is, in the geometric mean:", *(f"  {l[0]:<{width}}  {'   '.join(l[1:])}" for l in lines)])


def kept_ratios(rows: Sequence[Row], names: Sequence[str]) -> str:
    """What each provider keeps for the backward pass over what eager keeps, all cases together, a line a level."""
    lines = []
    for level in ("op", "block"):
        group = [r for r in rows if r.level == level and all(r.cells[n].kept_bytes for n in names)]
        totals = {n: sum(r.cells[n].kept_bytes for r in group) for n in names}
        if group and "eager" in names:
            ratios = [f"{totals[n] / totals['eager']:.3f}x {n}" for n in names if n != "eager"]
            lines.append(f"  {level}, {len(group)} case{'s' * (len(group) != 1)}  {'   '.join(ratios)}")
    return "\n".join(["Kept for the backward pass, of what eager keeps:", *lines]) if lines else ""


def suite_totals(rows: Sequence[Row], suites: Dict[str, List[Workload]], names: Sequence[str]) -> str:
    """The time of all GroupNorms of one pass of a model: each shape as often as the model calls it."""
    lines = []
    for suite, workloads in suites.items():
        for dtype, layout, mode in sorted({(r.dtype, r.layout, r.mode) for r in rows}):
            found = {}
            for name in names:
                spent = [(w.count, op_seconds(rows, w, layout, mode, dtype, name)) for w in workloads]
                if all(seconds for _, seconds in spent):
                    found[name] = sum(count * seconds for count, seconds in spent)
            if "ours" in found and len(found) > 1:
                each = ", ".join(f"{name} {three_digits(1e3 * value)} ms" for name, value in found.items())
                lines.append(f"  {suite}, {mode}, {layout}, {dtype}: {each}")
    head = "Every GroupNorm of one pass of the model, each shape as often as it is called:"
    return "\n".join([head, *lines]) if lines else ""


def op_seconds(rows: Sequence[Row], w: Workload, layout: str, mode: str, dtype: str, name: str) -> Optional[float]:
    layout = layout if layout in w.layouts(layout) else "contiguous"
    for r in rows:
        if (r.level, r.mode, r.layout, r.dtype, r.workload.call) == ("op", mode, layout, dtype, w.call):
            return r.seconds(name)
    return None


def notes(rows: Sequence[Row]) -> str:
    """Why a number is missing, each reason once, with the providers and the cases it concerns."""
    reasons: Dict[str, Dict[str, List[str]]] = {}
    for row in rows:
        for name, cell in row.cells.items():
            reason = cell.reason or (cell.timing.note if cell.timing else "")
            if reason:
                reasons.setdefault(reason, {}).setdefault(row.title, []).append(name)
    lines = []
    for reason, cases in reasons.items():
        (title, names), more = next(iter(cases.items())), len(cases) - 1
        others = f", and {more} more" if more else ""
        lines.append(f"n/a  {', '.join(names)}: {reason}  ({title}{others})")
    return "\n".join(lines)


# ---- in short


def in_short(rows: Sequence[Row], names: Sequence[str]) -> str:
    """What a user wants to know, a line each: the op forward, the op with its backward pass, the block. Large tensors on
    a CPU are left out."""
    rows = [r for r in rows if "ours" in names and r.seconds("ours") and not r.large]
    kinds = {"the op, forward": ("op", ["forward"]), "the op, forward and backward": ("op", ["training"]),
             "the op, backward": ("op", ["backward"]), "the block": ("block", list(PASSES))}
    groups = {title: [r for r in rows if r.level == level and r.mode in modes]
              for title, (level, modes) in kinds.items()}
    lines = [f"  {title}: {against}" for title, group in groups.items() if (against := ratios(group, names))]
    return "\n".join(["In short, ours is, in the geometric mean:", *lines[:3]]) if lines else ""


def ratios(group: Sequence[Row], names: Sequence[str]) -> str:
    """How many times as fast ours is as eager and as the faster peer, and where it gains least."""
    eager, peers = ([n for n in some if n in names] for some in (("eager",), PEERS))
    found = [mean_over_fastest(group, eager), mean_over_fastest(group, peers)]
    if not any(found):
        return ""
    cases = f"{len(group)} case{'s' * (len(group) != 1)}"
    return "; ".join(filter(None, [f"{', '.join(filter(None, found))} ({cases})", slowest(group, peers)]))


def over_fastest(row: Row, baselines: Sequence[str]) -> Optional[float]:
    """How many times as fast ours is as the fastest of the baselines that were timed."""
    return min(filter(None, (row.speedup(name) for name in baselines)), default=None)


def mean_over_fastest(group: Sequence[Row], baselines: Sequence[str]) -> str:
    """The geometric mean of that, with the names of the baselines that were timed, or nothing where none was."""
    timed = [name for name in baselines if any(row.seconds(name) for row in group)]
    if not timed:
        return ""
    mean = geometric_mean(filter(None, (over_fastest(row, timed) for row in group)))
    named = f"the best of {' and '.join(timed)}" if len(timed) > 1 else timed[0]
    return f"{times(mean)} as fast as {named}"


def slowest(group: Sequence[Row], peers: Sequence[str]) -> str:
    """Where ours gains least on the faster peer, or nothing where no peer was timed."""
    compared = [row for row in group if over_fastest(row, peers)]
    if not compared:
        return ""
    row = min(compared, key=lambda row: over_fastest(row, peers))
    case = f"{row.workload.shape_text} {row.layout} {row.dtype}"
    return f"least: {times(over_fastest(row, peers))} at {case}"


# ---- files


def as_dict(row: Row, names: Sequence[str]) -> Dict[str, object]:
    """A row for the JSON file: seconds, bytes and shares, nothing rounded."""
    w = row.workload
    providers = {}
    for name in names:
        cell = row.cells.get(name, Cell())
        timing = cell.timing
        providers[name] = {
            "wall_seconds": cell.seconds("wall"),
            "wall_interval": timing.interval("wall") if timing else None,
            "device_seconds": cell.seconds("device"),
            "device_interval": timing.interval("device") if timing else None,
            "speedup_of_ours": row.speedup(name),
            "bytes_per_second": row.bandwidth(name),
            "share_of_copy": row.copy_share(name),
            "kept_bytes": cell.kept_bytes,
            "peak_bytes": cell.peak_bytes,
            "relative_error": cell.error if cell.error is not None and math.isfinite(cell.error) else None,
            "reason": cell.reason or (timing.note if timing else ""),
        }
    return {
        "level": row.level,
        "mode": row.mode,
        "suite": w.suite,
        "shape": list(w.shape),
        "groups": w.groups,
        "eps": w.eps,
        "activation": w.activation,
        "count": w.count,
        "layout": row.layout,
        "dtype": row.dtype,
        "device": row.device,
        "clock": row.clock,
        "tensor_bytes": row.bytes,
        "limit_bytes": limit_bytes(w.numel, row.itemsize, row.mode) if row.level == "op" else None,
        "copy_bytes_per_second": row.copy_bandwidth(),
        "providers": providers,
    }


@contextlib.contextmanager
def replacing(path: str):
    """A file that takes the place of the one at `path` when it is complete: a killed run leaves the last one."""
    with open(f"{path}.part", "w", newline="") as file:
        yield file
    os.replace(f"{path}.part", path)


def write_json(path: str, environment: Dict[str, object], results: List[Dict[str, object]], chosen: int) -> None:
    """`chosen`: how many cases there would be without a limit of time."""
    with replacing(path) as file:
        file.write(json_rows({"environment": environment, "chosen": chosen}, "results", results))


def json_rows(head: Dict[str, object], name: str, rows: Sequence[object]) -> str:
    """A JSON object, of which the entry `name` is a list with a row a line: files stay short, and diffs are by rows."""
    lines = ",\n".join(" " + json.dumps(row) for row in rows)
    return f'{json.dumps(head)[:-1]}, "{name}": [\n{lines}\n]}}\n'


def write_csv(path: str, environment: Dict[str, object], results: List[Dict[str, object]]) -> None:
    """One line a provider and case, the environment repeated in each, so that files can be put together."""
    lines = []
    for result in results:
        case = {k: "x".join(map(str, v)) if isinstance(v, list) else v for k, v in result.items() if k != "providers"}
        for name, numbers in result["providers"].items():
            lines.append({**case, "provider": name, **numbers, **environment})
    fields: Dict[str, None] = {}
    for line in lines:
        fields.update(dict.fromkeys(line))
    with replacing(path) as file:
        writer = csv.DictWriter(file, list(fields))
        writer.writeheader()
        writer.writerows(lines)
