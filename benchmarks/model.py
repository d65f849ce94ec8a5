"""--model: a whole model as PyTorch runs it, and as ``ldm_fused.patch`` makes it: time, memory and error."""

import copy
import itertools
import math
from dataclasses import dataclass, field
from typing import Callable, Dict, List, Optional, Sequence

import torch
from torch import Tensor, nn

import ldm_fused
from benchmarks import diffusers_models, machine, measure
from benchmarks.autoencoder import AutoencoderKL
from benchmarks.providers import Contender, NormSwish, randomize_norms
from benchmarks.report import Cell, Progress, aligned, geometric_mean, scaled, times
from ldm_fused import reference

TITLES = {"ldm": "LDM's kl-f8 autoencoder", **diffusers_models.TITLES}
FOLD, LAYOUT = {"fold_upsample": True}, {"memory_format": torch.channels_last}


@dataclass(frozen=True)
class Way:
    """How a model is run: as it is, or with these options of ``patch``."""

    patch: Optional[Dict[str, object]] = None
    channels_last: bool = False  # weights, and the input
    compiled: str = ""  # "before" patch or "after" it
    replayed: bool = False  # as a CUDA graph

    @property
    def laid_out(self) -> bool:
        return self.channels_last or "memory_format" in (self.patch or {})


WAYS = {
    "eager": Way(),
    "channels_last": Way(channels_last=True),
    "compile": Way(compiled="after"),
    "patch": Way({}),
    "patch+layout": Way(LAYOUT),
    "patch+fold": Way(FOLD),
    "patch+both": Way({**FOLD, **LAYOUT}),
    "patch+both+graph": Way({**FOLD, **LAYOUT}, replayed=True),
    "patch+both+compile": Way({**FOLD, **LAYOUT}, compiled="after"),
    "compile+patch+both": Way({**FOLD, **LAYOUT}, compiled="before"),
    "patch+recompute": Way({"recompute": True}),
    "again": Way({**FOLD, **LAYOUT}),
}
BEST = ("patch+both", "patch+layout", "patch+fold", "patch")  # of those that run, the first is what the end is about
PEERS = ("channels_last", "compile")  # what a user has without ldm_fused


@dataclass
class ModelRow:
    """One task of a model at one size, in each way."""

    model: str
    mode: str
    dtype: str
    device: str
    resolution: int
    cells: Dict[str, Cell] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.mode} {self.resolution} x {self.resolution} {self.dtype}"

    def seconds(self, name: str) -> Optional[float]:
        return self.cells[name].seconds("wall") if name in self.cells else None

    def speedup(self, name: str) -> Optional[float]:
        """Over eager."""
        return quotient(self.seconds("eager"), self.seconds(name))

    def ratio(self, name: str, what: str) -> Optional[float]:
        """``peak_bytes`` or ``kept_bytes`` over eager's."""
        mine, eager = (getattr(self.cells.get(n, Cell()), what) for n in (name, "eager"))
        return quotient(mine, eager)

    def as_dict(self) -> Dict[str, object]:
        numbers = {
            name: {
                "wall_seconds": cell.seconds("wall"),
                "wall_interval": cell.timing.interval("wall") if cell.timing else None,
                "speedup": self.speedup(name),
                "peak_bytes": cell.peak_bytes,
                "kept_bytes": cell.kept_bytes,
                "error_over_eager": cell.error if cell.error is not None and math.isfinite(cell.error) else None,
                "psnr": cell.psnr,
                "reason": cell.reason,
            }
            for name, cell in self.cells.items()
        }
        case = {k: getattr(self, k) for k in ("model", "mode", "dtype", "device", "resolution")}
        return {"level": "model", **case, "providers": numbers}


def quotient(a: Optional[float], b: Optional[float]) -> Optional[float]:
    return a / b if a is not None and b else None


# ---- what is run


def chosen(args) -> List[ModelRow]:
    """Everything to run, sizes and dtypes one after the other."""
    return [ModelRow(args.model, task, dtype, args.device, resolution)
            for dtype, resolution, task in itertools.product(args.dtypes, args.resolutions, tasks(args))]


def tasks(args) -> List[str]:
    forward = ["step"] if args.model == "diffusers-unet" else ["encode", "decode"]
    asked = [task for task in forward if args.forward or getattr(args, task, False)]
    asked += ["training"] * args.train
    return asked or [*forward, "training"]


