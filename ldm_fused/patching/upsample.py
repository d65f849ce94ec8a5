"""Nearest upsampling by two and the 3x3 convolution behind it as one convolution of the small tensor.

Behind the upsampling a pixel's neighbours are copies of one another, so that the taps which read the same copy can be
summed first: of three taps a, b, c along an axis even pixels see a and b + c, odd ones a + b and c. That is 2.25 times
fewer multiplications in two dimensions, and no tensor of four times the size in between. Zeros stand around the copies
as around the pixels: borders agree, too.
"""

import functools
import inspect
import operator
from itertools import product
from typing import Any, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .. import bypass
from ..decisions import decided
from ..ops import accumulate_dtype
from . import formula, source, swap
from .adapter import Adapter, sites
from .source import Unreadable
from .trace import Traced, trace

_AXES = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_CONVOLVE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by dimensions
_TRANSPOSED = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


class Upsampling(NamedTuple):
    """The paths of the convolution, and of the nn.Upsample before it, where one is; which axes behind the channels are
    doubled."""

    conv: str
    doubled: Tuple[bool, ...]
    up: Optional[str] = None


class Upsample(Adapter):
    """A module that doubles the axes ``known.doubled`` and convolves.

    ``told`` are the values of the attributes ``names``, which decide what the class computes.
    """

    kind = "upsample"

    def __init__(self, known: Upsampling, names: Tuple[str, ...] = (), told: Tuple[Any, ...] = ()) -> None:
        self.known, self.names, self.told = known, names, told

    def known_of(self, module: nn.Module) -> Upsampling:
        return self.known

    def sites(self, module: nn.Module) -> Sequence[str]:
        return (self.known_of(module).conv,)

    def obstacle(self, module: nn.Module) -> Optional[str]:
        known = self.known_of(module)
        return _folding_obstacle(module.get_submodule(known.conv), len(known.doubled))

    def variant(self, module: nn.Module):
        return self.known_of(module), self.told

    def example(self, module: nn.Module):
        known = self.known_of(module)
        conv = module.get_submodule(known.conv)
        return (torch.randn(2, conv.in_channels, *(5, 4, 3)[:len(known.doubled)], dtype=torch.float64),)

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        known = self.known_of(module)
        reason = decided(self.call_obstacle, module, known, x)
        sites(module)[0].count(x, reason)
        if reason is not None:
            return swap.as_before(module, x)
        conv = module.get_submodule(known.conv)
        return upsampled(x, conv.weight, conv.bias, known.doubled)

    def call_obstacle(self, module: nn.Module, known: Upsampling, x: Tensor) -> Optional[str]:
        """The reason why the class's own method must run, or None."""
        for name, value in zip(self.names, self.told):
            now = source.told(module, name)
            if now is not value and now != value:
                return f"its {name} has changed since it was read"
        *containers, conv = _on_path(module, known.conv)
        for container in containers:
            reason = None if _is_sequential(container) and len(container) == 1 else "it has other parts than were read"
            reason = reason or bypass.hooks_obstacle(container)
            if reason is not None:
                return f"its {type(container).__name__}: {reason}"
        if known.up is not None:
            up = module._modules[known.up]
            reason = bypass.module_obstacle(up, nn.Upsample)
            if reason is None and _doubled(up.size, up.scale_factor, up.mode, len(known.doubled)) != known.doubled:
                reason = "it does something else than was read"
            if reason is not None:
                return f"its upsampling: {reason}"
        if isinstance(module, nn.Sequential) and len(module) != 2:
            return "it has other parts than were read"
        reason = bypass.convolution_obstacle(conv, x.device) or _folding_obstacle(conv, len(known.doubled))
        if reason is not None:
            return f"its convolution: {reason}"
        if x.dim() != conv.weight.dim() or x.shape[1] != conv.in_channels:
            return "its input is not what the convolution takes"
        return None


def _on_path(module: nn.Module, path: str) -> Sequence[nn.Module]:
    found = []
    for name in path.split("."):
        module = module._modules[name]
        found.append(module)
    return found


def _folding_obstacle(conv: Optional[nn.Module], axes: int) -> Optional[str]:
    base = next((cls for cls in _AXES if isinstance(conv, cls)), None)
    if base is None:
        return "it has no convolution" if conv is None else f"its convolution is a {type(conv).__name__}"
    if _AXES[base] != axes:
        return f"its convolution has {_AXES[base]} axes"
    if conv.kernel_size != (3,) * axes or conv.padding not in ((1,) * axes, "same") or conv.padding_mode != "zeros" or (
            conv.stride != (1,) * axes or conv.dilation != (1,) * axes or conv.groups != 1):
        return f"its convolution is {conv}"
    return None


