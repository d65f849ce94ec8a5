"""Whether an adapter computes what the class computes, tried on a copy with random weights.

A class is known by its path or by its formula. The trial is the second check: libraries change, and forks keep the
names. It runs forward and backward, in training and evaluation, with gradients and without, in two shapes, in float64
and 16 bits, with small numbers and with some that a clamp would change.
"""

import copy
from contextlib import contextmanager
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from . import swap
from .adapter import STATE, Adapter

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-2}  # of the largest number
LARGE = {torch.float64: 1e9, torch.float16: 6.2e4}


class Halving(nn.Module):
    """Stands in for dropout in a trial: its place and mode matter, chance does not."""

    def __init__(self, like: nn.Dropout) -> None:
        super().__init__()
        self.p, self.inplace = 0.5, False
        self.train(like.training)

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5 if self.training else x


class InFloat64(TorchFunctionMode):
    """Ignores casts of float64 to float32, so that code which always computes in float32 is compared in float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        if any(a is torch.float32 for a in args):
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {name: torch.float64 if a is torch.float32 else a for name, a in kwargs.items()}
        return function(*args, **kwargs)


def difference(block: nn.Module, adapter: Adapter) -> Optional[str]:
    """How what ``adapter`` computes differs from what ``block``'s class does, output and gradients, or None."""
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad(), \
                torch.autocast("cpu", enabled=False), torch.device("cpu"):
            torch.default_generator.manual_seed(0)  # the CPU's alone, which fork_rng restores
            examples = [_cast(example, torch.float64) for example in adapter.examples(block)]
            if not examples:
                return None
            trial = _Trial(random_copy(block, {}).to(torch.float64), adapter)
            for example in examples:
                reason = trial.in_float64(example)
                if reason is not None:
                    return reason
            trial.own.to(torch.float16)
            with torch.no_grad():
                return trial.in_16_bits(_other_shape(examples[-1]))
    except Exception as error:  # whatever a class raises: it cannot be compared
        return f"a trial failed with {type(error).__name__}: {error}"


class _Trial:
    def __init__(self, own: nn.Module, adapter: Adapter) -> None:
        self.own, self.adapter = own, adapter

    def in_float64(self, example: Sequence[Any]) -> Optional[str]:
        with InFloat64():
            large = _large(_other_shape(example), torch.float64)
            for mode, results in (("training", lambda: self.gradients(example)),
                                  ("evaluation", lambda: self.outputs(example)),
                                  ("evaluation without gradients", torch.no_grad()(lambda: self.outputs(large)))):
                self.own.train(mode == "training")
                reason = self.differs(results)
                if reason is not None:
                    return f"in a trial in {mode} its {self.adapter.method} {reason}"
        return None

    def in_16_bits(self, example: Sequence[Any]) -> Optional[str]:
        example = _large(_cast(example, torch.float16), torch.float16)
        try:
            expected = self.outputs(example)
        except RuntimeError:
            return None  # the class does not run in 16 bits, or not on a CPU
        reason = self.differs(lambda: self.outputs(example), expected)
        return reason and f"in a trial in 16 bits its {self.adapter.method} {reason}"

    def differs(self, results, expected=None) -> Optional[str]:
        expected, names = results() if expected is None else expected
        with self.fused():
            found, _ = results()
        if len(found) != len(expected):
            return "had another number of outputs than is known of the class"
        for name, a, b in zip(names, found, expected):
            if not _close(a, b):
                return f"computed another {name} than is known of the class"
        return None

    @contextmanager
    def fused(self):
        swap.swap(self.own, self.adapter, recompute=False)
        try:
            yield
        finally:
            swap.swap_back(self.own)

    def gradients(self, example: Sequence[Any]) -> Tuple[List[Tensor], List[str]]:
        leaves = [t for t in (*example, *self.own.parameters()) if isinstance(t, Tensor) and t.is_floating_point()]
        for t in leaves:
            t.requires_grad_()
        outputs = self.call(example)
        y = outputs[0]
        dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
        # What torch.autograd.grad calls, which itself would leave InFloat64.
        found = _engine_run_backward((y,), (dy,), False, False, tuple(leaves), True, accumulate_grad=False)
        found = [torch.zeros((), dtype=y.dtype) if g is None else g for g in found]
        return [*(t.detach() for t in outputs), *found], ["output"] * len(outputs) + ["gradient"] * len(found)

    def outputs(self, example: Sequence[Any]) -> Tuple[List[Tensor], List[str]]:
        found = [t.detach() for t in self.call(example)]
        return found, ["output"] * len(found)

    def call(self, example: Sequence[Any]) -> List[Tensor]:
        torch.default_generator.manual_seed(1)
        given = [t.clone() if isinstance(t, Tensor) else t for t in example]  # some blocks write to them
        return [t for t in tree_leaves(getattr(self.own, self.adapter.method)(*given)) if isinstance(t, Tensor)]