def ways_of(task: str, args) -> List[str]:
    """Those asked for; by default all that the task and the device have, but for what only experiments want."""
    if args.ways:
        return [name for name in args.ways if not (WAYS[name].replayed and task == "training")]
    left_out = {"compile+patch+both", "again"}
    left_out |= set() if task == "training" else {"patch+recompute"}
    left_out |= set() if args.device == "cuda" and task != "training" else {"patch+both+graph"}
    return [name for name in WAYS if name not in left_out]


def synthetic_picture(resolution: int) -> Tensor:
    """(1, 3, resolution, resolution) between -1 and 1. Coloured rings and a slope: edges as well as smooth areas."""
    axis = torch.linspace(-1, 1, resolution)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    rings = torch.sin(12 * torch.hypot(x, y))
    return torch.stack([rings, x * rings, 0.5 * (x + y)])[None]


def input_of(model: nn.Module, task: str, resolution: int) -> Tensor:
    """A picture, or the latent of one of that size."""
    if task in ("encode", "training") and not isinstance(model, diffusers_models.Step):
        return synthetic_picture(resolution)
    generator = torch.Generator().manual_seed(2)
    return torch.randn(1, model.latent_channels, resolution // 8, resolution // 8, generator=generator)


class Models:
    """One model with random weights, and copies of it, each patched in its way. All have the same Parameters, once more
    in channels_last: weights count twice, however many ways there are."""

    def __init__(self, name: str, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        model = AutoencoderKL(reference.ResnetBlock, NormSwish) if name == "ldm" else diffusers_models.make(name)
        self.bases = {False: randomize_norms(model).to(device, dtype).eval()}
        self.copies: Dict[str, nn.Module] = {}

    def copy(self, name: str) -> nn.Module:
        if name not in self.copies:
            way = WAYS[name]
            if way.laid_out and True not in self.bases:
                self.bases[True] = copy.deepcopy(self.bases[False]).to(memory_format=torch.channels_last)
            base = self.bases[way.laid_out]
            shared = {id(t): t for t in (*base.parameters(), *base.buffers())}
            self.copies[name] = patched(copy.deepcopy(base, shared), way)
        return self.copies[name]

    def contender(self, name: str, task: str, x: Tensor) -> Contender:
        way, model = WAYS[name], self.copy(name)
        function = call = method(model, task)
        if way.compiled:
            function = call = torch.compile(function, dynamic=False, fullgraph=True)
        if way.compiled == "before":
            ldm_fused.unpatch(model)
            with torch.set_grad_enabled(task == "training"):
                function(x)
            patched(model, way)
        if way.channels_last:
            call = lambda x: function(x.contiguous(memory_format=torch.channels_last))  # noqa: E731
        if way.replayed:
            call = replay(function, x)
        return Contender(name, call, list(model.parameters()))

    def oracle(self, task: str) -> Contender:
        model = copy.deepcopy(self.bases[False]).double()
        return Contender("oracle", method(model, task), list(model.parameters()))


def method(model: nn.Module, task: str) -> Callable[[Tensor], Tensor]:
    return getattr(model, task) if task in ("encode", "decode") else model.forward


def patched(model: nn.Module, way: Way) -> nn.Module:
    """As a user would: what diffusers made, and not the benchmark's module around it."""
    if way.patch is not None:
        ldm_fused.patch(getattr(model, "model", model), **way.patch)
    return model


@torch.no_grad()
def replay(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """``function`` as a CUDA graph; each call writes into the same result."""
    x = x.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what libraries choose and allocate at their first calls is no part of the graph
        for _ in range(3):
            function(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = function(x)

    def call(new: Tensor) -> Tensor:
        x.copy_(new)
        graph.replay()
        return y

    return call


# ---- the run


def run(args, save: Callable[[List[ModelRow]], None] = lambda rows: None) -> List[ModelRow]:
    """All rows that the arguments ask for; `save` gets those that are done."""
    todo = chosen(args)
    progress = Progress(sum(len(ways_of(row.mode, args)) + 2 for row in todo))
    done = []
    for dtype, rows in itertools.groupby(todo, lambda row: row.dtype):
        models = Models(args.model, args.device, getattr(torch, dtype))
        for row in rows:
            measure_row(row, models, ways_of(row.mode, args), args, progress)
            done.append(row)
            save(done)
    progress.close()
    return done


def measure_row(row: ModelRow, models: Models, names: Sequence[str], args, progress: Progress) -> None:
    """Error, memory and time of every way."""
    torch.compiler.reset()  # or the limit on recompilations would be reached
    dtype, mode = getattr(torch, row.dtype), "training" if row.mode == "training" else "forward"
    x = input_of(models.bases[False], row.mode, row.resolution).to(args.device, dtype)
    with torch.no_grad():
        y = models.contender("eager", row.mode, x).call(x)
    generator = torch.Generator().manual_seed(3)
    dy = torch.randn(y.shape, generator=generator).to(y)
    inputs = (x,) if mode == "forward" else (x.requires_grad_(), dy)
    del y
    truth, ruler, runs = None, None, {}
    for name in dict.fromkeys(["eager", *names]):  # eager is the ruler of the others, asked for or not
        progress.show(f"{row.title}: {name}, error and memory")
        cell = row.cells[name] = Cell()
        try:
            contender = models.contender(name, row.mode, x.detach())
            found = measure.results(contender, mode, inputs)
            cell.peak_bytes = None if WAYS[name].replayed else measure.peak_bytes(contender, mode, inputs)
            if mode == "training":
                cell.kept_bytes = measure.kept_bytes(contender, x)
            if truth is None:
                truth = oracle(models, row, mode, inputs, cell.peak_bytes, progress)
            found = errors(found, truth)
            ruler = ruler or found
            cell.error = max(mine / (eager or 1.0) for mine, eager in zip(found, ruler))
            cell.psnr = psnr(found[0], truth[0])
            check(found, ruler, dtype)
            runs[name] = measure.runner(contender, mode)
        except measure.CheckFailed as e:
            cell.reason, cell.failed = f"CHECK FAILED, not timed: {e}", True
        except Exception as e:  # torch.compile without a working compiler, or too little memory: the others go on
            cell.reason = measure.first_line(e)
            cell.failed = not WAYS[name].compiled and not measure.out_of_memory(e)
        progress.step()
        if cell.failed:
            progress.say(f"{name}, {row.title}: {cell.reason}")
    row.cells = {name: row.cells[name] for name in names}
    del truth
    progress.show(f"{row.title}: timing")
    timings = measure.time_in_turn({name: run for name, run in runs.items() if name in names}, [inputs], mode,
                                   args.min_run_time, graphs=False)
    for name, timing in timings.items():
        row.cells[name].timing = timing
    progress.step()


def oracle(models: Models, row: ModelRow, mode: str, inputs, eager_peak: int, progress: Progress) -> List[Tensor]:
    """The results in float64."""
    progress.show(f"{row.title}: in float64")
    needed = 8 // getattr(torch, row.dtype).itemsize * eager_peak + sum(
        p.numel() * 8 for p in models.bases[False].parameters())
    if needed > machine.available_bytes(row.device):
        raise MemoryError(f"float64, which errors are measured against, needs {needed / 1e9:.0f} GB")
    inputs64 = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in inputs)
    truth = measure.results(models.oracle(row.mode), mode, inputs64)
    progress.step()
    return truth


def errors(found: Sequence[Tensor], truth: Sequence[Tensor]) -> List[float]:
    """Root mean square errors over root mean square values: of y, and in training of dx and of all parameters'
    gradients together, for one by one some of them vanish but for rounding."""
    parts = [slice(0, 1), slice(1, 2), slice(2, None)] if len(found) > 1 else [slice(0, 1)]
    return [relative_error(found[part], truth[part]) for part in parts]


def relative_error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    off = sum((f.double() - t).square().sum().item() for f, t in zip(found, truth, strict=True))
    size = sum(t.square().sum().item() for t in truth)
    return math.sqrt(off / size) if size and math.isfinite(off) else math.inf


def psnr(error: float, truth: Tensor) -> Optional[float]:
    """Decibels between the range of the result's values and their root mean square error."""
    off = error * truth.square().mean().sqrt().item()
    return 20 * math.log10((truth.max() - truth.min()).item() / off) if off and math.isfinite(off) else None


def check(found: Sequence[float], eager: Sequence[float], dtype: torch.dtype) -> None:
    """Raises CheckFailed where an error says that something else was computed; how near it is the table says."""
    factor, units = measure.MARGINS["block"]
    for name, mine, ruler in zip(("y", "dx", "the parameters' gradient"), found, eager):
        allowed = factor * min(ruler, 0.05) + units * torch.finfo(dtype).eps
        if not mine <= allowed:
            raise measure.CheckFailed(f"{name} is off by {mine:.2g} of its size, {allowed:.2g} allowed")


# ---- what is printed


def summary(rows: List[ModelRow], args) -> str:
    """One table, and the three lines that a user wants to know."""
    reasons = [f"n/a  {name}: {c.reason}  ({r.title})" for r in rows for name, c in r.cells.items() if c.reason]
    parts = [f"{TITLES[args.model]}, batch 1, random weights", table(rows), LEGEND, "\n".join(reasons), in_short(rows)]
    return "\n" + "\n\n".join(filter(None, parts))


LEGEND = """\
training: forward and backward of encoding and decoding a picture, all gradients. patch+layout: channels_last.
ms: median of one call, the ways in turn. peak: the most memory allocated during a call, above weights and input.
kept: what autograd keeps for the backward pass. error: root mean square, against float64, over eager's; in training
the worst of the picture's, the input's gradient's and the parameters'. PSNR: of the result's range, against float64."""


def table(rows: List[ModelRow]) -> str:
    """A line a way, and an empty one between the rows."""
    training = any(row.mode == "training" for row in rows)
    head = ["", "ms", "vs eager", "peak MB", "of eager's", *["kept MB", "of eager's"] * training, "error", "PSNR dB"]
    lines, titles = [head], {}
    for row in rows:
        titles[len(lines)] = row.title
        lines.append([""] * len(head))
        for name, cell in row.cells.items():
            line = [f"  {name}", scaled(row.seconds(name), 1e3), times(row.speedup(name)),
                    scaled(cell.peak_bytes, 1e-6), times(row.ratio(name, "peak_bytes"))]
            if training:
                kept = [scaled(cell.kept_bytes, 1e-6), times(row.ratio(name, "kept_bytes"))]
                line += kept if row.mode == "training" else ["", ""]
            lines.append([*line, times(cell.error), "n/a" if cell.psnr is None else f"{cell.psnr:.1f}"])
    text = aligned(lines, left=1).split("\n")
    for at, title in titles.items():
        text[at] = f"\n{title}"
    return "\n".join(text)


def in_short(rows: List[ModelRow]) -> str:
    """Time, memory and accuracy of the best way, a line each."""
    best = next((name for name in BEST if any(row.seconds(name) for row in rows)), None)
    rows = [row for row in rows if best and row.seconds(best)]
    if not rows:
        return ""
    groups = [list(group) for _, group in itertools.groupby(sorted(rows, key=lambda r: r.mode), lambda r: r.mode)]
    timed = filter(None, [*(against(group, best) for group in groups),
                          *(faster(rows, name, best) for name in ("patch+both+compile", "compile+patch+both"))])
    memory = filter(None, (bytes_of(group, best) for group in groups))
    cells = [row.cells[best] for row in rows]
    psnrs = [cell.psnr for cell in cells if cell.psnr is not None]
    accuracy = f"error at most {times(max(cell.error for cell in cells))} eager's"
    accuracy += f", PSNR {min(psnrs):.1f} dB or more" if psnrs else ""
    mean = f" ({len(rows)} cases, geometric means)" if len(rows) > len(groups) else ""
    return "\n".join([f"In short, {best}{mean}:", f"  time: {'; '.join(timed)}", f"  memory, of eager's: {'; '.join(memory)}",
                      f"  against float64: {accuracy}"])


def against(group: Sequence[ModelRow], best: str) -> str:
    """How many times as fast it is as eager, and as the fastest that a user has without it."""
    peers = [name for name in PEERS if any(row.seconds(name) for row in group)]
    fastest = [min(filter(None, map(row.seconds, peers)), default=None) for row in group]
    eager = geometric_mean(filter(None, (row.speedup(best) for row in group)))
    peer = geometric_mean(filter(None, (quotient(s, row.seconds(best)) for s, row in zip(fastest, group))))
    named = f"the best of {' and '.join(peers)}" if len(peers) > 1 else "".join(peers)
    found = [f"{times(mean)} {name}" for mean, name in ((eager, "eager"), (peer, named)) if mean]
    return f"{group[0].mode} is {' and '.join(found)}" if found else ""


def bytes_of(group: Sequence[ModelRow], best: str) -> str:
    found = []
    for what, name in (("peak_bytes", "peak"), ("kept_bytes", "kept for the backward pass")):
        mean = geometric_mean(filter(None, (row.ratio(best, what) for row in group)))
        found += [f"{name} {times(mean)}"] if mean else []
    return f"{group[0].mode} {', '.join(found)}" if found else ""


def faster(rows: Sequence[ModelRow], name: str, best: str) -> str:
    """What compiling gains."""
    mean = geometric_mean(filter(None, (quotient(row.seconds(best), row.seconds(name)) for row in rows)))
    return f"{name} is {times(mean)} {best}" if mean else ""
