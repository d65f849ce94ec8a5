"""Reads in a function's source what a trace does not show: what the function branches on, and its side effects.

A trace follows one way through the code. It stands for all calls only if nothing decides that way but attributes of
``self``, which each call checks again, whether an argument is None, how many dimensions a tensor has, and whether it
has the channels that ``self`` says.
"""

import ast
import functools
import inspect
import textwrap
from types import CodeType
from typing import Any, Iterator, List, NamedTuple, Optional, Set, Tuple

from torch import Tensor, nn

ABSENT, MODULE, TENSOR = "(absent)", "(a module)", "(a tensor)"
_SIMPLE = (bool, int, float, complex, str, bytes, type(None))
_REFUSED = {ast.Try: "catches exceptions", ast.With: "has a with statement", ast.AsyncWith: "has a with statement",
            ast.Global: "writes to global names", ast.Nonlocal: "writes to outer names", ast.Yield: "yields",
            ast.YieldFrom: "yields", ast.Await: "awaits", ast.NamedExpr: "assigns within expressions",
            ast.Match: "has a match statement"}


class Unreadable(Exception):
    """Says why nobody can tell what a class computes."""


class Source(NamedTuple):
    """The attributes of self, dotted, that a function reads, that it branches on, and whose presence it asks for."""

    read: Tuple[str, ...]
    tested: Tuple[str, ...]
    present: Tuple[str, ...]


def text_of(code: CodeType, cls: type) -> str:
    try:
        return textwrap.dedent(inspect.getsource(code))
    except (OSError, TypeError):
        # A class of EDM's pickles carries its file's text.
        text = getattr(cls, "_orig_module_src", None)
        if isinstance(text, str) and code.co_filename == "<string>":
            lines = text.splitlines()[code.co_firstlineno - 1:]
            return textwrap.dedent("\n".join(inspect.getblock([line + "\n" for line in lines])))
        raise Unreadable(f"the source of {code.co_name} is not there to be read") from None


def read(code: CodeType, cls: type) -> Source:
    """The attributes of self that a function reads and branches on.

    Raises:
        Unreadable: where the function branches on anything else, or has a side effect.
    """
    return _read(text_of(code, cls), code.co_name)


@functools.lru_cache(maxsize=1024)
def _read(text: str, name: str) -> Source:
    try:
        tree = ast.parse(text)
    except SyntaxError:
        tree = None
    function = next((n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.Lambda))), None) if tree else None
    if function is None:
        raise Unreadable(f"the source of {name} is not that of a function")
    return _Function(function, name).source()


