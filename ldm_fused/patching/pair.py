"""A norm and an activation that a module's forward calls one after the other.

That forward is neither copied nor changed. While it runs, its norm computes the activation too, and the activation
passes that very tensor on. Each of them, called alone or from elsewhere, computes what it always did, to the bit.
"""

import ast
import functools
import inspect
import textwrap
import threading
from types import FunctionType
from typing import Any, Callable, Optional, Sequence

import torch
from torch import Tensor, nn

from .. import bypass
from ..decisions import decided
from . import swap
from .adapter import STATE, Adapter, sites
from .norm import call_obstacle, group_norm


class _Frame:
    """A parent's forward that is running."""

    def __init__(self, norm: nn.Module, act: Optional[nn.Module], count: Callable, passes_on: bool,
                 obstacle: Optional[str]) -> None:
        self.norm, self.act, self.count = norm, act, count
        self.passes_on = passes_on  # whether the activation passes on what the norm has activated
        self.called = False  # whether the norm was
        self.obstacle = obstacle  # the reason why the two are not fused
        self.pending: Optional[Tensor] = None  # what the norm has activated and the activation has not seen


class _Here(threading.local):
    def __init__(self) -> None:  # runs in each thread: a compiled forward's guards read the attribute first
        self.frame: Optional[_Frame] = None  # the innermost one in this thread


_here = _Here()


class Norm(Adapter):
    def sites(self, norm: nn.GroupNorm) -> Sequence[str]:
        return ()  # counted by its parent

    def forward(self, norm: nn.GroupNorm, input: Tensor) -> Tensor:
        frame = _here.frame
        if frame is None or frame.norm is not norm:
            return swap.as_before(norm, input)
        frame.called = True
        reason = decided(_pair_obstacle, norm, frame, input)
        frame.count(input, reason)
        if reason is not None:
            return swap.as_before(norm, input)
        y = group_norm(norm, swap.original(type(norm)), input, "silu" if frame.passes_on else None)
        frame.pending = y if frame.passes_on else None
        return y


def _pair_obstacle(norm: nn.Module, frame: _Frame, x: Tensor) -> Optional[str]:
    """The reason why the norm and the activation are called, or None where the two are fused."""
    cls = swap.original(type(norm))
    reason = frame.obstacle or bypass.hooks_obstacle(norm) or call_obstacle(norm, cls, x)
    if reason is None and frame.act is not None:
        reason = bypass.class_obstacle(swap.original(type(frame.act))) or bypass.hooks_obstacle(frame.act)
        reason = reason and f"its activation: {reason}"
    return reason


class Act(Adapter):
    def sites(self, act: nn.SiLU) -> Sequence[str]:
        return ()

    def forward(self, act: nn.SiLU, input: Tensor) -> Tensor:
        return input if _seen(input) else swap.as_before(act, input)


def _seen(x: Tensor) -> bool:
    """Whether x is what this thread's norm has just activated."""
    frame = _here.frame
    if frame is None or frame.pending is None or frame.pending is not x:
        return False
    frame.pending = None
    return True


class Parent(Adapter):
    """A module whose forward calls its ``norm``, and on the result at once its ``act``; both are names."""

    is_container = True

    def __init__(self, norm: str, act: str) -> None:
        self.norm, self.act = norm, act

    def obstacle(self, parent: nn.Module) -> Optional[str]:
        norm = getattr(parent, self.norm)
        known = bypass.known_norm(norm)
        if known is None or known.activated:
            return f"{self.norm} is a {type(norm).__name__}, no norm that is known"
        return self.activation_obstacle(parent)

    def activation_obstacle(self, parent: nn.Module) -> Optional[str]:
        act = getattr(parent, self.act, None)
        known = isinstance(act, nn.Module) and bypass.is_activation(act)
        return None if known else f"{self.act} is a {type(act).__name__}, not SiLU"

    def sites(self, parent: nn.Module) -> Sequence[str]:
        return (self.norm,) if getattr(parent, self.norm, None) is not None else ()

    def parts(self, parent: nn.Module):
        return {self.norm: Norm(), self.act: Act()}

    def example(self, parent: nn.Module):
        return None  # it may be a whole model; each call checks that the activation was called

    def variant(self, parent: nn.Module):
        return None

    def forward(self, parent: nn.Module, *args, **kwargs):
        state, before = parent.__dict__[STATE], _here.frame
        _here.frame = frame = _Frame(getattr(parent, self.norm), self.activation(parent), sites(parent)[0].count,
                                     self.passes_on(), state.obstacle)
        try:
            result = self.body(parent, frame, *args, **kwargs)
            if frame.pending is not None:  # the forward does something else, and this result is wrong
                frame.obstacle = state.obstacle = f"{self.act} was not called on what {self.norm} gave"
                frame.pending = None
                result = self.body(parent, frame, *args, **kwargs)
            if not frame.called and "forward" in vars(frame.norm):
                frame.count(None, "its forward is replaced")  # in the instance, so the class's is not called
            return result
        finally:
            _here.frame = before

    def passes_on(self) -> bool:
        return True

    def activation(self, parent: nn.Module) -> Optional[nn.Module]:
        return getattr(parent, self.act)

    def body(self, parent: nn.Module, frame: _Frame, *args, **kwargs):
        return swap.as_before(parent, *args, **kwargs)


