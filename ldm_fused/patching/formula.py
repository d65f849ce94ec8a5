"""Matches a graph against the formula of a ResNet block or of a norm, and finds the role of each part.

The roles follow from the graph, whatever the parts are called. A graph with a node that has no place in the formula is
refused.
"""

import operator
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from .. import bypass
from .source import Unreadable
from .trace import Traced

ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
MULTIPLY = {operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_"}
DIVIDE = {operator.truediv, operator.itruediv, torch.div, "div", "div_"}
SIGMOID = {torch.sigmoid, F.sigmoid, "sigmoid"}
CAST = {"to", "type", "type_as"}
CHUNK = {torch.chunk, "chunk"}
# They change nothing: a node of these needs no place.
PURE = {getattr, operator.getitem, operator.eq, operator.ne, "size", "dim"}


class Block(NamedTuple):
    """The roles of a block's parts: paths of modules, and numbers, which can be compared and pickled."""

    rank: int  # of x
    norm1: str
    act1: Optional[str]  # None for a function
    conv1: str
    norm2: str
    act2: Optional[str]
    conv2: str
    dropout: Any = None  # a module's path, or a function's probability
    shortcut: Optional[str] = None
    resample: Optional[str] = None  # before conv1
    resample_x: Optional[str] = None
    contiguous: bool = False  # the class makes x contiguous first
    embedding: Optional[Tuple[Optional[str], ...]] = None  # modules one after the other; None for swish
    modulation: Optional[Tuple[str, str]] = None  # the embedding's halves: "scale" and "shift", or the other way round
    cast: bool = False  # the class casts the embedding to the dtype of what it is added to
    factor: float = 1.0


class Reader:
    """Reads a graph backward from its output."""

    def __init__(self, traced: Traced, module: nn.Module) -> None:
        self.traced, self.module = traced, module
        self.used: List[fx.Node] = []
        self.cast_to: List[fx.Node] = []  # the nodes whose dtype an embedding is cast to
        [self.output] = [n for n in traced.graph.nodes if n.op == "output"]

    def take(self, node: fx.Node) -> fx.Node:
        self.used.append(node)
        return node

    def part(self, node: Any) -> Optional[nn.Module]:
        """The module that a node calls with one tensor and nothing else; or None."""
        if isinstance(node, fx.Node) and node.op == "call_module" and not node.kwargs and len(node.args) == 1 \
                and isinstance(node.args[0], fx.Node):
            return self.module.get_submodule(node.target)
        return None

    def finish(self) -> None:
        """Checks that the formula has used up the graph.

        Raises:
            Unreadable: where a node has no place in the formula, or a reader that has none.
        """
        used = set(self.used) | {self.output}
        inputs = set(self.traced.inputs)
        for node in self.traced.graph.nodes:
            if node in used:
                if node not in inputs and node is not self.output and not set(node.users) <= used:
                    extra = next(u for u in node.users if u not in used)
                    if extra.target not in PURE:
                        raise Unreadable(f"{node} is read by {extra}, too")
                if _in_place(node) and not self.is_fresh(node.args[0]):
                    raise Unreadable(f"{node} writes to what may be read elsewhere")
            elif node not in inputs and node.target not in PURE:
                raise Unreadable(f"{node} has no place in the formula")

    def is_fresh(self, node: fx.Node) -> bool:
        """Whether a node makes a new tensor that one node reads."""
        module = self.module.get_submodule(node.target) if node.op == "call_module" else None
        made = module is not None and not isinstance(module, nn.Identity) or _is(node, ADD | MULTIPLY | {
            F.silu, F.group_norm, F.dropout})
        return made and sum(user.target not in PURE for user in node.users) == 1

    # ---- Pieces of formulas ----------------------------------------------------------------------------------------

    def swish(self, node: Any) -> Optional[Tuple[fx.Node, Optional[str]]]:
        """What ``node`` computes swish of, and the path of the module that does, if one does; or None."""
        module = self.part(node)
        if module is not None:
            return (self.take(node).args[0], node.target) if bypass.is_activation(module) else None
        if _is(node, {F.silu}):
            return self.take(node).args[0], None
        if _is(node, MULTIPLY) and len(node.args) == 2 and not node.kwargs:
            for x, gate in (node.args, node.args[::-1]):
                if _is(gate, SIGMOID) and gate.args[0] is x:
                    self.take(gate)
                    self.take(node)
                    return x, None
        return None

    def terms(self, node: Any, functions=ADD) -> Optional[Tuple[Any, Any]]:
        if _is(node, functions) and len(node.args) == 2 and not node.kwargs:
            return node.args
        return None

    def activated_norm(self, node: fx.Node, modulated: bool = False):
        """(norm's path, activation's path, what the norm reads, the modulation) of ``swish(norm(...))``."""
        module = self.part(node)
        known = None if module is None else bypass.known_norm(module)
        if known is not None and known.activated:
            return self.take(node).target, None, node.args[0], None
        found = self.swish(node)
        if found is None:
            raise Unreadable(f"{node} is not swish")
        inner, act = found
        modulation = self.modulation(inner) if modulated else None
        if modulation is not None:
            inner, modulation = modulation
        module = self.part(inner)
        known = None if module is None else bypass.known_norm(module)
        if known is None or known.activated:
            what = inner.target if module is None else f"a {type(module).__name__}"
            raise Unreadable(f"its swish is of {what}, no norm that is known")
        return self.take(inner).target, act, inner.args[0], modulation

    def modulation(self, node: fx.Node):
        """(the norm's node, scale, shift) of ``norm * (1 + scale) + shift``, or None."""
        if _is(node, {torch.addcmul}) and len(node.args) == 3 and not node.kwargs:
            shift, pairs = node.args[0], [node.args[1:], node.args[:0:-1]]
            for norm, factor in pairs:
                scale = self.one_plus(factor)
                if scale is not None and self.part(norm) is not None:
                    self.take(node)
                    return norm, (scale, shift)
            return None
        for product, shift in (lambda t: (t, t[::-1]) if t else ())(self.terms(node)):
            factors = self.terms(product, MULTIPLY)
            for norm, factor in (factors, factors[::-1]) if factors else ():
                scale = self.one_plus(factor)
                if scale is not None and self.part(norm) is not None:
                    self.take(node)
                    self.take(product)
                    return norm, (scale, shift)
        return None

    def one_plus(self, node: Any) -> Optional[fx.Node]:
        terms = self.terms(node)
        for one, scale in (terms, terms[::-1]) if terms else ():
            if isinstance(one, (int, float)) and one == 1 and isinstance(scale, fx.Node):
                self.take(node)
                return scale
        return None

    def views(self, node: fx.Node, rank: int) -> fx.Node:
        """What ``node`` is a view of, with axes of size 1 behind its own, and casts between."""
        while True:
            if _is(node, CAST) and len(node.args) == 2 and not node.kwargs:
                dtype = node.args[1]
                if node.target != "type_as":
                    if not (_is(dtype, {getattr}) and dtype.args[1] == "dtype"):
                        raise Unreadable(f"{node} casts to {dtype}")
                    self.take(dtype)
                    dtype = dtype.args[0]
                self.cast_to.append(dtype)
            elif _is(node, {operator.getitem}) and isinstance(node.args[1], tuple):
                index, own = node.args[1], node.args[0].meta.get("rank")
                axes = [i for i in index if i is not None]
                if list(index[:len(axes)]) != axes or axes != [Ellipsis] and axes != [slice(None)] * (own or 0):
                    raise Unreadable(f"{node} is no view with axes behind")
            elif _is(node, {"unsqueeze", torch.unsqueeze}) and not node.kwargs:
                if node.args[1] not in (-1, node.args[0].meta.get("rank")):
                    raise Unreadable(f"{node} is no view with axes behind")
            else:
                return node
            node = self.take(node).args[0]

    def embedding(self, node: fx.Node) -> Tuple[Optional[str], ...]:
        """The modules between the second argument and ``node``."""
        steps: List[Optional[str]] = []
        while True:
            if len(self.traced.inputs) > 1 and node is self.traced.inputs[1]:
                return tuple(reversed(steps))
            found = self.swish(node)
            if found is not None:
                node, path = found
            elif self.part(node) is not None:
                path = self.take(node).target
                node = node.args[0]
            else:
                raise Unreadable(f"{node} is no embedding")
            steps.append(path)

    def dropout(self, node: fx.Node) -> Tuple[fx.Node, Any]:
        module = self.part(node)
        if isinstance(module, (nn.modules.dropout._DropoutNd, nn.Identity)):
            return self.take(node).args[0], node.target
        if _is(node, {F.dropout}):
            options = dict(zip(("p", "training", "inplace"), node.args[1:]), **node.kwargs)
            if not all(isinstance(v, (bool, int, float)) for v in options.values()):
                raise Unreadable(f"{node} has a probability that is not known")
            p = float(options.get("p", 0.5)) if options.get("training", True) else 0.0
            return self.take(node).args[0], p or None
        return node, None

    def input(self, node: fx.Node) -> Tuple[fx.Node, bool]:
        """x, and whether it is made contiguous first."""
        contiguous = False
        while _is(node, {"contiguous"}) and len(node.args) == 1 and not node.kwargs:
            node, contiguous = self.take(node).args[0], True
        return node, contiguous


# ---- Blocks ----------------------------------------------------------------------------------------------------------


def block(traced: Traced, module: nn.Module) -> Block:
    """The roles of a block's parts.

    Raises:
        Unreadable: says what does not belong to the formula.
    """
    reasons = []
    for order in (0, 1):
        reader = Reader(traced, module)
        try:
            return _block(reader, order)
        except Unreadable as reason:
            reasons.append(str(reason))
    raise Unreadable(reasons[0] if "end" in reasons[1] else reasons[1])


def _block(r: Reader, order: int) -> Block:
    node, factor = r.output.args[0], 1.0
    if not isinstance(node, fx.Node):
        raise Unreadable("it gives more than a tensor")
    for functions, power in ((MULTIPLY, 1), (DIVIDE, -1)):
        for value, other in (lambda t: (t, t[::-1]) if t else ())(r.terms(node, functions)):
            if factor == 1.0 and isinstance(other, (int, float)) and not isinstance(other, bool) and (
                    power == 1 or other is node.args[1]) and isinstance(value, fx.Node):
                node, factor = r.take(node).args[node.args.index(value)], float(other) ** power
                break
    terms = r.terms(node)
    if terms is None or not all(isinstance(t, fx.Node) for t in terms):
        raise Unreadable(f"it does not end in a sum, but in {node.target}")
    r.take(node)
    h, side = terms if order == 0 else terms[::-1]
    x = r.traced.inputs[0]
    if r.part(h) is None:
        raise Unreadable(f"its sum's end {h} is no module's")
    conv2 = r.take(h).target
    h, dropout = r.dropout(h.args[0])
    norm2, act2, h, modulation = r.activated_norm(h, modulated=True)
    rank = x.meta["rank"]
    embedding = halves = None
    if modulation is not None:
        halves, embedding = _halves(r, modulation, rank)
    conv1 = h
    terms = r.terms(h)
    if terms is not None and halves is None:
        r.take(h)
        for h, added in (terms, terms[::-1]):
            if r.part(h) is not None:
                conv1, embedding = h, r.embedding(r.views(_of_rank(added, rank), rank))
                break
    cast = bool(r.cast_to)
    if r.part(conv1) is None:
        raise Unreadable(f"{conv1} is no convolution")
    h = r.take(conv1).args[0]
    resample = None
    if r.part(h) is not None and not bypass.is_activation(r.part(h)) and bypass.known_norm(r.part(h)) is None:
        resample, h = r.take(h).target, h.args[0]
    norm1, act1, h, _ = r.activated_norm(h)
    h, contiguous = r.input(h)
    if h is not x:
        raise Unreadable(f"{h} comes before the first norm")
    shortcut = resample_x = None
    paths = []
    while r.part(side) is not None:
        paths.append(r.take(side).target)
        side = side.args[0]
        side, _ = r.input(side) if r.part(side) is None else (side, False)
    side, _ = r.input(side)
    if side is not x:
        raise Unreadable(f"{side} is no shortcut of its input")
    if resample is not None:
        if not paths:
            raise Unreadable(f"{resample} has no counterpart beside")
        resample_x = paths.pop()
    if len(paths) > 1:
        raise Unreadable("its shortcut has several parts")
    shortcut = paths[0] if paths else None
    for node in r.cast_to:  # it must have the block's dtype, not the embedding's
        if node is not conv1 and node is not x:
            raise Unreadable(f"the embedding is cast to {node}'s dtype")
    r.finish()
    return Block(rank, norm1, act1, conv1.target, norm2, act2, conv2, dropout, shortcut, resample, resample_x,
                 contiguous, embedding, halves, cast, factor)


def _halves(r: Reader, modulation: Tuple[fx.Node, fx.Node], rank: int):
    """Which half of the embedding is scale and which is shift, and the embedding."""
    found: Dict[int, str] = {}
    sources = []
    for name, node in zip(("scale", "shift"), modulation):
        node = r.views(_of_rank(node, rank), rank)
        if not (_is(node, {operator.getitem}) and node.args[1] in (0, 1) and _is(node.args[0], CHUNK)):
            raise Unreadable(f"its {name} is no half of an embedding")
        found[node.args[1]] = name
        chunk = r.take(r.take(node).args[0])
        options = dict(zip(("chunks", "dim"), chunk.args[1:]), **chunk.kwargs)
        if options != {"chunks": 2, "dim": 1}:
            raise Unreadable(f"its {name} is no half of an embedding")
        sources.append(chunk.args[0])
    if sources[0] is not sources[1] or len(found) != 2:
        raise Unreadable("its scale and shift are not the halves of one embedding")
    return (found[0], found[1]), r.embedding(r.views(sources[0], rank))


def _of_rank(node: Any, rank: int) -> Any:
    if isinstance(node, fx.Node) and node.meta.get("rank") != rank:
        raise Unreadable(f"{node} does not broadcast over the axes behind the second")
    return node


# ---- Norms and activations -------------------------------------------------------------------------------------------


def norm(traced: Traced, module: nn.Module) -> bypass.Norm:
    """What a class of norms computes from its ``num_groups``, ``weight``, ``bias`` and ``eps``.

    Raises:
        Unreadable: where it computes anything but group_norm, with the activation behind it or without.
    """
    r = Reader(traced, module)
    x = traced.inputs[0]
    node, keeps_dtype = _uncast(r, r.output.args[0], x)
    found = r.swish(node)
    if found is not None:
        node, keeps = _uncast(r, found[0], x)
        keeps_dtype = keeps_dtype or keeps
    if not _is(node, {F.group_norm}):
        raise Unreadable("it does not give group_norm's result")
    r.take(node)
    arguments = dict(zip(("input", "num_groups", "weight", "bias", "eps"), node.args), **node.kwargs)
    own = {name: getattr(module, name, None) for name in ("num_groups", "weight", "bias", "eps")}
    if arguments.get("num_groups") != own["num_groups"] or arguments.get("eps", 1e-5) != own["eps"]:
        raise Unreadable("its groups or eps are others than its attributes")
    for name in ("weight", "bias"):
        given = arguments.get(name)
        if isinstance(given, fx.Node):
            given, _ = _uncast(r, given, x)
            if given.op != "get_attr" or given.target != name:
                raise Unreadable(f"its {name} is {given}")
            r.take(given)
        elif own[name] is not None or given is not None:
            raise Unreadable(f"its {name} is not used")
    given, _ = _uncast(r, arguments["input"], x)
    if arguments["input"] is not x and not keeps_dtype:
        raise Unreadable("it gives float32")
    if given is not x:
        raise Unreadable(f"it computes {given} first")
    r.finish()
    return bypass.Norm(keeps_dtype=keeps_dtype, activated=found is not None)


def _uncast(r: Reader, node: Any, x: fx.Node) -> Tuple[Any, bool]:
    """What casts to float32 and to x's dtype are applied to, and whether the last of them was to x's."""
    last = None
    while isinstance(node, fx.Node) and node.op == "call_method":
        if node.target == "float" and len(node.args) == 1 and not node.kwargs:
            last = last or "float"
        elif node.target in CAST and len(node.args) == 2 and not node.kwargs:
            dtype = node.args[1]
            if dtype is not torch.float32:
                if node.target != "type_as":
                    if not (_is(dtype, {getattr}) and dtype.args[1] == "dtype"):
                        break
                    r.take(dtype)
                    dtype = dtype.args[0]
                if dtype is not x:
                    break
                last = last or "x"
            last = last or "float"
        else:
            break
        node = r.take(node).args[0]
    if last == "float" and node is not x and not (isinstance(node, fx.Node) and node.op == "get_attr"):
        raise Unreadable("it gives float32")
    return node, last == "x"


def is_swish(traced: Traced, module: nn.Module) -> bool:
    """Whether a module without parameters computes swish."""
    r = Reader(traced, module)
    found = r.swish(r.output.args[0])
    if found is None or found[0] is not traced.inputs[0] or found[1] is not None:
        return False
    r.finish()
    return True


def _is(node: Any, targets) -> bool:
    return isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.target in targets


def _in_place(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target in (operator.iadd, operator.isub, operator.imul, operator.itruediv):
        return True
    if node.op == "call_method" and node.target.endswith("_"):
        return True
    return bool(node.kwargs.get("inplace")) and node.op != "placeholder"
