"""--plot: speed-ups, the share of copy bandwidth, and a model's memory, as charts for a README."""

import importlib.util
from typing import Callable, Dict, List, Optional, Sequence

from benchmarks import model
from benchmarks.machine import counted
from benchmarks.report import Row, percent, times

# Told apart with any colour vision, and in grey: two greys, and the orange and the blue of Okabe and Ito's palette.
COLOURS = {"eager": "#6e6e6e", "F.silu": "#b9b9b9", "compile": "#E69F00", "ours": "#0072B2"}
LABELS = {
    "eager": "eager: h = norm(x); h * sigmoid(h)",
    "F.silu": "F.silu(F.group_norm(x))",
    "compile": "torch.compile",
    "ours": "ldm_fused",
}
MARKERS = {"eager": "s", "F.silu": "D", "compile": "^", "ours": "o"}
MANY = 12  # cases from which on a panel shows dots, a line a case, in place of bars
BAR, LINE = 0.19, 0.23  # inches, at least as high as a label


def available() -> bool:
    """Whether matplotlib is installed; it is not needed for anything else."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(path: str, rows: Sequence[Row], names: Sequence[str], model_rows: Sequence[model.ModelRow],
         environment: Dict[str, object]) -> None:
    """One line of panels each for the op forward and in training (speed-up, share of copy), for the block (speed-up
    forward and in training), and for each task of a model (speed-up, memory)."""
    from matplotlib.figure import Figure

    lines = [*filter(any, panels(rows, names)), *map(model_panels, model_rows)]
    if not lines:
        return
    heights = [0.75 + max(panel.height() for panel in line if panel) for line in lines]
    notes = footnote(rows, model_rows)
    heights = [0.8 if rows else 0.55, *heights, 0.1 + 0.17 * len(notes.split("\n"))]
    figure = Figure(figsize=(12.5, sum(heights)), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    head, foot = (figure.add_subplot(grid[i, :]) for i in (0, -1))
    for axes in (head, foot):
        axes.axis("off")
    name, where = title(rows, model_rows, environment)
    head.text(0, 1, name, fontsize=14, fontweight="bold", va="top")
    head.text(0, 0.56 if rows else 0.35, where, fontsize=10.5, va="top", color="#444444")
    if rows:
        dots = any(isinstance(panel, Panel) and panel.dots for line in lines for panel in line)
        shown = [handle(name, dots) for name in names]
        head.legend(handles=shown, loc="lower left", ncols=len(shown), frameon=False, borderpad=0, borderaxespad=0)
    foot.text(0, 0, notes, fontsize=9, color="#444444", va="bottom")
    for i, line in enumerate(lines, start=1):
        for j, panel in enumerate(line):
            if panel:
                panel.draw(figure.add_subplot(grid[i, j]))
    figure.savefig(path, dpi=150)


def panels(rows: Sequence[Row], names: Sequence[str]) -> List[List[Optional["Panel"]]]:
    """The panels, line by line and one dtype after the other; None where there is nothing to show."""
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    if len(dtypes) > 1:
        parts = [(f", {dtype}", [row for row in rows if row.dtype == dtype]) for dtype in dtypes]
    else:
        parts = [("", rows)]
    return [line for suffix, part in parts for line in panels_of(part, names, suffix)]


def panels_of(rows: Sequence[Row], names: Sequence[str], suffix: str) -> List[List[Optional["Panel"]]]:
    """Those of one dtype; `suffix` is the end of their titles."""

    def group(level, mode):
        return [r for r in rows if (r.level, r.mode) == (level, mode) and any(r.seconds(n) for n in names)]

    others = [name for name in names if name != "eager"] if "eager" in names else []

    def speedup(level, mode):
        found = group(level, mode)
        value = lambda row, name: row.speedup("eager", name)  # noqa: E731
        name = f"{level}, {mode}{suffix}: speed-up over eager"
        return Panel(name, found, others, value, times) if found and others else None

    def share(mode):
        found = group("op", mode)
        value = lambda row, name: row.copy_share(name)  # noqa: E731
        return Panel(f"op, {mode}{suffix}: share of copy", found, names, value, percent) if found else None

    return [
        [speedup("op", "forward"), share("forward")],
        [speedup("op", "training"), share("training")],
        [speedup("block", "forward"), speedup("block", "training")],
    ]


def model_panels(row: model.ModelRow) -> List["ModelPanel"]:
    memory = "kept_bytes" if row.mode == "training" else "peak_bytes"
    named = "kept for the backward pass" if row.mode == "training" else "peak memory"
    return [ModelPanel(f"{row.title}: speed-up over eager", row, row.speedup),
            ModelPanel(f"{named}, of eager's (less is better)", row, lambda name: row.ratio(name, memory))]


class ModelPanel:
    """A bar for each way to run a model."""

    def __init__(self, title: str, row: model.ModelRow, value: Callable) -> None:
        self.title, self.row, self.value = title, row, value

    def height(self) -> float:
        return 1.15 * BAR * len(self.row.cells)

    def draw(self, axes) -> None:
        values = {name: self.value(name) for name in self.row.cells}
        best = next((name for name in model.BEST if values.get(name)), None)
        for y, (name, value) in enumerate(values.items()):
            colour = COLOURS["ours" if model.WAYS[name].patch is not None else "eager" if name == "eager" else "F.silu"]
            axes.barh(y, value or 0, height=0.78, color=colour)
            annotate(axes, times(value), value, y, bold=name == best)
        axes.set_ylim(len(values) - 0.4, -0.6)
        axes.set_yticks(range(len(values)), list(values))
        dress(axes, self.title, filter(None, values.values()), times)


class Panel:
    """A line or a group of bars for each case, in it every provider's value."""

    def __init__(self, title: str, rows: List[Row], names: Sequence[str], value: Callable, text: Callable) -> None:
        self.title, self.rows, self.names, self.value, self.text = title, rows, names, value, text
        self.dots = len(rows) > MANY

    def height(self) -> float:
        return len(self.rows) * (LINE if self.dots else BAR * (len(self.names) + 0.9))

    def draw(self, axes) -> None:
        positions = self.draw_dots(axes) if self.dots else self.draw_bars(axes)
        values = [self.value(row, name) or 0 for row in self.rows for name in self.names]
        axes.set_yticks(positions, [label(row, self.rows) for row in self.rows])
        dress(axes, self.title, values, self.text)

    def draw_bars(self, axes) -> List[float]:
        """A group of horizontal bars a case, each with its value; returns the groups' middles."""
        step = len(self.names) + 0.9
        for i, row in enumerate(self.rows):
            for j, name in enumerate(self.names):
                value, y = self.value(row, name), i * step + j
                axes.barh(y, value or 0, height=0.86, color=COLOURS[name])
                self.write(axes, value, y, name)
        axes.set_ylim(len(self.rows) * step - 1.2, -0.75)
        return [i * step + (len(self.names) - 1) / 2 for i in range(len(self.rows))]

    def draw_dots(self, axes) -> List[float]:
        """A dot a provider on one line a case, ours with its value; returns the lines."""
        lines = range(len(self.rows))
        for name in self.names:
            values = [self.value(row, name) for row in self.rows]
            known = [(value, y) for value, y in zip(values, lines) if value is not None]
            axes.scatter(*zip(*known), color=COLOURS[name], marker=MARKERS[name], s=34, zorder=3) if known else None
            for value, y in known if name == "ours" else []:
                self.write(axes, value, y, name)
        axes.hlines(lines, 0, 1, transform=axes.get_yaxis_transform(), color="#e4e4e4", linewidth=0.8, zorder=0)
        axes.set_ylim(len(self.rows) - 0.4, -0.6)
        return list(lines)

    def write(self, axes, value: Optional[float], y: float, name: str) -> None:
        annotate(axes, self.text(value), value, y, name == "ours", offset=7 if self.dots else 3)


