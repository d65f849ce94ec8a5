"""Does an adapter compute what the class computes? Tried on a small private copy with random weights.

A class is known by where it is defined, but libraries change, and forks keep the names: what its forward does is looked
at.
"""

from typing import Any, Dict, List, Optional

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import swap
from .adapter import Adapter

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the largest number


class Halving(nn.Module):
    """Stands in for dropout in a trial: where it is and when, without chance."""

    def __init__(self, like: nn.Dropout) -> None:
        super().__init__()
        self.p, self.inplace = 0.5, False
        self.train(like.training)

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5 if self.training else x


def why_not(block: nn.Module, adapter: Adapter) -> Optional[str]:
    """The reason why ``adapter`` does not compute what ``block``'s class does, output and gradients, or None."""
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad(), \
                torch.autocast("cpu", enabled=False), torch.device("cpu"):
            torch.default_generator.manual_seed(0)  # the CPU's alone, which is given back as it was
            arguments = adapter.example(block)
            if arguments is None:
                return None
            own = private_copy(block, {}).to(adapter.trial_dtype)
            arguments = [t.to(adapter.trial_dtype) if isinstance(t, Tensor) and t.is_floating_point() else t
                         for t in arguments]
            leaves = [t for t in (*arguments, *own.parameters()) if isinstance(t, Tensor) and t.is_floating_point()]
            for t in leaves:
                t.requires_grad_()
            for training in (True, False):
                own.train(training)
                expected = _results(own, adapter, arguments, leaves)
                swap.swap(own, adapter, recompute=False)
                try:
                    found = _results(own, adapter, arguments, leaves)
                finally:
                    swap.swap_back(own)
                names = ["output"] * (len(expected) - len(leaves)) + ["gradient"] * len(leaves)
                if len(found) != len(expected):
                    return f"in a trial its {adapter.method} had another number of outputs than is known of the class"
                for name, a, b in zip(names, found, expected):
                    if not _close(a, b):
                        return (f"in a trial in {'training' if training else 'evaluation'} its {adapter.method} "
                                f"computed another {name} than is known of the class")
    except Exception as error:  # whatever a class raises is a reason to leave it alone
        return f"a trial failed with {type(error).__name__}: {error}"
    return None


def _results(block: nn.Module, adapter: Adapter, arguments, leaves) -> List[Tensor]:
    torch.default_generator.manual_seed(1)
    own = [t.clone() if isinstance(t, Tensor) else t for t in arguments]  # some blocks write to them
    y = getattr(block, adapter.method)(*own)
    y, *others = [t for t in tree_leaves(y) if isinstance(t, Tensor)]
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    gradients = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    return [y, *others, *(torch.zeros((), dtype=y.dtype) if g is None else g for g in gradients)]


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    tolerance = TOLERANCE[a.dtype]
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, b.abs().max().item()))


def private_copy(module: nn.Module, memo: Dict[int, nn.Module]) -> nn.Module:
    """The module in float64 on the CPU, with random parameters and without what was hung on it: hooks, a forward."""
    if id(module) in memo:
        return memo[id(module)]
    if type(module) is nn.Dropout:
        own = Halving(module)
    else:
        cls = swap.original(type(module))
        own = cls.__new__(cls)
        nn.Module.__init__(own)
        fresh = set(vars(own)) - {"training"}
        kept = {k: v for k, v in vars(module).items() if k not in fresh and k not in ("forward", swap.STATE)}
        own.__dict__.update(kept)
        own._parameters = {name: _random(p) for name, p in module._parameters.items()}
        own._buffers = {name: _cpu(b) for name, b in module._buffers.items()}
        own._modules = {name: None if child is None else private_copy(child, memo)
                        for name, child in module._modules.items()}
        own._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    memo[id(module)] = own
    return own


def _random(parameter: Optional[nn.Parameter]) -> Optional[nn.Parameter]:
    if parameter is None:
        return None
    values = torch.randn(parameter.shape, dtype=torch.float64)
    return nn.Parameter(values * (values[0].numel() if values.dim() else 1) ** -0.5)


def _cpu(buffer: Optional[Tensor]) -> Any:
    if buffer is None or buffer.is_meta:
        return None if buffer is None else torch.randn(buffer.shape, dtype=torch.float64)
    return buffer.detach().to("cpu", torch.float64 if buffer.is_floating_point() else buffer.dtype, copy=True)