# ---- The arithmetic ------------------------------------------------------------------------------------------------


def upsampled(x: Tensor, weight: Tensor, bias: Optional[Tensor], doubled: Sequence[bool]) -> Tensor:
    """The convolution with ``weight`` (out, in, 3, ...), padded by one zero, of x (N, in, *) with the axes ``doubled``
    doubled.

    Its weights are made anew in each call: in float32, by what autograd can follow. They are not kept, for nothing
    tells surely that kept ones are still right: writes to ``weight.data``, as averages of weights and merges of LoRA
    make, change no version.

    On a CPU the phases are convolved by themselves: they stay within 1.5 times the class's error, and the transposed
    convolution did not, in float32's dx and in bfloat16's output. No GPU has run either. There the transposed
    convolution is one kernel, and needs no pass to put phases together.
    """
    if x.is_cpu:
        return by_phases(x, weight, bias, doubled)
    return transposed(x, weight, bias, doubled)


def transposed(x: Tensor, weight: Tensor, bias: Optional[Tensor], doubled: Sequence[bool]) -> Tensor:
    """:func:`upsampled` as one transposed convolution with four taps and stride 2 along each doubled axis."""
    kernel = weight.to(accumulate_dtype(weight.dtype))
    for axis, doubles in enumerate(doubled, 2):
        a, b, c = _taps(kernel, axis)
        kernel = torch.cat((c, b + c, a + b, a) if doubles else (c, b, a), axis)
    stride = tuple(2 if doubles else 1 for doubles in doubled)
    return _TRANSPOSED[x.dim()](x, kernel.to(weight.dtype).transpose(0, 1), bias, stride=stride, padding=1)


def by_phases(x: Tensor, weight: Tensor, bias: Optional[Tensor], doubled: Sequence[bool]) -> Tensor:
    """:func:`upsampled` as one small convolution for each place that a pixel of the result has in a pixel of x."""
    y, dtype = None, weight.dtype
    # Cast once, so that autograd sums the phases' gradients in float32.
    weight, bias = (t if t is None else t.to(accumulate_dtype(dtype)) for t in (weight, bias))
    kernels = [weight]
    for axis, doubles in enumerate(doubled, 2):
        kernels = [half for kernel in kernels for half in (_halves(kernel, axis) if doubles else (kernel,))]
    for kernel, phase in zip(kernels, product(*((0, 1) if doubles else (None,) for doubles in doubled))):
        # Padded on both sides there is one result too many, which the other phase has.
        part = _CONVOLVE[x.dim()](x, kernel.to(dtype), None if bias is None else bias.to(dtype), padding=1)
        for axis, odd in enumerate(phase, 2):
            part = part if odd is None else part.narrow(axis, odd, x.shape[axis])
        if y is None:
            y = _empty(part, [n * (2 if doubles else 1) for n, doubles in zip(x.shape[2:], doubled)])
        y[(..., *(slice(odd, None, None if odd is None else 2) for odd in phase))] = part
    return y


def _halves(kernel: Tensor, axis: int) -> Tuple[Tensor, Tensor]:
    """What even pixels see, and odd ones."""
    a, b, c = _taps(kernel, axis)
    return torch.cat((a, b + c), axis), torch.cat((a + b, c), axis)


def _taps(kernel: Tensor, axis: int) -> Sequence[Tensor]:
    return [kernel.narrow(axis, i, 1) for i in range(3)]  # with the axis, so that the sums keep the kernel's layout


def _empty(like: Tensor, sizes: Sequence[int]) -> Tensor:
    """(N, C, *sizes), with the channels innermost if they are so in ``like``."""
    batch, channels = like.shape[:2]
    if like.stride(1) == 1 and channels > 1:
        return like.new_empty((batch, *sizes, channels)).movedim(-1, 1)
    return like.new_empty((batch, channels, *sizes))


# ---- Reading ---------------------------------------------------------------------------------------------------------


