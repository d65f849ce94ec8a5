"""The graph of a method, traced by ``torch.fx`` with submodules as leaves."""

import gc
import inspect
import operator
import sys
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import fx, nn

from . import source
from .source import Unreadable


class Traced(NamedTuple):
    graph: fx.Graph
    inputs: Tuple[fx.Node, ...]
    names: Tuple[str, ...]  # of the attributes that decide
    has_modes: bool  # whether ``training`` does
    channels: Tuple[int, ...]  # numbers of channels that the first input is asked to have


def trace(module: nn.Module, method: str, ranks: Dict[int, int]) -> Traced:
    """Traces ``module``'s method. ``ranks`` gives the number of dimensions of each argument that is a tensor, by its
    place; the first argument is at 0. The other arguments have their default, or None.

    Raises:
        Unreadable: where a trace does not say what the method computes.
    """
    cls = type(module)
    function = inspect.unwrap(getattr(cls, method))
    if not inspect.isfunction(function):
        raise Unreadable(f"its {method} is no function of Python")
    sources = [source.read(function.__code__, cls)]  # before it is run
    tracer = _Tracer(method, _arguments(function, ranks))
    followed = {function.__code__}
    called: List[Any] = []

    def profile(frame, event, arg):
        # A call from elsewhere, such as a handler of warnings, is no part of the forward.
        if event == "call" and frame.f_code not in followed and not _is_trusted(frame) and (
                frame.f_back.f_code in followed or _file(frame.f_back).startswith(_CALLERS)):
            followed.add(frame.f_code)
            called.append(frame.f_code)

    before, collects = sys.getprofile(), gc.isenabled()
    gc.disable()  # the end of a generator that is collected would count as a call, too
    sys.setprofile(profile)
    try:
        graph = tracer.trace(module)
    except Exception as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Unreadable(f"its {method} cannot be traced: {told}") from None
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()
    sources += [source.read(code, cls) for code in called]
    has_modes = any("training" in s.read or "training" in s.tested for s in sources)
    return Traced(graph, tuple(tracer.inputs), source.deciding(module, sources), has_modes, tuple(tracer.channels))


_TRUSTED = {"torch", "numpy", "einops", *sys.stdlib_module_names}
_CALLERS = ("torch.nn.", "torch.fx._symbolic_trace", "torch.utils.", "ldm_fused.patching.trace", "functools",
            "contextlib")  # a forward may hand them a function that they call


def _file(frame) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _is_trusted(frame) -> bool:
    return _file(frame).split(".")[0] in _TRUSTED or _file(frame).startswith(("ldm_fused.patching", "namedtuple_"))


def _arguments(function, ranks: Dict[int, int]) -> List[Tuple[str, Optional[int], Any]]:
    """(name, rank of a tensor or None, value) of each argument with self left out."""
    arguments = []
    positional = [p for p in inspect.signature(function).parameters.values()
                  if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][1:]
    for i, p in enumerate(positional):
        value = None if p.default is p.empty else p.default
        arguments.append((p.name, ranks.get(i), value))
    if len(positional) <= max(ranks):
        raise Unreadable("it takes fewer arguments")
    return arguments


class _Tracer(fx.Tracer):
    def __init__(self, method: str, arguments) -> None:
        super().__init__()
        self.traced_func_name, self.arguments = method, arguments
        self.inputs: List[fx.Node] = []
        self.channels: List[int] = []

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        values = [self.root]
        for name, rank, value in self.arguments:
            if rank is not None:
                value = self.create_proxy("placeholder", name, (), {})
                value.node.meta["rank"] = rank
                self.inputs.append(value.node)
            values.append(value)
        return inspect.unwrap(root_fn), values

    def is_leaf_module(self, m, module_qualified_name):
        return True

    def call_module(self, m, forward, args, kwargs):
        if not any(isinstance(a, fx.Proxy) for a in (*args, *kwargs.values())):
            return forward(*args, **kwargs)  # another thread called it
        if type(m) is nn.Sequential:  # or a slice of one; each call checks its hooks
            return nn.Sequential.forward(m, *args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def proxy(self, node):
        return _Proxy(node, self)

    def to_bool(self, obj):
        node = obj.node
        if node.target not in (operator.eq, operator.ne) or not self.is_channels(node.args[0]):
            return super().to_bool(obj)
        self.channels.append(node.args[1])
        return node.target is operator.eq

    def is_channels(self, node):
        """Whether a node is ``x.shape[1]`` of the first input."""
        if not isinstance(node, fx.Node) or node.target is not operator.getitem or node.args[1] != 1:
            return False
        shape = node.args[0]
        return shape.target is getattr and shape.args == (self.inputs[0], "shape")

    def create_proxy(self, kind, target, args, kwargs, *others, **more):
        proxy = super().create_proxy(kind, target, args, kwargs, *others, **more)
        proxy.node.meta.setdefault("rank", _rank(proxy.node))
        return proxy


class _Proxy(fx.Proxy):
    """It knows its number of dimensions, and no sizes."""

    def __getattr__(self, name):
        if name == "ndim":
            return self.dim()
        return _Shape(self) if name == "shape" else super().__getattr__(name)

    def dim(self):
        rank = self.node.meta.get("rank")
        if rank is None:
            raise Unreadable(f"the dimensions of {self.node} are not known")
        return rank


def _in_place(function):
    def write(self, other):
        return self.tracer.create_proxy("call_function", function, (self, other), {})
    return write


for _name in ("iadd", "isub", "imul", "itruediv", "ipow", "ifloordiv", "imod"):  # fx takes them for new tensors
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Shape:
    def __init__(self, proxy: _Proxy) -> None:
        self.proxy = proxy

    def __len__(self):
        return self.proxy.dim()

    def __getitem__(self, i):
        return fx.Proxy.__getattr__(self.proxy, "shape")[i]

    def __iter__(self):
        return (self[i] for i in range(len(self)))


def _rank(node: fx.Node) -> Optional[int]:
    ranks = [a.meta.get("rank") for a in node.all_input_nodes]
    first = ranks[0] if ranks else None
    if node.op == "call_method" and node.target in ("to", "type", "type_as"):
        return first
    if node.target is operator.getitem and first is not None:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if node.args[0].target in ("chunk", torch.chunk):
            return first
        return first + sum(i is None for i in index) - sum(isinstance(i, int) for i in index)
    if node.op == "call_method" and node.target in ("view", "reshape", "flatten", "squeeze", "expand", "permute"):
        return None
    if node.target in ("unsqueeze", torch.unsqueeze):
        return None if first is None else first + 1
    return None if None in ranks or not ranks else max(ranks)
