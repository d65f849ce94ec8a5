"""patch and unpatch: walk a model's modules, choose adapters, try them, swap classes, and say what was done."""

from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

from torch import nn
from torch.nn.parameter import is_lazy

from ..modules import StandIn, UnsupportedBlock
from .. import pristine
from . import learn, pair, source, swap, trial
from .adapter import Adapter, registered
from .adapter import norms as registered_norms
from .adapters import edm, formula, known_classes
from .adapters.plain import Left, Norm
from .site import STATE

__all__ = ["PatchReport", "is_patched", "patch", "patched", "unpatch"]


class PatchReport:
    """What :func:`patch` did; ``print`` it.

    Attributes:
        replaced: ``(qualified name, class, names of its norms)`` of what is served.
        skipped: ``(qualified name, class, reason)`` of what looks like a norm or block to serve and is not.
    """

    def __init__(self) -> None:
        self.replaced: List[Tuple[str, type, Tuple[str, ...]]] = []
        self.skipped: List[Tuple[str, type, str]] = []

    def __str__(self) -> str:
        lines = [f"patched {_table(self.replaced, lambda sites: '')}" if self.replaced else "nothing new to patch"]
        if self.skipped:
            lines.append(f"skipped {_table(self.skipped, lambda reason: ': ' + reason)}")
        return "\n".join(lines)

    __repr__ = __str__


def _table(rows, tell) -> str:
    """Rows summed up by class and reason, each with the names that it is about."""
    kinds: Dict[Tuple[str, str], List[str]] = {}
    for name, cls, what in rows:
        kinds.setdefault((f"{cls.__module__}.{cls.__qualname__}", tell(what)), []).append(name or "the model itself")
    lines = [f"{len(rows)} modules"]
    for (cls, told), names in kinds.items():
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"  {len(names):4d} {cls} ({listed}){told}")
    return "\n".join(lines)


def patch(model: Any, *, blocks: bool = True, norms: bool = True, recompute: bool = False,
          strict: bool = False) -> PatchReport:
    """Serves every GroupNorm and activation in ``model`` that is known, in place, and changes nothing else.

    Instances keep their submodules, Parameters, state dict and the name of their class, of which they become instances
    of a subclass. What is looked at in each call is in :mod:`ldm_fused.pristine`: a norm or a convolution that somebody
    hooks, wraps or moves, before or after, is called as it is. Copies and pickles of a patched model are patched.
    To patch again what is patched changes nothing but ``recompute``.

    Args:
        model: a module, or a pipeline: an object whose ``components`` or attributes are modules.
        blocks: ResNet blocks, and norms with an activation behind them.
        norms: GroupNorms outside of blocks.
        recompute: blocks keep no activated tensors for the backward pass, as ``FusedResnetBlock(recompute=True)``.
        strict: raise, and change nothing, if anything is skipped.

    Raises:
        TypeError: if ``model`` is neither a module nor holds one.
        UnsupportedBlock: with ``strict``, with the report as its message.
    """
    found, done = PatchReport(), []
    plan = _Plan(found, {"block": blocks, "norm": norms})
    modules = named_modules(model)
    for name, module in modules:
        swap.clean(module)
        if swap.is_swapped(module) and isinstance(module.__dict__[STATE].adapter, Left):
            swap.swap_back(module)  # it may be known now
        if swap.is_swapped(module):
            done.append(module)
            plan.claim(module, module.__dict__[STATE].adapter)
    for walk in (plan.learn, plan.blocks, plan.ends, plan.norms):
        if walk == plan.norms:
            plan.try_chosen()  # the norms of what fails are then served by themselves
        for name, module in modules:
            if not swap.is_swapped(module) and id(module) not in plan.seen:
                walk(name, module)
    plan.try_chosen()
    if strict and found.skipped:
        raise UnsupportedBlock(str(found))
    for name, module, adapter in plan.good:
        found.replaced.append((name, type(module), tuple(adapter.sites(module))))
        swap.swap(module, adapter, recompute)
    for module, adapter in plan.left:
        swap.swap(module, adapter, recompute)
    for module in done:
        module.__dict__[STATE].recompute = recompute
    return found


