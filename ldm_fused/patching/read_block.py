"""Blocks that no file of adapters names: any class whose forward is the formula of a ResNet block."""

import functools
import inspect
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import bypass, reference
from ..decisions import decided
from . import formula, source, swap
from .adapter import Block, channels, sites
from .source import Unreadable
from .trace import trace

Case = Tuple[bool, bool]  # in training, where that decides; whether the second argument is a tensor


class ReadBlock(Block):
    """The formulas read from a class, for instances whose deciding attributes have the same values.

    ``told`` are the values of the attributes ``names``, which decide what the class computes. ``takes`` is how many of
    its arguments are read, 1 or 2, and ``default`` is that of the second.
    """

    def __init__(self, method: str, names: Tuple[str, ...], told: Tuple[Any, ...], has_modes: bool, takes: int,
                 default: Any, formulas: Dict[Case, formula.Block]) -> None:
        self.method, self.names, self.told, self.has_modes = method, names, told, has_modes
        self.takes, self.default, self.formulas = takes, default, formulas
        self.numpys = {name for name, value in zip(names, told) if source.is_numpys(value)}
        self.containers = {known: _containers(known) for known in formulas.values()}

    def sites(self, block: nn.Module) -> Sequence[str]:
        known = next(iter(self.formulas.values()))
        return known.norm1, known.norm2

    def variant(self, block: nn.Module):
        return tuple((name, type(part), type(getattr(part, "weight", None))) for name, part in block.named_modules())

    def examples(self, block: nn.Module) -> List[Tuple[Any, ...]]:
        found = []
        for given in sorted({given for _, given in self.formulas}):
            known = next(f for case, f in self.formulas.items() if case[1] == given)
            x = torch.randn(2, channels(_part(block, known.norm1)), *(6, 4, 4)[:known.rank - 2], dtype=torch.float64)
            emb = self.default
            if given:
                parts = [_part(block, path) for path in known.embedding if path is not None]
                features = next(p.in_features for part in parts for p in part.modules() if hasattr(p, "in_features"))
                emb = torch.randn(2, features, dtype=torch.float64)
            found.append((x, emb)[:self.takes])
        return found

    def forward(self, block: nn.Module, x: Tensor, emb: Any = None) -> Tensor:
        given = isinstance(emb, Tensor)
        known = self.formulas.get((block.training if self.has_modes else False, given))
        reason = decided(self.call_obstacle, block, known, x, emb)
        if reason is not None:
            for site in sites(block):
                site.count(x, reason)
            return swap.as_before(block, *(x, emb)[:self.takes])
        modulate = None
        if given:
            for path in known.embedding:
                emb = reference.swish(emb) if path is None else _part(block, path)(emb)
            if known.modulation is not None:
                modulate, emb = dict(zip(known.modulation, emb.chunk(2, dim=1))), None
        else:
            emb = None
        dropout = known.dropout
        if isinstance(dropout, str):
            dropout = _part(block, dropout)
        elif dropout is not None:
            dropout = functools.partial(F.dropout, p=dropout)
        if known.contiguous:
            x = x.contiguous()
        parts = {name: _part(block, getattr(known, name)) for name in (
            "norm1", "act1", "conv1", "norm2", "act2", "conv2", "shortcut", "resample", "resample_x")}
        return self.resnet(block, x, **parts, dropout=dropout, temb=emb, cast_temb=known.cast, modulate2=modulate,
                           scale=known.factor)

    def call_obstacle(self, block: nn.Module, known: Optional[formula.Block], x: Tensor, emb: Any) -> Optional[str]:
        """The reason why the class's own method must run, or None."""
        if known is None or not isinstance(emb, Tensor) and emb is not self.default and emb != self.default:
            return "its second argument is another than was read"
        for name, value in zip(self.names, self.told):
            if name in self.numpys and torch.compiler.is_compiling():
                continue
            now = source.told(block, name)
            if now is not value and now != value:
                return f"its {name} has changed since it was read"
        if x.dim() != known.rank or isinstance(emb, Tensor) and emb.dim() != 2:
            return "its arguments have other dimensions than were read"
        for path, layers in self.containers[known].items():
            container = _part(block, path)
            reason = bypass.module_obstacle(container, nn.Sequential)
            if reason is None and not container._modules.keys() <= layers:
                reason = f"it has {len(container)} layers"
            if reason is not None:
                return f"its {path}: {reason}"
        return None


