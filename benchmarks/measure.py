"""Inputs that caches cannot flatter, results checked before anything is timed, and the timing itself.

The byte model. With B = the bytes of x, the op cannot move less than

    forward   2 B   read x, write y
    backward  3 B   read x and dy, write dx
    training  5 B   forward and backward

through memory: what a channel or a group has is negligible beside it. GB/s is that limit over the measured time, and
its share of the copy bandwidth (torch's copy_ over tensors of the same size, 2 B, timed in turn with everything else)
says how near to the limit an implementation is. One that reads a tensor twice shows a lower share, as it should.
"""

import contextlib
import itertools
import math
import timeit
from dataclasses import dataclass, field
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch._functorch.config
from torch import Tensor
from torch.utils.benchmark import Measurement
from torch.utils.benchmark import timer as synchronized

from benchmarks import machine
from benchmarks.providers import MEMORY_FORMATS, Contender

PASSES = {"forward": 2, "backward": 3, "training": 5}
Inputs = Tuple[Tensor, ...]


def limit_bytes(numel: int, itemsize: int, mode: str) -> int:
    """The bytes that the op has to move at least; `mode` is one of PASSES."""
    return PASSES[mode] * numel * itemsize


# ---- inputs


def random_tensor(shape: Sequence[int], layout: str, device, dtype) -> Tensor:
    """Fresh normal data in this memory format."""
    if layout == "channels_last" and len(shape) == 5:
        layout = "channels_last_3d"
    return torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=MEMORY_FORMATS[layout])


def make_inputs(shape: Sequence[int], layout: str, mode: str, device, dtype, limit: int = 64) -> List[Inputs]:
    """(x,) or (x, dy), as often as fills the last-level cache twice (at most `limit` times), so that a call finds its
    input in memory."""
    size = math.prod(shape) * dtype.itemsize * (1 if mode == "forward" else 2)
    sets = min(limit, max(2, math.ceil(2 * machine.cache_bytes(device) / size)))
    if mode == "forward":
        return [(random_tensor(shape, layout, device, dtype),) for _ in range(sets)]
    return [
        (random_tensor(shape, layout, device, dtype).requires_grad_(), random_tensor(shape, layout, device, dtype))
        for _ in range(sets)
    ]


# ---- what is run


def runner(contender: Contender, mode: str) -> Callable[..., object]:
    """What is timed: the forward pass, the backward pass of one that ran before, or forward and backward."""
    if mode == "forward":
        return contender.call
    if mode == "backward":
        return backward_runner(contender)
    return lambda x, dy: torch.autograd.grad(contender.call(x), [x, *contender.parameters], dy)


def backward_runner(contender: Contender) -> Callable[..., object]:
    """The backward pass alone. Its forward pass runs at the first call with these inputs."""
    outputs: Dict[int, Tensor] = {}

    def run(x, dy):
        if id(x) not in outputs:
            outputs[id(x)] = contender.call(x)
        return torch.autograd.grad(outputs[id(x)], [x, *contender.parameters], dy, retain_graph=True)

    return run


def compiled_for(mode: str):
    """A context for all calls of compiled code, in which a backward pass can run more than once: by default
    torch.compile writes gradients over what was kept for it."""
    if mode != "backward":
        return contextlib.nullcontext()
    return torch._functorch.config.patch(donated_buffer=False)


def results(contender: Contender, mode: str, inputs: Inputs) -> List[Tensor]:
    """y, followed by dx and the gradient of each parameter unless `mode` is the forward pass."""
    if mode == "forward":
        with torch.no_grad():
            return [contender.call(inputs[0])]
    x, dy = inputs
    y = contender.call(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *contender.parameters], dy)]


# ---- checks


class CheckFailed(Exception):
    """A provider's result is wrong."""


def error(got: Tensor, oracle: Tensor, scale: float) -> float:
    """The largest difference, in units of `scale`; infinite where one is NaN or the shapes differ."""
    if got.shape != oracle.shape:
        return math.inf
    difference = largest(got.double() - oracle)
    return difference / (scale or 1.0) if math.isfinite(difference) else math.inf


