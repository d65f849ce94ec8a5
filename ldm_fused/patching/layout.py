"""A whole model in channels_last: its weights are laid out once, and each keeps the strides that it had.

A convolution whose weight is in channels_last gives its output so, whatever its input is (seen on CPUs; no GPU has run
this). Hence the first convolution brings the activations there. Norms and residuals of this library keep them, and so do
PyTorch's convolutions, interpolation, padding and concatenation. A hook at the model's entry would miss ``encode`` and
``decode``; none is needed.
"""

from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

BEFORE = "_ldm_fused_layout"
"""The attribute of a module whose weights are laid out: {name: (shape, strides before)}. Copies and pickles take it."""

_AXES = {torch.channels_last: 4, torch.channels_last_3d: 5}


class Weight(NamedTuple):
    module: nn.Module
    name: str
    strides: Tuple[int, ...]  # those that it has before

    @property
    def parameter(self) -> Tensor:
        return self.module._parameters[self.name]


def choose(modules: Iterable[Tuple[str, nn.Module]], memory_format: Optional[torch.memory_format], report: Any
           ) -> List[Weight]:
    """The weights that are to be laid out; ``report`` is told of them, and of convolutions' that cannot be.

    Raises:
        ValueError: for another ``memory_format`` than None, ``torch.channels_last`` and ``torch.channels_last_3d``.
    """
    if memory_format is None:
        return []
    if memory_format not in _AXES:
        raise ValueError("memory_format must be None, torch.channels_last or torch.channels_last_3d, got "
                         f"{memory_format!r}")
    found = []
    for name, module in modules:
        before = len(found)
        for which, p in module._parameters.items():
            if p is None or not is_lazy(p) and p.dim() < 3:
                continue
            reason = _obstacle(p, memory_format)
            if reason is None and p.stride() != _strides(p, memory_format):
                found.append(Weight(module, which, p.stride()))
            elif reason is not None and isinstance(module, nn.modules.conv._ConvNd):
                report.skipped.append((name, type(module), f"its {which} is not laid out: it {reason}"))
                break  # its bias has no shape either
        if len(found) > before:
            report.laid_out.append((name, type(module)))
    return found


def _obstacle(p: Tensor, memory_format: torch.memory_format) -> Optional[str]:
    if is_lazy(p):
        return "has no shape yet"
    if type(p.data) is not Tensor:
        return f"is a {type(p.data).__name__}"
    if p.is_meta:
        return "is on meta, as an offloaded one is"
    if p.dim() != _AXES[memory_format]:
        return f"has {p.dim()} axes, and {memory_format} is for {_AXES[memory_format]}"
    if p.untyped_storage().nbytes() != p.numel() * p.element_size():
        return "is a part of a larger tensor"
    return "is in shared memory" if p.is_cpu and p.is_shared() else None


def _strides(p: Tensor, memory_format: torch.memory_format) -> Tuple[int, ...]:
    return torch.empty(p.shape, device="meta", memory_format=memory_format).stride()


def lay_out(weights: Iterable[Weight], memory_format: Optional[torch.memory_format]) -> None:
    for weight in weights:
        p = weight.parameter
        # The first layout stays known where somebody has replaced the weight since.
        weight.module.__dict__.setdefault(BEFORE, {}).setdefault(weight.name, (p.shape, weight.strides))
        _restride(p, _strides(p, memory_format))


def is_laid_out(module: nn.Module) -> bool:
    return BEFORE in module.__dict__


def restore(module: nn.Module) -> None:
    """Gives a module's weights the strides back that they had; their values are the same bits."""
    before: Dict[str, Tuple[torch.Size, Tuple[int, ...]]] = module.__dict__.pop(BEFORE, {})
    for name, (shape, strides) in before.items():
        p = module._parameters.get(name)
        if p is not None and type(p.data) is Tensor and not p.is_meta and p.shape == shape:
            _restride(p, strides)


def _restride(p: Tensor, strides: Tuple[int, ...]) -> None:
    if p.stride() == strides:
        return  # a weight of two modules
    with torch.inference_mode(False), torch.no_grad():
        p.data = torch.empty_strided(p.shape, strides, dtype=p.dtype, device=p.device).copy_(p)
