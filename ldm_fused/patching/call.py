"""How a patched class is called: by its own signature, whatever its adapter."""

import inspect
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

_MISSING = inspect.Parameter.empty


class Call:
    """Which arguments of a class's method an adapter's forward takes: the first ones, by the class's names.

    An argument behind those is ignored where it is its default; otherwise the class's own method must run.
    """

    def __init__(self, own: Callable, fused: Callable) -> None:
        """``own`` is the class's function, which takes self; ``fused`` the adapter's method, which takes the module."""
        theirs = list(inspect.signature(own).parameters.values())[1:]
        ours = list(inspect.signature(fused).parameters.values())[1:]
        if theirs and theirs[0].kind is inspect.Parameter.VAR_POSITIONAL:  # it hands them on: our names count
            theirs = ours
        positional = [p for p in theirs if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self.takes_all = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in ours)
        self.count = min(len(ours), len(positional))
        self.places = {p.name: i for i, p in enumerate(positional) if p.kind is p.POSITIONAL_OR_KEYWORD}
        self.defaults = tuple(p.default for p in positional)
        self.keywords: Dict[str, Any] = {p.name: p.default for p in theirs if p.kind is p.KEYWORD_ONLY}
        self.required = any(default is _MISSING for default in self.keywords.values())

    def bind(self, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Optional[Sequence[Any]]:
        """The arguments for the adapter, or None where the class's own method must have them as they are."""
        given = len(args)
        if given > len(self.defaults) or self.required:
            return None
        values = [*args, *self.defaults[given:]]
        for name, value in kwargs.items():
            place = self.places.get(name, -1)
            if place >= given:
                values[place] = value
            elif place >= 0 or not _same(value, self.keywords.get(name, _MISSING)):
                return None  # it is given twice, or the class has no such name
        for value in values[:self.count]:
            if value is _MISSING:
                return None  # the class raises
        for value, default in zip(values[self.count:], self.defaults[self.count:]):
            if not _same(value, default):
                return None
        return values[:self.count]


def _same(value: Any, default: Any) -> bool:
    if value is default:
        return value is not _MISSING
    return isinstance(value, (bool, int, float, str)) and type(value) is type(default) and value == default