def errors(got: Sequence[Tensor], oracle: Sequence[Tensor]) -> List[float]:
    """The errors of y and dx are relative to their largest values. Those of the parameters' gradients are relative to
    the largest of them all, since some vanish but for rounding (a bias in front of a norm over single channels)."""
    shared = max(map(largest, oracle[2:]), default=0.0)
    scales = [largest(o) for o in oracle[:2]] + [shared] * len(oracle[2:])
    return [error(*each) for each in zip(got, oracle, scales, strict=True)]


def largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


# How many times eager's error, and how many units in the last place beyond, a provider may be off. The margin is for
# other people's compilers, summation orders and convolution algorithms: tests hold the kernels to a tighter bound.
MARGINS = {"op": (2, 4), "block": (4, 16)}


def check(found: Sequence[float], eager: Sequence[float], level: str, dtype: torch.dtype) -> None:
    """Raises CheckFailed unless each error is near eager's own on the same data, and eager near the oracle at all."""
    names = ["y", "dx", *(f"the gradient of parameter {i}" for i in range(len(found) - 2))]
    factor, units = MARGINS[level]
    for name, mine, ruler in zip(names, found, eager):
        allowed = factor * min(ruler, 0.05) + units * torch.finfo(dtype).eps
        if not mine <= allowed:
            raise CheckFailed(f"{name} is off by {mine:.2g} of its largest value, {allowed:.2g} allowed")


def kept_bytes(contender: Contender, x: Tensor) -> int:
    """Bytes that autograd keeps between forward and backward: each storage once, parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in contender.parameters}
    kept: Dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = contender.call(x)  # lives to the end of the block, and its graph with it: no address is used twice
    del y
    return sum(kept.values())


def peak_bytes(contender: Contender, mode: str, inputs: Inputs) -> int:
    """The most bytes that torch's allocator has handed out at a time during a pass, above what it had before."""
    run = runner(contender, mode)
    with torch.set_grad_enabled(mode != "forward"):
        return machine.peak_bytes(lambda: run(*inputs), inputs[0].device)


# ---- timing

BLOCK = 2e-3  # seconds between two looks at the clock, each of which waits for the GPU: some 10 us


@dataclass
class Timing:
    """Seconds a call: `wall` as the caller waits, `device` by CUDA-graph replay, each with an interval."""

    wall: Optional[Measurement] = None
    device: Optional[Measurement] = None
    replayed: int = 1  # calls in one replay
    note: str = ""

    def seconds(self, clock: str) -> Optional[float]:
        measured = getattr(self, clock)
        return measured and measured.median / (self.replayed if clock == "device" else 1)

    def interval(self, clock: str) -> Optional[Tuple[float, float]]:
        """The interval in which the median lies with 95 % confidence, whatever the distribution.

        How many times are below the median is binomial, so the interval's ends are two of the sorted times. Of few
        times it spans all.
        """
        measured = getattr(self, clock)
        if not measured:
            return None
        times, calls = sorted(measured.times), self.replayed if clock == "device" else 1
        below = max(0, math.floor(len(times) / 2 - 0.98 * math.sqrt(len(times))))
        return times[below] / calls, times[-1 - below] / calls


@dataclass
class Turn:
    """One provider's timers, and the seconds a call that they have measured so far."""

    timers: Dict[str, timeit.Timer]
    replayed: int = 1
    note: str = ""
    numbers: Dict[str, int] = field(default_factory=dict)
    times: Dict[str, List[float]] = field(default_factory=lambda: {"wall": [], "device": []})

    def measure(self, seconds: float) -> None:
        """Blocks of calls for so long with each timer, and at least one of them."""
        for clock, timer in self.timers.items():
            blocks = []
            if clock not in self.numbers:
                timer.timeit(1)
                first = timer.timeit(1)
                self.numbers[clock] = max(1, round(BLOCK / first))
                blocks = [first] if self.numbers[clock] == 1 else []
            number = self.numbers[clock]
            while not blocks or sum(blocks) < seconds:
                blocks.append(timer.timeit(number))
            self.times[clock] += [block / number for block in blocks]

    def timing(self) -> Timing:
        wall, device = (Measurement(1, self.times[c], None) if self.times[c] else None for c in ("wall", "device"))
        return Timing(wall, device, self.replayed, self.note)