class _Function:
    def __init__(self, function: Any, name: str) -> None:
        self.function, self.name = function, name
        parameters = [*function.args.posonlyargs, *function.args.args]
        self.self = parameters[0].arg if parameters and parameters[0].arg == "self" else None
        self.parameters = {a.arg for a in [*parameters, *function.args.kwonlyargs]}
        self.tested: Set[str] = set()
        self.present: Set[str] = set()  # the function asks whether they are there
        self.checked: Set[str] = set()  # local names
        self.body = function.body if isinstance(function.body, list) else [function.body]

    def refuse(self, what: str) -> None:
        raise Unreadable(f"its {self.name} {what}")

    def source(self) -> Source:
        for node in self.nodes():
            for cls, what in _REFUSED.items():
                if isinstance(node, cls):
                    self.refuse(what)
            if isinstance(node, ast.Delete) and not all(isinstance(target, ast.Name) for target in node.targets):
                self.refuse("deletes")
            if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    for part in ast.walk(target):
                        if isinstance(part, (ast.Attribute, ast.Subscript)):
                            self.refuse(f"writes to {ast.unparse(part)}")
            if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
                self.refuse(f"does {ast.unparse(node)}")
            for test in _tests(node):
                self.allow(test)
        read = {path for node in self.nodes() for path in [self.path(node)] if path}
        return Source(tuple(sorted(read)), tuple(sorted(self.tested)), tuple(sorted(self.present)))

    def nodes(self) -> Iterator[ast.AST]:
        for statement in self.body:
            yield from ast.walk(statement)

    def path(self, node: ast.AST) -> Optional[str]:
        """"a.b" of ``self.a.b``."""
        names: List[str] = []
        while isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        if names and self.self and isinstance(node, ast.Name) and node.id == self.self:
            return ".".join(reversed(names))
        return None

    def allow(self, node: ast.AST) -> None:
        """Notes what a branch depends on, or refuses it."""
        path = self.path(node)
        if path is not None:
            self.tested.add(path)
        elif isinstance(node, ast.Constant) or isinstance(node, ast.Attribute) and node.attr == "ndim":
            pass
        elif _compares_channels(node):
            self.allow(node.comparators[0])  # the trace goes the way of an x that has as many
        elif isinstance(node, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops) and all(
                isinstance(c, ast.Constant) and c.value is None for c in node.comparators):
            path = self.path(node.left)
            if path is not None:
                self.present.add(path)
            elif not isinstance(node.left, ast.Name):
                self.allow(node.left)
        elif isinstance(node, (ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.Compare, ast.Tuple, ast.List, ast.Set)):
            for part in ast.iter_child_nodes(node):
                if not isinstance(part, (ast.boolop, ast.unaryop, ast.operator, ast.cmpop, ast.expr_context)):
                    self.allow(part)
        elif isinstance(node, ast.Name) and self.is_local(node.id):
            self.allow_local(node.id)
        elif isinstance(node, ast.Call) and self.is_known_call(node):
            pass
        else:
            self.refuse(f"branches on {ast.unparse(node)}")

    def is_local(self, name: str) -> bool:
        return name not in self.parameters and bool(list(self.assigned(name)))

    def assigned(self, name: str) -> Iterator[Tuple[ast.AST, Optional[ast.AST]]]:
        """Where the local name gets a value, and the value, None if it is not a single expression."""
        for node in self.nodes():
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name) and target.id == name:
                        yield node, node.value
                    elif any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(target)):
                        yield node, None
            elif isinstance(node, (ast.AugAssign, ast.AnnAssign, ast.For, ast.comprehension)):
                if any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node.target)):
                    yield node, None

    def allow_local(self, name: str) -> None:
        if name in self.checked:
            return
        self.checked.add(name)
        for _, value in self.assigned(name):
            if value is None:
                self.refuse(f"branches on {name}")
            self.allow(value)

    def is_known_call(self, call: ast.Call) -> bool:
        name = call.func.id if isinstance(call.func, ast.Name) else None
        first = call.args[0] if call.args else None
        if call.keywords:
            return False
        if name in ("hasattr", "getattr") and isinstance(first, ast.Name) and first.id == self.self:
            if isinstance(call.args[1], ast.Constant) and all(isinstance(a, ast.Constant) for a in call.args[2:]):
                (self.present if name == "hasattr" else self.tested).add(str(call.args[1].value))
                return True
        if name == "len" and isinstance(first, ast.Attribute) and first.attr == "shape":
            return True
        if name == "len" and first is not None and self.path(first) is not None:
            return False  # it may change unseen
        return isinstance(call.func, ast.Attribute) and call.func.attr == "dim" and not call.args


def _compares_channels(node: ast.AST) -> bool:
    match node:
        case ast.Compare(ast.Subscript(ast.Attribute(ast.Name(), "shape"), ast.Constant(1)), [ast.Eq() | ast.NotEq()]):
            return True
    return False


def _tests(node: ast.AST) -> List[ast.AST]:
    if isinstance(node, (ast.If, ast.IfExp, ast.While, ast.Assert)):
        return [node.test]
    if isinstance(node, ast.BoolOp):
        return list(node.values)
    if isinstance(node, ast.comprehension):
        return list(node.ifs)
    return [node.operand] if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not) else []


# ---- What an instance says -----------------------------------------------------------------------------------------


def told(module: nn.Module, path: str) -> Any:
    """What a branch on ``self.path`` sees, as far as it may be kept: of a module or a tensor its presence alone."""
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name, ABSENT)
    if isinstance(value, nn.Module):
        return MODULE
    return TENSOR if isinstance(value, Tensor) else value


def is_simple(value: Any) -> bool:
    return isinstance(value, _SIMPLE) or is_numpys(value)


def is_numpys(value: Any) -> bool:
    """Whether it is a number of numpy's. Compilers take it for a tensor, and cannot branch on it."""
    return type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0


def deciding(module: nn.Module, sources: List[Source]) -> Tuple[str, ...]:
    """The attributes that decide what the functions compute: those they branch on, and numbers and strings.

    Raises:
        Unreadable: where they branch on something else.
    """
    names = set()
    for source in sources:
        for path in source.tested:
            value = told(module, path)
            if not is_simple(value) or value == TENSOR:
                raise Unreadable(f"it branches on self.{path}, a {type(value).__name__}")
            names.add(path)
        for path in source.present:
            names.add(path)
            if not is_simple(told(module, path)):
                raise Unreadable(f"it asks for self.{path}, a {type(told(module, path)).__name__}")
        names.update(path for path in source.read if is_simple(told(module, path))
                     and told(module, path) not in (MODULE, TENSOR, ABSENT))
    return tuple(sorted(names - {"training"}))