def _part(block: nn.Module, path: Optional[str]) -> Optional[nn.Module]:
    if path is None:
        return None
    for name in path.split("."):
        block = block._modules[name]
    return block


def _containers(known: formula.Block) -> Dict[str, Set[str]]:
    """The names of the layers that have a role, by the paths of the Sequentials that hold them."""
    found: Dict[str, Set[str]] = {}
    for role in (*known, *(known.embedding or ())):
        path, _, name = role.rpartition(".") if isinstance(role, str) else ("", "", "")
        while path:
            found.setdefault(path, set()).add(name)
            path, _, name = path.rpartition(".")
    return found


def looks_like_a_block(module: nn.Module) -> bool:
    """Whether it is worth reading: it has two norms, and some other parts, its Sequentials' layers among them."""
    if type(module).__module__.startswith("torch.") or len(module._modules) > 16:
        return False
    parts: List[nn.Module] = []
    for part in module._modules.values():
        parts += part._modules.values() if type(part) is nn.Sequential else [part]
    return sum(part is not None and is_norm(part) for part in parts) == 2 and len(parts) >= 4


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.GroupNorm) or bypass.known_norm(module) is not None


def read(module: nn.Module) -> ReadBlock:
    """The adapter of a block, read from its class's forward, or from the ``_forward`` that this calls.

    Raises:
        Unreadable: says what does not belong to the formula.
    """
    try:
        return _read(module, "forward")
    except Unreadable as reason:
        if not hasattr(type(module), "_forward"):
            raise
        try:
            return _read(module, "_forward")
        except Unreadable as inner:
            raise Unreadable(f"{inner}; {reason}") from None


def _read(module: nn.Module, method: str) -> ReadBlock:
    function = inspect.unwrap(getattr(type(module), method))
    if not inspect.isfunction(function):
        raise Unreadable(f"its {method} is no function of Python")
    positional = [p for p in inspect.signature(function).parameters.values()
                  if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][1:]
    if not positional:
        raise Unreadable(f"its {method} takes no argument")
    takes = min(2, len(positional))
    default = positional[1].default if takes == 2 and positional[1].default is not inspect.Parameter.empty else None
    if any(is_lazy(p) for p in module.parameters()):
        raise Unreadable("it has parameters without a shape yet")
    rank = max([p.dim() for p in module.parameters()] + [3])
    formulas: Dict[Case, formula.Block] = {}
    names, reasons, has_modes = set(), [], False
    before = module.training
    try:
        for given in (False, True)[:takes]:
            ranks = {0: rank, 1: 2} if given else {0: rank}
            for training in (False, True):
                module.training = training
                try:
                    traced = trace(module, method, ranks)
                    found = formula.block(traced, module)
                    if given and found.embedding is None:
                        raise Unreadable("its second argument is not used")
                except Unreadable as reason:
                    reasons.append(str(reason))
                    break
                formulas[training, given] = found
                names.update(traced.names)
                has_modes = has_modes or traced.has_modes
                if not traced.has_modes:
                    break
    finally:
        module.training = before
    if not formulas:
        raise Unreadable(reasons[-1] if takes == 2 and len(reasons) == 2 and "None" in reasons[0] else reasons[0])
    if len({(f.norm1, f.norm2) for f in formulas.values()}) > 1:
        raise Unreadable("its norms have other roles in training")
    ordered = tuple(sorted(names))
    return ReadBlock(method, ordered, tuple(source.told(module, name) for name in ordered), has_modes, takes, default,
                     formulas)