class ParentOfFunction(Parent):
    """The same where the activation is a global function, such as ``nonlinearity`` or ``F.silu``.

    The class's forward runs with that one name bound to a function that passes on what is activated already. A compiler
    reads the forward's file, so while compiling it runs unchanged, and the norm alone is fused.
    """

    def activation_obstacle(self, parent: nn.Module) -> Optional[str]:
        act = _global(swap.original(type(parent)).forward, self.act)
        return None if isinstance(act, FunctionType) and bypass.is_swish(act) else f"{self.act} is not swish"

    def parts(self, parent: nn.Module):
        return {self.norm: Norm()}

    def passes_on(self) -> bool:
        return not torch.compiler.is_compiling()

    def activation(self, parent: nn.Module) -> Optional[nn.Module]:
        return None

    def body(self, parent: nn.Module, frame: _Frame, *args, **kwargs):
        if not frame.passes_on:
            return swap.as_before(parent, *args, **kwargs)
        return _renamed(swap.original(type(parent)).forward, self.act)(parent, *args, **kwargs)


def _global(forward: FunctionType, path: str) -> Any:
    """What the dotted name ``path`` means in ``forward``, as long as it is global; or None."""
    first, *others = path.split(".")
    found = getattr(forward, "__globals__", {}).get(first)
    for name in others:
        found = getattr(found, name, None)
    return found


def _renamed(forward: FunctionType, path: str) -> FunctionType:
    """``forward`` with the global ``path`` meaning a function that passes on what is activated already."""
    act = _global(forward, path)
    name, _, others = path.partition(".")
    passing = _Beside(forward.__globals__[name], others, lambda x: x if _seen(x) else act(x)).meaning()
    renamed = FunctionType(forward.__code__, {**forward.__globals__, name: passing}, forward.__name__,
                           forward.__defaults__, forward.__closure__)
    renamed.__kwdefaults__ = forward.__kwdefaults__
    return renamed


class _Beside:
    """A module of functions in which one dotted name means another function."""

    def __init__(self, module: Any, path: str, function: Callable) -> None:
        self._module, self._path, self._function = module, path, function

    def meaning(self) -> Any:
        return self if self._path else self._function

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        first, _, others = self._path.partition(".")
        return _Beside(found, others, self._function).meaning() if name == first else found


def parent_of(module: nn.Module) -> Optional[Parent]:
    """The adapter for a module whose forward calls swish on what one of its norms gives, and nothing else on that, as
    its source tells; or None."""
    found = []
    for norm, part in module._modules.items():
        known = None if part is None else bypass.known_norm(part)
        if known is None or known.activated:
            continue
        act = activation_behind(type(module).forward, norm)
        if act is not None:
            own, _, name = act.partition(".")
            found.append(Parent(norm, name) if own == "self" else ParentOfFunction(norm, act))
    return found[0] if len(found) == 1 and found[0].obstacle(module) is None else None


@functools.lru_cache(maxsize=1024)
def activation_behind(forward: Callable, norm: str) -> Optional[str]:
    """The dotted name, such as "nonlinearity", "F.silu" or "self.act", of what ``forward`` calls on what
    ``self.norm(...)`` gives; or None.

    Its source must say ``act(self.norm(...))``, or ``h = self.norm(...)`` and ``h = act(h)`` (or ``h = [act(h)]``) in
    one statement behind the other. It may name that norm elsewhere only to ask whether it is there.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    nodes = list(ast.walk(tree))
    asked = {id(_asked(node.test)) for node in nodes if isinstance(node, (ast.If, ast.IfExp))}
    if sum(isinstance(node, ast.Attribute) and node.attr == norm and id(node) not in asked for node in nodes) != 1:
        return None
    if any(isinstance(node, ast.Global) for node in nodes):  # run with changed names, it would write to those
        return None
    for node in nodes:
        match node:
            case ast.Call(act, [ast.Call(ast.Attribute(ast.Name("self"), name), [_], [])], []) if name == norm:
                return _dotted(act)
        for block in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
            for first, second in zip(block, block[1:]) if isinstance(block, list) else ():
                match first, second:
                    case (ast.Assign([ast.Name(h)], ast.Call(ast.Attribute(ast.Name("self"), name), [_], [])),
                          ast.Assign([ast.Name(g)], ast.Call(act, [ast.Name(argument)], [])
                                     | ast.List([ast.Call(act, [ast.Name(argument)], [])]))
                          ) if name == norm and h == g == argument:
                        return _dotted(act)
    return None


def _asked(test: ast.AST) -> ast.AST:
    """What a test asks about: whether it is there, or is None."""
    match test:
        case ast.Compare(left, [ast.Is() | ast.IsNot()], [ast.Constant(None)]):
            return left
    return test


def _dotted(node: ast.AST) -> Optional[str]:
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(names)]) if isinstance(node, ast.Name) else None