def wall_timer(run: Callable, sets: List[Inputs]) -> timeit.Timer:
    """A timer of `run` over the inputs in rotation; the statement is all there is in the loop.

    Results are dropped, so the allocator hands the same memory out again, as it does in a model's forward pass. To
    keep them would measure the page faults of fresh memory on a CPU.
    """
    names = {"run": run, "sets": itertools.cycle(sets)}
    return timeit.Timer("run(*next(sets))", timer=synchronized, globals=names)


def own_stream(device):
    """A context in which all of a case runs: on CUDA a stream of its own. A graph cannot be captured on the default one,
    nor of a backward pass whose parameters autograd has met on another one."""
    if torch.device(device).type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.Stream())


def graph_timer(run: Callable, sets: List[Inputs]) -> timeit.Timer:
    """A timer of a CUDA graph that holds one call for each of the inputs: no launch or Python time between kernels.

    It is captured on the current stream, see own_stream().
    """
    for inputs in sets:  # all of them: a backward pass alone finds its forward pass
        run(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        outputs = [run(*inputs) for inputs in sets]
    # The outputs are kept with the graph: each call of it writes memory of its own.
    return timeit.Timer("graph.replay()", timer=synchronized, globals={"graph": graph, "outputs": outputs})


def prepare(run: Callable, sets: List[Inputs], mode: str, graphs: bool) -> Turn:
    """The timers of one provider: wall always, device time on CUDA."""
    for inputs in sets if mode == "backward" else []:  # the forward passes
        run(*inputs)
    turn = Turn({"wall": wall_timer(run, sets)})
    if graphs and sets[0][0].is_cuda:
        try:
            turn.timers["device"] = graph_timer(run, sets)
            turn.replayed = len(sets)
        except RuntimeError as e:
            torch.cuda.synchronize()
            turn.note = f"no device time, graph capture failed: {first_line(e)}"
    return turn


def time_in_turn(
    runs: Dict[str, Callable], sets: List[Inputs], mode: str, min_run_time: float, graphs: bool = True
) -> Dict[str, Timing]:
    """Medians of all, measured in rounds with each in its turn, there and back (A B B A): whatever else the machine
    does, and whatever drifts, hits all alike."""
    with torch.set_grad_enabled(mode != "forward"):
        turns = {name: prepare(run, sets, mode, graphs) for name, run in runs.items()}
        in_order, done, rounds = list(turns.values()), 0, 6
        while done < rounds:
            for turn in in_order if done % 2 == 0 else reversed(in_order):
                turn.measure(min_run_time / 6)
            done += 1
            rounds = enough_rounds(max((turn.times["wall"][0] for turn in turns.values()), default=0))
    return {name: turn.timing() for name, turn in turns.items()}


def enough_rounds(slowest: float) -> int:
    """Six, and fewer where one call already takes long: a round is a call of everybody."""
    return 6 if slowest < 5 else 4


def copy_runner(sets: List[Inputs]) -> Callable[..., None]:
    """torch's copy_ of x under the conditions of the others: into one tensor on a CPU, where the allocator hands out
    the same memory, and into as many as there are inputs on CUDA, where a graph's outputs are all kept."""
    targets = itertools.cycle([x.detach().clone() for x, *_ in (sets if sets[0][0].is_cuda else sets[:1])])
    return lambda x, *_: next(targets).copy_(x.detach())


def out_of_memory(e: BaseException) -> bool:
    """Whether this is about memory; PyTorch's CPU allocator raises a plain RuntimeError."""
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(e)


def first_line(e: BaseException) -> str:
    """An exception in one line, for a table's footnote."""
    text = str(e).strip().splitlines()
    return f"{type(e).__name__}: {text[0].strip()}" if text else type(e).__name__