def looks_like_an_upsampling(module: nn.Module) -> bool:
    """Whether it is worth reading, and telling why it cannot be read: it interpolates and has few parts."""
    if len(module._modules) > 4 or not module._modules:
        return False
    if isinstance(module, nn.Sequential):
        return any(isinstance(part, nn.Upsample) for part in module._modules.values())
    return not type(module).__module__.startswith("torch.") and _interpolates(type(module).forward)


@functools.lru_cache(maxsize=1024)
def _interpolates(forward: Any) -> bool:
    try:
        return "interpolate(" in inspect.getsource(forward)
    except (OSError, TypeError):
        return False


def read(module: nn.Module) -> Upsample:
    """
    Raises:
        Unreadable: with what is not the formula's.
    """
    rank = max((p.dim() for p in module.parameters()), default=0)
    if rank < 3:
        raise Unreadable("it has no convolution")
    traced = trace(module, "forward", {0: rank})
    forward = inspect.unwrap(type(module).forward)
    for path in source.read(forward.__code__, type(module)).read:
        if isinstance(source.told(module, path), (tuple, list, dict, set)):  # which may change unseen
            raise Unreadable(f"it reads self.{path}, a {type(source.told(module, path)).__name__}")
    if traced.has_modes:
        raise Unreadable("it differs in training")
    known = _formula(traced, module)
    conv = module.get_submodule(known.conv)
    if any(n != getattr(conv, "in_channels", n) for n in traced.channels):
        raise Unreadable(f"it takes {traced.channels} channels, and its convolution {conv.in_channels}")
    return Upsample(known, traced.names, tuple(source.told(module, name) for name in traced.names))


def _formula(traced: Traced, module: nn.Module) -> Upsampling:
    """
    Raises:
        Unreadable: where it is anything but nearest upsampling and a convolution.
    """
    r = formula.Reader(traced, module)
    x, node = traced.inputs[0], r.output.args[0]
    conv = r.part(node)
    if conv is None:
        raise Unreadable("it does not end in a convolution")
    path, node = r.take(node).target, node.args[0]
    while _is_sequential(conv) and len(conv) == 1:  # MONAI's
        [(name, conv)] = conv._modules.items()
        path = f"{path}.{name}"
    options = {"size": None, "scale_factor": None, "mode": "nearest", "align_corners": None}
    up = r.part(node)
    if type(up) is nn.Upsample:
        options.update((name, getattr(up, name)) for name in options)
    elif formula._is(node, {F.interpolate}):
        options.update(zip(("input", *options), node.args), **node.kwargs)
    else:
        raise Unreadable(f"{node} comes before its convolution, and is no interpolation")
    if r.take(node).args[:1] != (x,) and options.get("input") is not x:
        raise Unreadable(f"{node} is not of its input")
    size, factors, mode = options["size"], options["scale_factor"], options["mode"]
    if isinstance(size, (tuple, list)) and type(up) is not nn.Upsample:
        size, factors = None, tuple(_factor(r, n, i) for i, n in enumerate(size, 2))
    doubled = _doubled(size, factors, mode, x.meta["rank"] - 2)
    if doubled is None:
        raise Unreadable(f"it does not double: it interpolates by {mode!r}, with size {size} and factors {factors}")
    r.finish()
    return Upsampling(path, doubled, node.target if type(up) is nn.Upsample else None)


def _doubled(size: Any, factors: Any, mode: str, axes: int) -> Optional[Tuple[bool, ...]]:
    """Which axes an interpolation doubles, if that is all that it does; or None."""
    factors = tuple(factors) if isinstance(factors, (tuple, list)) else (factors,) * axes
    if mode not in ("nearest", "nearest-exact") or size is not None or len(factors) != axes:
        return None
    return tuple(factor == 2 for factor in factors) if 2 in factors and set(factors) <= {1, 2} else None


def _factor(r: formula.Reader, node: Any, axis: int) -> Optional[int]:
    """1 or 2, by which the size of x along ``axis`` is multiplied; or None."""
    x, factor = r.traced.inputs[0], 1
    for n, other in (lambda t: (t, t[::-1]) if t else ())(r.terms(node, formula.MULTIPLY)):
        if other == 2 and isinstance(n, fx.Node):
            r.take(node)
            node, factor = n, 2
            break
    if not formula._is(node, {operator.getitem}) or node.args[1] not in (axis, axis - x.meta["rank"]):
        return None
    return factor if node.args[0].target is getattr and node.args[0].args == (x, "shape") else None


def _is_sequential(module: nn.Module) -> bool:
    """Whether it calls its parts one after the other, and does nothing else."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
