"""What ``patch`` did to a model, and what the model's patched norms did since."""

from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

from .adapter import STATE, sites
from .swap import is_swapped, named_modules

__all__ = ["PatchReport", "RunReport", "UnsupportedBlock", "report"]


class UnsupportedBlock(ValueError):
    """Raised for a block that cannot be fused; says why."""


class PatchReport:
    """What :func:`patch` did; ``print`` it.

    Attributes:
        replaced: ``(qualified name, class, names of its norms)`` of what is fused.
        laid_out: ``(qualified name, class)`` of modules with weights that are laid out in another memory format.
        skipped: ``(qualified name, class, reason)`` of what looks like a norm or a block and is not fused, and with the
            switches for them of upsamplings that are not folded, and of convolutions that are not laid out.
    """

    def __init__(self) -> None:
        self.replaced: List[Tuple[str, type, Tuple[str, ...]]] = []
        self.laid_out: List[Tuple[str, type]] = []
        self.skipped: List[Tuple[str, type, str]] = []

    def __str__(self) -> str:
        lines = [f"patched {_table(self.replaced, lambda names: '')}" if self.replaced else "nothing new to patch"]
        if self.laid_out:
            lines.append(f"laid out {_table([(*row, '') for row in self.laid_out], str)}")
        if self.skipped:
            lines.append(f"skipped {_table(self.skipped, lambda reason: ': ' + reason)}")
        return "\n".join(lines)

    __repr__ = __str__


def _table(rows: Sequence[Tuple[str, type, Any]], tell: Callable[[Any], str]) -> str:
    """Rows grouped by class and reason, each group with some of its names."""
    kinds: Dict[Tuple[str, str], List[str]] = {}
    for name, cls, what in rows:
        kinds.setdefault((f"{cls.__module__}.{cls.__qualname__}", tell(what)), []).append(name or "the model itself")
    lines = [f"{len(rows)} modules"]
    for (cls, told), names in kinds.items():
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"  {len(names):4d} {cls} ({listed}){told}")
    return "\n".join(lines)


class SiteReport(NamedTuple):
    """One norm, or one convolution behind an upsampling: ``calls`` and ``bytes`` that were fused, and ``fallbacks``,
    {reason: calls}, with their bytes."""

    name: str
    calls: int
    bytes: int
    fallbacks: Dict[str, int]
    fallback_bytes: int


class RunReport:
    """What the patched norms of a model did since they were patched; ``print`` it.

    Attributes:
        sites: a row a norm.
        upsamplings: a row a convolution with an upsampling before it; bytes are those of what is upsampled.
    """

    def __init__(self, rows: Sequence[SiteReport], upsamplings: Sequence[SiteReport] = ()) -> None:
        self.sites, self.upsamplings = list(rows), list(upsamplings)

    @property
    def fused(self) -> int:
        """Calls of norms that were fused."""
        return sum(row.calls for row in self.sites)

    @property
    def fallbacks(self) -> Dict[str, int]:
        """Calls that were not fused, by reason."""
        totals: Dict[str, int] = {}
        for row in self.sites:
            for reason, calls in row.fallbacks.items():
                totals[reason] = totals.get(reason, 0) + calls
        return totals

    @property
    def share(self) -> float:
        """The part of the norms' input bytes that was fused, 0 to 1; nan before the first call."""
        fused, other = sum(row.bytes for row in self.sites), sum(row.fallback_bytes for row in self.sites)
        return fused / (fused + other) if fused + other else float("nan")

    def __str__(self) -> str:
        tables = []
        if self.sites:
            share = "not called yet" if self.share != self.share else f"{self.share:.1%} of the norms' bytes fused"
            tables += [*_sites_table("norm", self.sites), f"{len(self.sites)} norms, {self.fused} fused calls, "
                                                          f"{sum(self.fallbacks.values())} not, {share}"]
        if self.upsamplings:
            tables += _sites_table("upsampling", self.upsamplings)
        return "\n".join(tables or ["no norm is patched"])


def _sites_table(what: str, sites: Sequence[SiteReport]) -> List[str]:
    rows = [(what, "fused", "MB", "not fused", "MB", "reason")]
    for row in sites:
        reasons = list(row.fallbacks) or [""]
        rows.append((row.name, str(row.calls), f"{row.bytes / 1e6:.1f}", str(sum(row.fallbacks.values())),
                     f"{row.fallback_bytes / 1e6:.1f}", reasons[0]))
        rows += [("", "", "", "", "", reason) for reason in reasons[1:]]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    columns = [[row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:5], widths[1:])), row[5]]
               for row in rows]
    return ["  ".join(column).rstrip() for column in columns]


def report(model: Any) -> RunReport:
    """What the patched norms of ``model``, a module or a pipeline, did in eager mode since they were patched: calls
    that were fused and calls that were not, with reasons and bytes. Compiled code counts nothing."""
    rows: Dict[bool, List[SiteReport]] = {False: [], True: []}  # whether they are upsamplings
    for name, module in named_modules(model):
        for site in sites(module) if is_swapped(module) else ():
            full = ".".join(part for part in (name, site.name) if part)
            fallbacks = {reason: calls for reason, calls in site.calls.items() if reason is not None}
            is_upsampling = module.__dict__[STATE].adapter.kind == "upsample"
            rows[is_upsampling].append(SiteReport(full, site.calls.get(None, 0), site.bytes.get(None, 0), fallbacks,
                                   sum(size for reason, size in site.bytes.items() if reason is not None)))
    return RunReport(rows[False], rows[True])
