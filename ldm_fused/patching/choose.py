"""Which module of a model is fused by which adapter."""

from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

from torch import nn
from torch.nn.parameter import is_lazy

from .. import bypass
from . import learn, pair, read_block, source, swap, trial, upsample
from .adapter import STATE, Adapter, imported, registered
from .adapter import norms as registered_norms
from .adapters import edm, known_classes, own
from .adapters.plain import Counted, Norm
from .report import PatchReport

Row = Tuple[str, nn.Module, Adapter]


class Choice:
    """What ``patch`` is to fuse in a list of named modules, chosen in walks over it.

    Attributes:
        fused: ``(qualified name, module, adapter)`` of what is to be fused.
        counted: ``(module, adapter)`` of norms that are not fused, and counted.
        patched_before: modules that are patched already.
        report: says what is skipped.
    """

    def __init__(self, modules: Sequence[Tuple[str, nn.Module]], kinds: Dict[str, bool]) -> None:
        self.kinds = kinds  # "block", "norm" and "upsample": whether they are to be fused
        self.report = PatchReport()
        self.fused: List[Row] = []
        self.counted: List[Tuple[nn.Module, Adapter]] = []
        self.patched_before: List[nn.Module] = []
        self._chosen: List[Row] = []  # rows that are not tried yet
        self._taken: Set[int] = set()  # ids of modules whose adapter is decided
        self._read: Dict[type, List[Any]] = {}  # adapters of each class, by the attributes that decide
        self._unread: Dict[int, str] = {}  # reasons, by ids of norms
        self._tried_norms: Dict[Any, Optional[str]] = {}
        self._classes = {**known_classes(), **registered}
        self._fused_already = imported(own.FUSED_ALREADY)
        for cls, norm in registered_norms.items():
            bypass.know_norm(cls, norm)
        for _, module in modules:
            swap.clean(module)
            if swap.is_swapped(module) and isinstance(module.__dict__[STATE].adapter, Counted):
                swap.swap_back(module)  # it may be known now
            if swap.is_swapped(module):
                self.patched_before.append(module)
                self._taken |= _parts_of(module, module.__dict__[STATE].adapter)
        for walk in (self._learn, self._blocks, self._upsamplings, self._ends, self._norms):
            if walk == self._norms:
                self._try_chosen()  # the norms of what fails are then fused by themselves
            for name, module in modules:
                if not swap.is_swapped(module) and id(module) not in self._taken:
                    walk(name, module)
        self._try_chosen()

    def _learn(self, name: str, module: nn.Module) -> None:
        """Reads what a norm, an activation or a convolution computes."""
        if learn.looks_like_a_norm(module) or type(module) in registered_norms:
            reason = learn.norm(module)
            if reason is None:
                key = type(module), bypass.known_norm(module)
                if key not in self._tried_norms:
                    self._tried_norms[key] = trial.difference(module, Norm())
                reason = self._tried_norms[key]
                if reason is not None:
                    bypass.forget_norm(type(module))
            if reason is not None:
                self._unread[id(module)] = reason
        elif not module._modules and not type(module).__module__.startswith("torch."):
            learn.activation(module)
            learn.convolution(module)

    def _blocks(self, name: str, module: nn.Module) -> None:
        if type(module) is self._fused_already:
            self._taken.update(id(part) for part in module.modules())
            return
        adapter = self._classes.get(type(module)) or edm.adapter_of(module)
        if adapter is not None and adapter.kind == "block":
            if adapter.sites(module) or not adapter.is_container:
                self._choose(name, module, adapter)
            return
        for cls in type(module).__mro__[1:]:
            adapter = self._classes.get(cls)
            if adapter is None or adapter.kind != "block":
                continue
            if getattr(type(module), adapter.method) is getattr(cls, adapter.method):
                if adapter.sites(module):
                    self._choose(name, module, adapter)
                return
            if not adapter.is_container and not read_block.looks_like_a_block(module):
                self._skip(name, module, f"it is a subclass of {cls.__module__}.{cls.__qualname__}, which may compute "
                                         "something else")
                return
        if read_block.looks_like_a_block(module):
            self._read_block(name, module)

    def _read_block(self, name: str, module: nn.Module) -> None:
        reason = self._read_class(name, module, read_block.read)
        if reason is not None and self.kinds["block"]:
            if len([part for part in module.modules() if read_block.is_norm(part)]) == 2:
                self._skip(name, module, f"it is not known to be a ResNet block: {reason}")

    def _read_class(self, name: str, module: nn.Module, read: Callable[[nn.Module], Adapter]) -> Optional[str]:
        """Reads a class once for all instances whose attributes say the same; gives the reason why it cannot."""
        known = self._read.setdefault(type(module), [])
        for adapter in known:
            if adapter.told == tuple(source.told(module, n) for n in adapter.names):
                return self._choose(name, module, adapter)
        try:
            adapter = read(module)
        except source.Unreadable as reason:
            return str(reason)
        known.append(adapter)
        return self._choose(name, module, adapter)

    def _upsamplings(self, name: str, module: nn.Module) -> None:
        if not self.kinds["upsample"]:
            return
        adapter = self._classes.get(type(module))
        if adapter is not None and adapter.kind == "upsample":
            self._choose(name, module, adapter)
        elif upsample.looks_like_an_upsampling(module):
            reason = self._read_class(name, module, upsample.read)
            if reason is not None:
                self._skip(name, module, f"its upsampling is not folded: {reason}")

    def _ends(self, name: str, module: nn.Module) -> None:
        adapter = pair.parent_of(module)
        if adapter is not None:
            self._choose(name, module, adapter)

    def _norms(self, name: str, module: nn.Module) -> None:
        adapter = self._classes.get(type(module))
        if adapter is None and bypass.known_norm(module) is not None:
            adapter = Norm()
        reason = self._unread.get(id(module))
        if reason is None and adapter is not None and adapter.kind == "norm":
            self._choose(name, module, adapter)
        elif isinstance(module, nn.GroupNorm):
            reason = f"it is a subclass of GroupNorm: {reason or 'of unknown parts'}"
            self._skip(name, module, reason)
            if self.kinds["norm"] and "forward" not in vars(module):
                self.counted.append((module, Counted(reason)))

    def _choose(self, name: str, module: nn.Module, adapter: Adapter) -> None:
        if not self.kinds[adapter.kind]:
            if not adapter.is_container:
                self._taken.update(id(part) for part in module.modules())
            return
        reason = "its forward is replaced" if adapter.method in vars(module) else adapter.obstacle(module)
        if reason is not None:
            self._skip(name, module, reason)
        else:
            self._chosen.append((name, module, adapter))
            self._taken |= _parts_of(module, adapter)

    def _skip(self, name: str, module: nn.Module, reason: str) -> None:
        """The norms in it are fused by themselves."""
        self.report.skipped.append((name, type(module), reason))
        self._taken.add(id(module))

    def _try_chosen(self) -> None:
        """Tries the smallest instance of each variant of what is chosen."""
        variants: Dict[Any, List[Row]] = {}
        for row in self._chosen:
            _, module, adapter = row
            key = (type(module), getattr(type(module), adapter.method), adapter, adapter.variant(module))
            variants.setdefault(key, []).append(row)
        order = {id(module): i for i, (_, module, _) in enumerate(self._chosen)}
        self._chosen, good = [], []
        for rows in variants.values():
            smallest = min(rows, key=lambda row: sum(0 if is_lazy(p) else p.numel() for p in row[1].parameters()))
            reason = trial.difference(smallest[1], smallest[2])
            if reason is None:
                good += rows
                continue
            for name, module, adapter in rows:
                self._taken -= _parts_of(module, adapter)
                self._skip(name, module, reason)
        self.fused += sorted(good, key=lambda row: order[id(row[1])])


def _parts_of(module: nn.Module, adapter: Adapter) -> Set[int]:
    """The ids of a module and of the parts that its adapter fuses or swaps, with what holds them."""
    found = {id(module)}
    for name in (*adapter.sites(module), *adapter.parts(module)):
        path = name.split(".")
        found.update(id(module.get_submodule(".".join(path[:i]))) for i in range(1, len(path) + 1))
    return found