def unpatch(model: Any) -> None:
    """Gives every instance the class back that it had; results are those of before, to the bit.

    Raises:
        RuntimeError: for a module whose class something else has changed since (``fully_shard``).
    """
    for _, module in named_modules(model):
        if swap.is_swapped(module):
            swap.swap_back(module)


def is_patched(model: Any) -> bool:
    """Whether anything in ``model`` is patched."""
    return any(swap.is_swapped(module) for _, module in named_modules(model))


@contextmanager
def patched(model: Any, **options: bool) -> Iterator[PatchReport]:
    """Patched within the ``with``, by :func:`patch` with the ``options``, and unpatched behind it."""
    found = patch(model, **options)
    try:
        yield found
    finally:
        unpatch(model)


def named_modules(model: Any) -> List[Tuple[str, nn.Module]]:
    """All modules of a module or a pipeline, each once, by qualified name."""
    if isinstance(model, nn.Module):
        roots = {"": model}
    else:
        parts = getattr(model, "components", None)
        parts = parts if isinstance(parts, dict) else getattr(model, "__dict__", {})
        roots = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
        if not roots:
            raise TypeError(f"model must be a module or a pipeline that holds modules, got {type(model).__name__}")
    memo: Set[nn.Module] = set()
    return [found for name, root in roots.items() for found in root.named_modules(memo, prefix=name)]