def _cast(example: Sequence[Any], dtype: torch.dtype) -> List[Any]:
    return [t.detach().to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in example]


def _other_shape(example: Sequence[Any]) -> List[Any]:
    """The first of the batch, with one more column."""
    first, *others = [t[:1] if isinstance(t, Tensor) and t.dim() else t for t in example]
    return [torch.cat([first, first[..., :1] * 0.5], -1) if first.dim() >= 3 else first, *others]


def _large(example: Sequence[Any], dtype: torch.dtype) -> List[Any]:
    """The example with its first tensor scaled to the largest numbers that the dtype takes."""
    x = example[0]
    peak = x.detach().abs().max()
    return [(x.detach() / peak * LARGE[dtype]), *example[1:]]


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.numel() == 0:
        return True
    largest = max(b.max().item(), -b.min().item())
    if not largest < float("inf"):  # infinite, or not a number
        return torch.equal(a.isfinite(), b.isfinite())
    return (a - b).abs_().max().item() <= TOLERANCE[a.dtype] * max(1.0, largest)


# ---- A random copy ---------------------------------------------------------------------------------------------------


def random_copy(module: nn.Module, memo: Dict[int, Any]) -> nn.Module:
    """A copy of the module in float64 on the CPU, with random parameters, and without hooks or a replaced forward.

    Lists, dicts and whatever else it has are copied, too: a forward may write to them.
    """
    if id(module) in memo:
        return memo[id(module)]
    if type(module) is nn.Dropout:
        own = memo[id(module)] = Halving(module)
        return own
    cls = swap.original(type(module))
    own = memo[id(module)] = cls.__new__(cls)
    nn.Module.__init__(own)
    fresh = set(vars(own)) - {"training"}
    kept = {k: v for k, v in vars(module).items() if k not in fresh and k not in ("forward", STATE)}
    own.__dict__.update({k: _own(v, memo) for k, v in kept.items()})
    own._parameters = {name: _random(p) for name, p in module._parameters.items()}
    own._buffers = {name: _cpu(b) for name, b in module._buffers.items()}
    own._modules = {name: None if child is None else random_copy(child, memo)
                    for name, child in module._modules.items()}
    own._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    return own


def _own(value: Any, memo: Dict[int, Any]) -> Any:
    if isinstance(value, (bool, int, float, str, type(None), torch.dtype, torch.device)):
        return value
    if isinstance(value, nn.Module):
        return random_copy(value, memo)
    if isinstance(value, Tensor):
        return _cpu(value)
    if type(value) in (list, tuple, set):
        return type(value)(_own(v, memo) for v in value)
    if type(value) is dict:
        return {k: _own(v, memo) for k, v in value.items()}
    try:
        return copy.deepcopy(value)
    except Exception:  # a lock, a file
        return value


def _random(parameter: Optional[nn.Parameter]) -> Optional[nn.Parameter]:
    if parameter is None:
        return None
    values = torch.randn(parameter.shape, dtype=torch.float32).double()
    return nn.Parameter(values * (values[0].numel() if values.dim() else 1) ** -0.5)


def _cpu(buffer: Optional[Tensor]) -> Any:
    if buffer is None or buffer.is_meta:
        return None if buffer is None else torch.randn(buffer.shape, dtype=torch.float64)
    return buffer.detach().to("cpu", torch.float64 if buffer.is_floating_point() else buffer.dtype, copy=True)