def annotate(axes, text: str, value: Optional[float], y: float, bold: bool, offset: int = 3) -> None:
    """The value behind its mark."""
    where = dict(xytext=(offset, 0), textcoords="offset points", va="center")
    where["bbox"] = dict(facecolor="white", edgecolor="none", pad=0.4)  # over the line at 1
    axes.annotate(text, (value or 0, y), fontsize=8, fontweight="bold" if bold else "normal", **where)


def dress(axes, title: str, values, text: Callable) -> None:
    """What all panels have."""
    axes.set_xlim(0, 1.12 * max(1.0, *values))
    axes.axvline(1, color="black", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0.5)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}x" if text is times else f"{100 * x:.0f}%")
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.tick_params(axis="x", labelsize=8, colors="#444444")
    axes.spines[["top", "right", "left"]].set_visible(False)


def label(row: Row, rows: Sequence[Row]) -> str:
    """The shape, and what else tells the row from others."""
    sizes = " × ".join(map(str, row.workload.shape)) + ("*" if row.large else "")
    layout = row.layout if len({r.layout for r in rows}) > 1 else ""
    activation = "no SiLU" if row.workload.activation is None else ""
    return ", ".join(filter(None, [sizes, activation, layout]))


def title(rows: Sequence[Row], model_rows: Sequence[model.ModelRow], environment: Dict[str, object]) -> List[str]:
    """What it is, and where it was measured."""
    layouts = {row.layout for row in rows}
    dtypes = ", ".join(dict.fromkeys(row.dtype for row in (*rows, *model_rows)))
    parts = [dtypes, *(layouts if len(layouts) == 1 else []), f"torch {environment['torch']}"]
    parts += [f"ldm_fused {environment['ldm_fused']}"]
    on_cpu = (*rows, *model_rows)[0].device == "cpu"
    threads = f", {counted(environment['threads'], 'thread')}" if on_cpu else ""
    what = "GroupNorm + SiLU in diffusion models" if rows else model.TITLES[model_rows[0].model]
    return [what, f"{environment['machine']}{threads}   |   " + "   |   ".join(parts)]


def footnote(rows: Sequence[Row], model_rows: Sequence[model.ModelRow]) -> str:
    clock = "device time by CUDA-graph replay" if any(row.clock == "device" for row in rows) else "wall time"
    text = f"Medians of {clock}. Of speed-ups, further right is better."
    if model_rows:
        text += "\nBlue: ldm_fused.patch(model), +layout: channels_last, +fold: nearest x2 and its convolution as one."
    if not rows:
        return text
    text += "\n100% of copy bandwidth: the least bytes that the op can move, moved as fast as torch's copy_ does."
    if any(row.large for row in rows):
        text += "\n* over 30 MB: on a CPU, page faults of fresh memory rule every provider's time."
    return text


def handle(name: str, dots: bool):
    """The legend's entry."""
    from matplotlib.lines import Line2D

    marker = MARKERS[name] if dots else "s"
    return Line2D([], [], color=COLOURS[name], marker=marker, linestyle="", markersize=9, label=LABELS[name])