class _Plan:
    """What is to be swapped, chosen in walks: known classes, blocks that are read, norms with the activation behind
    them, single norms."""

    def __init__(self, found: PatchReport, kinds: Dict[str, bool]) -> None:
        self.found, self.kinds = found, kinds
        self.classes = {**known_classes(), **registered}
        for cls, norm in registered_norms.items():
            pristine.know_norm(cls, norm)
        self.chosen: List[Tuple[str, nn.Module, Adapter]] = []
        self.good: List[Tuple[str, nn.Module, Adapter]] = []  # of those that were tried
        self.seen: Set[int] = set()  # ids of modules that are spoken for, served or left alone
        self.read_before: Dict[Any, Any] = {}  # adapters and reasons
        self.unread: Dict[int, str] = {}  # norms by their ids, and why
        self.tried_norms: Dict[Any, Optional[str]] = {}
        self.left: List[Tuple[nn.Module, Adapter]] = []  # norms that are called as they are, and counted

    def claim(self, module: nn.Module, adapter: Adapter) -> None:
        self.seen.update(self.claims(module, adapter))

    def claims(self, module: nn.Module, adapter: Adapter) -> Set[int]:
        claimed = {id(module)}
        for name in (*adapter.sites(module), *adapter.parts(module)):
            path = name.split(".")
            claimed.update(id(module.get_submodule(".".join(path[:i]))) for i in range(1, len(path) + 1))
        return claimed

    def leave(self, name: str, module: nn.Module, adapter: Optional[Adapter], reason: str) -> None:
        """Skipped. The norms in it are served by themselves."""
        self.found.skipped.append((name, type(module), reason))
        self.seen.add(id(module))

    def choose(self, name: str, module: nn.Module, adapter: Adapter) -> None:
        if not self.kinds[adapter.kind]:
            if not adapter.is_container:
                self.seen.update(id(part) for part in module.modules())
            return
        reason = "its forward is replaced" if adapter.method in vars(module) else adapter.why_not(module)
        if reason is not None:
            self.leave(name, module, adapter, reason)
        else:
            self.chosen.append((name, module, adapter))
            self.claim(module, adapter)

    def blocks(self, name: str, module: nn.Module) -> None:
        adapter = self.classes.get(type(module)) or edm.adapter_of(module)
        if type(module) is StandIn:  # it is fused as it is
            self.seen.update(id(part) for part in module.modules())
            return
        if adapter is not None and adapter.kind == "block":
            if adapter.sites(module) or not adapter.is_container:
                self.choose(name, module, adapter)
            return
        for cls in type(module).__mro__[1:]:
            adapter = self.classes.get(cls)
            if adapter is None or adapter.kind != "block":
                continue
            if getattr(type(module), adapter.method) is getattr(cls, adapter.method):
                if adapter.sites(module):
                    self.choose(name, module, adapter)
                return
            if not adapter.is_container and not formula.looks_like_a_block(module):
                self.leave(name, module, None, f"it is a subclass of {cls.__module__}.{cls.__qualname__}, which may "
                                               "compute something else")
                return
        self.read(name, module)

    def learn(self, name: str, module: nn.Module) -> None:
        if learn.looks_like_a_norm(module) or type(module) in registered_norms:
            reason = learn.norm(module)
            if reason is None:
                key = type(module), pristine.known_norm(module)
                if key not in self.tried_norms:
                    self.tried_norms[key] = trial.why_not(module, Norm())
                reason = self.tried_norms[key]
                if reason is not None:
                    pristine.forget_norm(type(module))
            if reason is not None:
                self.unread[id(module)] = reason
        elif not module._modules and not type(module).__module__.startswith("torch."):
            learn.activation(module)
            learn.convolution(module)

    def read(self, name: str, module: nn.Module) -> None:
        """A block whose class is not known, by its formula; each class and what its branches read once."""
        if not formula.looks_like_a_block(module):
            return
        for key, adapter in self.read_before.get(type(module), ()):
            if key == tuple(source.told(module, n) for n in adapter.names):
                return self.choose(name, module, adapter)
        try:
            adapter = formula.read(module)
        except source.Unreadable as reason:
            if sum(isinstance(part, nn.GroupNorm) or pristine.known_norm(part) is not None
                   for part in module.modules()) == 2 and self.kinds["block"]:
                self.leave(name, module, None, f"it is not known to be a ResNet block: {reason}")
            return
        self.read_before.setdefault(type(module), []).append((adapter.told, adapter))
        self.choose(name, module, adapter)

    def ends(self, name: str, module: nn.Module) -> None:
        adapter = pair.parent_of(module)
        if adapter is not None:
            self.choose(name, module, adapter)

    def norms(self, name: str, module: nn.Module) -> None:
        adapter = self.classes.get(type(module))
        if adapter is None and pristine.known_norm(module) is not None:
            adapter = Norm()
        reason = self.unread.get(id(module))
        if reason is not None or adapter is None or adapter.kind != "norm":
            if isinstance(module, nn.GroupNorm):
                reason = f"it is a subclass of GroupNorm: {reason or 'of unknown parts'}"
                self.leave(name, module, None, reason)
                if self.kinds["norm"] and "forward" not in vars(module):
                    self.left.append((module, Left(reason)))
        else:
            self.choose(name, module, adapter)

    def try_chosen(self) -> None:
        """Does what is chosen do what its adapter does? Of each variant the smallest instance is tried."""
        variants: Dict[Any, List[Tuple[str, nn.Module, Adapter]]] = {}
        for row in self.chosen:
            _, module, adapter = row
            key = (type(module), getattr(type(module), adapter.method), adapter, adapter.variant(module))
            variants.setdefault(key, []).append(row)
        good = []
        self.chosen, chosen = [], self.chosen
        for rows in variants.values():
            smallest = min(rows, key=lambda row: sum(0 if is_lazy(p) else p.numel() for p in row[1].parameters()))
            reason = trial.why_not(smallest[1], smallest[2])
            for name, module, adapter in rows:
                if reason is None:
                    good.append((name, module, adapter))
                else:
                    self.seen -= self.claims(module, adapter)
                    self.leave(name, module, adapter, reason)
        order = {id(module): i for i, (_, module, _) in enumerate(chosen)}
        self.good += sorted(good, key=lambda row: order[id(row[1])])
