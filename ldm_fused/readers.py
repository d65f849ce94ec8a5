"""Tells whether a model is read by something that knows PyTorch's own ops only, or :func:`disabled` is in force.

The ops are then composed of PyTorch's, and a patched module or a block of ours runs the code of the class that it stands
for. Such readers are ``torch.fx`` (a single op stays a node of its graph), the export to ONNX, and subclasses of Tensor
with a ``__torch_function__`` of their own. ``torch.jit.script`` needs nothing of this: the source of a patched method is
its class's own (:func:`ldm_fused.patching.swap.subclass`).
"""

import os
import sys
from contextlib import contextmanager
from typing import Any, Callable, Iterator, Sequence, TypeVar

import torch
import torch.fx
from torch import Tensor
from torch.overrides import has_torch_function

T = TypeVar("T")

off = 1 if os.environ.get("LDM_FUSED_DISABLE", "") not in ("", "0") else 0
"""How many :func:`disabled` are open."""

_DEFAULT = Tensor.__torch_function__.__func__
_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})
_USUAL = _PLAIN | {int, float, bool, torch.dtype, torch.SymInt, torch.SymFloat}


@contextmanager
def disabled() -> Iterator[None]:
    """Within it the ops, :class:`ldm_fused.GroupNormSiLU` and :class:`ldm_fused.FusedResnetBlock` compute PyTorch's
    formula, and patched modules run the code that they had before, to the bit, in the whole process.

    The environment variable ``LDM_FUSED_DISABLE=1`` does so from the start.
    """
    global off
    off += 1
    try:
        yield
    finally:
        off -= 1


def is_off() -> bool:
    return off > 0


def is_read(values: Sequence[Any]) -> bool:
    """Whether a reader looks on where a function is called with ``values``."""
    if has_torch_function(values) and (any(isinstance(v, torch.fx.Proxy) for v in values) or have_functions(values)):
        return True
    return to_onnx()


def have_functions(values: Sequence[Any]) -> bool:
    """Whether one of ``values`` is a tensor of a class that has functions of its own for PyTorch's, and none for ours.
    """
    for value in values:
        if type(value) not in _PLAIN and isinstance(value, Tensor):
            function = type(value).__torch_function__
            if function is not torch._C._disabled_torch_function_impl \
                    and getattr(function, "__func__", None) is not _DEFAULT:
                return True
    return False


def are_sharded(values: Sequence[Any]) -> bool:
    """Whether one of ``values`` is a DTensor. Nobody has one who has not imported its module."""
    if _USUAL.issuperset(map(type, values)):
        return False
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and any(isinstance(v, tensor.DTensor) for v in values)


def to_onnx() -> bool:
    """Whether a model is exported to ONNX. What Dynamo reads is not: it hands the op on to who asked for it."""
    if torch._C._get_tracing_state() is None and not torch.compiler.is_exporting():
        return False
    if torch.compiler.is_dynamo_compiling():
        return False
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


def untraced(decide: Callable[..., T], *args: Any) -> T:
    """``decide(*args)``, whose result is no tensor, with sizes that are numbers: ``torch.jit.trace`` would take each
    comparison of them for a part of the model, and warn of it."""
    state = torch._C._get_tracing_state()
    if state is None:
        return decide(*args)
    torch._C._set_tracing_state(None)
    try:
        return decide(*args)
    finally:
        torch._C._set_tracing_state(state)
