"""``patch`` and ``unpatch``."""

from contextlib import contextmanager
from typing import Any, Iterator, Optional

import torch

from . import layout, swap
from .adapter import STATE
from .choose import Choice
from .report import PatchReport, UnsupportedBlock
from .swap import named_modules

__all__ = ["is_patched", "patch", "patched", "unpatch"]


def patch(model: Any, *, blocks: bool = True, norms: bool = True, recompute: bool = False,
          strict: bool = False, fold_upsample: bool = False,
          memory_format: Optional[torch.memory_format] = None) -> PatchReport:
    """Fuses every GroupNorm and activation in ``model`` that is known, in place, and changes nothing else.

    An instance becomes one of a subclass of its class. It keeps its submodules, Parameters, state dict and the name of
    its class. Each call checks each norm and convolution (:mod:`ldm_fused.bypass`): what somebody hooks, wraps or
    moves, before ``patch`` or after, is not fused but called. Copies and pickles of a patched model are patched. To
    patch a patched model again changes nothing but ``recompute``.

    Args:
        model: a module, or a pipeline: an object whose ``components`` or attributes are modules.
        blocks: fuse ResNet blocks, and norms with an activation behind them.
        norms: fuse GroupNorms outside of blocks.
        recompute: blocks keep no activated tensors for the backward pass, as ``FusedResnetBlock(recompute=True)``.
        strict: raise, and change nothing, if anything is skipped.
        fold_upsample: compute nearest upsampling by two and the 3x3 convolution behind it as one convolution of the
            small tensor, with the taps summed that meet the same pixel: 2.25 times fewer multiplications, and no tensor
            of the upsampled size between. Weights are summed in float32 in each call, from the convolution's own, which
            stay as they are; the sum is rounded once more, to their dtype.
        memory_format: ``torch.channels_last``, or ``torch.channels_last_3d`` for weights of five axes: lays weights out
            so, once, and activations follow. ``unpatch`` gives each weight its strides back. :func:`disabled` leaves
            weights as they lie, and runs the model's own code on them.

    Raises:
        TypeError: if ``model`` is neither a module nor holds one.
        ValueError: for another ``memory_format``.
        UnsupportedBlock: with ``strict``, with the report as its message.
    """
    modules = named_modules(model)
    choice = Choice(modules, {"block": blocks, "norm": norms, "upsample": fold_upsample})
    found = choice.report
    weights = layout.choose(modules, memory_format, found)
    if strict and found.skipped:
        raise UnsupportedBlock(str(found))
    for name, module, adapter in choice.fused:
        found.replaced.append((name, type(module), tuple(adapter.sites(module))))
        swap.swap(module, adapter, recompute)
    for module, adapter in choice.counted:
        swap.swap(module, adapter, recompute)
    for module in choice.patched_before:
        module.__dict__[STATE].recompute = recompute
    layout.lay_out(weights, memory_format)
    return found


def unpatch(model: Any) -> None:
    """Gives every instance its former class back, and every weight its former strides; results are those of before
    ``patch``, to the bit.

    Raises:
        RuntimeError: for a module whose class something else has changed since (``fully_shard``).
    """
    for _, module in named_modules(model):
        if swap.is_swapped(module):
            swap.swap_back(module)
        layout.restore(module)


def is_patched(model: Any) -> bool:
    """Whether anything in ``model`` is patched."""
    return any(swap.is_swapped(module) or layout.is_laid_out(module) for _, module in named_modules(model))


@contextmanager
def patched(model: Any, **options: Any) -> Iterator[PatchReport]:
    """Patches ``model`` with :func:`patch`'s ``options``, and unpatches it at the end of the ``with``."""
    found = patch(model, **options)
    try:
        yield found
    finally:
        unpatch(model)
