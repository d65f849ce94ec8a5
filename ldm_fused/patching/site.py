"""What patch leaves on an instance: how it is served, and what its norms did at run time."""

import os
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from .. import pristine
from .adapter import Adapter

__all__ = ["RunReport", "disabled", "report"]

STATE = "_ldm_fused"
"""The one attribute that patch puts on an instance."""

_disabled = 1 if os.environ.get("LDM_FUSED_DISABLE", "") not in ("", "0") else 0


@contextmanager
def disabled() -> Iterator[None]:
    """Within it patched modules run the code that they had before, to the bit, in the whole process.

    The environment variable ``LDM_FUSED_DISABLE=1`` does so from the start.
    """
    global _disabled
    _disabled += 1
    try:
        yield
    finally:
        _disabled -= 1


def is_disabled() -> bool:
    return _disabled > 0


def _in_backward() -> bool:
    """Whether a backward pass is running: what is called in it computes again what was counted."""
    return torch._C._current_graph_task_id() != -1


class Site:
    """One norm at run time: calls and bytes of its input, fused (under None) and by reason where not."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls: Dict[Optional[str], int] = {}
        self.bytes: Dict[Optional[str], int] = {}

    def count(self, x: Optional[Tensor], reason: Optional[str]) -> None:
        """Counts in eager mode only: in a compiled graph a counter would be a guard, and each call compile anew. x is
        None where it was not seen."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or _in_backward():
            return
        self.calls[reason] = self.calls.get(reason, 0) + 1
        self.bytes[reason] = self.bytes.get(reason, 0) + (0 if x is None else x.numel() * x.element_size())

    def __reduce__(self):
        return Site, (self.name,)  # what was counted stays with the original


class State:
    """How an instance is served."""

    def __init__(self, adapter: Adapter, module: nn.Module, recompute: bool) -> None:
        self.adapter = adapter
        self.sites = tuple(Site(name) for name in adapter.sites(module))
        self.recompute = recompute
        self.why_not: Optional[str] = None  # found out at run time
        self.known = pristine.knowledge(module)
        # A class with ways of its own to be copied goes by them, and its copies are unpatched.
        cls = type(module)
        self.travels = (cls.__reduce__ is object.__reduce__ and cls.__reduce_ex__ is object.__reduce_ex__
                        or "_ldm_fused_original" in vars(cls))

    def __reduce__(self):
        if not self.travels:
            return dict, ()
        return _revived, (self.known, self.adapter, self.sites, self.recompute)


def _revived(known, adapter: Adapter, sites: Tuple[Site, ...], recompute: bool) -> State:
    """A state in another process, which knows nothing of the classes of norms yet."""
    pristine.learn(known)
    state = State.__new__(State)
    state.adapter, state.sites, state.recompute, state.known = adapter, sites, recompute, known
    state.why_not, state.travels = None, True
    return state


def state(module: nn.Module) -> State:
    return module.__dict__[STATE]


def sites(module: nn.Module) -> Tuple[Site, ...]:
    """The sites of a patched module, in the order of its adapter's names."""
    return module.__dict__[STATE].sites


def count_unseen(module: nn.Module, reason: str) -> None:
    """Of each norm of a patched module that its class's own code has now called, or not."""
    for s in sites(module):
        s.count(None, reason)


# ---- The report --------------------------------------------------------------------------------------------------


class SiteReport(NamedTuple):
    """One norm: ``calls`` and ``bytes`` that were fused, and ``fallbacks``, {reason: calls}, with their bytes."""

    name: str
    calls: int
    bytes: int
    fallbacks: Dict[str, int]
    fallback_bytes: int


class RunReport:
    """What the patched norms of a model did since they were patched; ``print`` it."""

    def __init__(self, rows: Sequence[SiteReport]) -> None:
        self.sites = list(rows)

    @property
    def fused(self) -> int:
        """Calls of norms that were fused."""
        return sum(row.calls for row in self.sites)

    @property
    def fallbacks(self) -> Dict[str, int]:
        """Calls that were not, by reason."""
        totals: Dict[str, int] = {}
        for row in self.sites:
            for reason, calls in row.fallbacks.items():
                totals[reason] = totals.get(reason, 0) + calls
        return totals

    @property
    def share(self) -> float:
        """Of the bytes that went into the patched norms, those that were fused: 0 to 1; nan before the first call."""
        fused, other = sum(row.bytes for row in self.sites), sum(row.fallback_bytes for row in self.sites)
        return fused / (fused + other) if fused + other else float("nan")

    def __str__(self) -> str:
        if not self.sites:
            return "no norm is patched"
        rows = [("norm", "fused", "MB", "called as it is", "MB", "reason")]
        for row in self.sites:
            reasons = list(row.fallbacks) or [""]
            rows.append((row.name, str(row.calls), f"{row.bytes / 1e6:.1f}", str(sum(row.fallbacks.values())),
                         f"{row.fallback_bytes / 1e6:.1f}", reasons[0]))
            rows += [("", "", "", "", "", reason) for reason in reasons[1:]]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        columns = [[row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:5], widths[1:])), row[5]]
                   for row in rows]
        lines = ["  ".join(column).rstrip() for column in columns]
        share = "not called yet" if self.share != self.share else f"{self.share:.1%} of the norms' bytes fused"
        return "\n".join([*lines, f"{len(self.sites)} norms, {self.fused} fused calls, "
                                  f"{sum(self.fallbacks.values())} not, {share}"])


def report(model: Any) -> RunReport:
    """What the patched norms of ``model``, a module or a pipeline, did in eager mode since they were patched: calls
    fused and fallen back, with the reason, and bytes. Compiled code counts nothing."""
    from .patch import named_modules
    from .swap import is_swapped

    rows: List[SiteReport] = []
    for name, module in named_modules(model):
        for site in sites(module) if is_swapped(module) else ():
            full = ".".join(part for part in (name, site.name) if part)
            fallbacks = {reason: calls for reason, calls in site.calls.items() if reason is not None}
            rows.append(SiteReport(full, site.calls.get(None, 0), site.bytes.get(None, 0), fallbacks,
                                   sum(size for reason, size in site.bytes.items() if reason is not None)))
    return RunReport(rows)
