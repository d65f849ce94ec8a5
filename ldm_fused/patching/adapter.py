"""Adapters, which say how ``patch`` fuses the instances of a class, and the registry of users' own."""

import sys
from types import ModuleType
from typing import Any, Dict, Hashable, List, Optional, Sequence, Tuple

from torch import Tensor, nn

from .. import bypass
from ..resnet_block import Stage, resnet

__all__ = ["Adapter", "Block", "register_block", "register_norm"]

STATE = "_ldm_fused"
"""The one attribute that ``patch`` puts on an instance: its :class:`ldm_fused.patching.swap.State`."""


def sites(module: nn.Module) -> Tuple[Any, ...]:
    """A :class:`ldm_fused.patching.swap.Site` for each norm of a patched module, in its adapter's order."""
    return module.__dict__[STATE].sites


class Adapter:
    """How the instances of one class, and of no subclass, are fused. An adapter has no state: classes may share it.

    :func:`ldm_fused.patch` asks for the :meth:`obstacle` of each instance and tries :meth:`forward` against the class's
    own on a small copy with random weights, forward and backward. Then it swaps the instance's class for a subclass in
    which ``method`` is :meth:`forward`. This takes as many of the class's first arguments as it names. Where another
    argument is not its default, the class's own method runs.

    A class whose forward is the formula of a block needs no adapter. :class:`Block` has an example. An adapter of
    anything but a block of two norms calls :func:`ldm_fused.resnet_block.norm_swish` with the ``count`` of one of its
    :func:`sites`: it fuses a norm or calls it, and counts which.
    """

    method = "forward"
    """The method that is taken over."""

    kind = "block"
    """``"block"``, ``"norm"`` or ``"upsample"``: which option of :func:`ldm_fused.patch` decides on it."""

    is_container = False
    """Whether the class only holds parts: ``patch`` then reports nothing of its subclasses."""

    def obstacle(self, module: nn.Module) -> Optional[str]:
        """The reason why this instance cannot be fused, or None. ``patch`` asks once."""
        return None

    def sites(self, module: nn.Module) -> Sequence[str]:
        """The names of its norms, as ``module.get_submodule`` takes them."""
        raise NotImplementedError

    def parts(self, module: nn.Module) -> Dict[str, "Adapter"]:
        """Submodules whose classes are swapped too, by name."""
        return {}

    def variant(self, module: nn.Module) -> Hashable:
        """Whatever makes the class's forward differ between instances, sizes aside. One of each variant is tried."""
        simple = (bool, int, float, str, type(None))
        attributes = tuple((k, v) for k, v in sorted(vars(module).items())
                           if k[0] != "_" and k != "training" and isinstance(v, simple))
        return attributes, tuple(sorted((name, type(child)) for name, child in module._modules.items()))

    def example(self, module: nn.Module) -> Optional[Tuple[Any, ...]]:
        """Arguments for the trial: small, float64, on the CPU; None for no trial, where nothing can differ."""
        raise NotImplementedError

    def examples(self, module: nn.Module) -> List[Tuple[Any, ...]]:
        """The arguments of every trial, where the module can be called in several ways."""
        example = self.example(module)
        return [] if example is None else [example]

    def forward(self, module: nn.Module, *args, **kwargs):
        """What the class's ``method`` computes, with its signature."""
        raise NotImplementedError

    def __eq__(self, other) -> bool:  # a pickled one comes back as another object
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(type(self))


class Block(Adapter):
    """An adapter for blocks of norm, swish, convolution, twice. One for a class of your own would be::

        class MyBlock(ldm_fused.patching.Block):
            def example(self, block):
                return (torch.randn(2, block.norm1.num_channels, 6, 4),)

            def forward(self, block, x):
                return self.resnet(block, x, norm1=block.norm1, conv1=block.conv1, norm2=block.norm2, conv2=block.conv2)

        ldm_fused.register_block(my_code.Block, MyBlock())
    """

    def sites(self, block: nn.Module) -> Sequence[str]:
        return "norm1", "norm2"

    def resnet(self, block: nn.Module, x: Tensor, *, norm1: nn.Module, conv1: nn.Module, norm2: nn.Module,
               conv2: nn.Module, act1: Optional[nn.Module] = None, act2: Optional[nn.Module] = None,
               modulate1: Optional[Dict[str, Any]] = None, modulate2: Optional[Dict[str, Any]] = None,
               recompute: bool = False, **options: Any) -> Tensor:
        """:func:`ldm_fused.resnet_block.resnet`, which counts at ``block``'s first two sites, and recomputes where
        ``patch`` or the block itself asks for it. ``modulate1`` and ``modulate2`` are ``scale``, ``shift`` and
        ``called`` of the two stages."""
        first, second = sites(block)[:2]
        return resnet(x, Stage(norm1, conv1, act1, count=first.count, **modulate1 or {}),
                      Stage(norm2, conv2, act2, count=second.count, **modulate2 or {}),
                      recompute=recompute or block.__dict__[STATE].recompute, **options)


def channels(norm: nn.Module) -> int:
    """How many channels a norm has, or whatever stands in its place."""
    return getattr(norm, "num_channels", None) or next(p.shape[0] for p in norm.parameters())


registered: Dict[type, Adapter] = {}
norms: Dict[type, bypass.Norm] = {}


def register_block(cls: type, adapter: Adapter) -> None:
    """From now on ``patch`` fuses the instances of ``cls``, not of its subclasses, by ``adapter``.

    Raises:
        TypeError: for a ``cls`` that is no class of modules, or an adapter that is no :class:`Adapter`.
    """
    _check_class(cls)
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter must be an instance of ldm_fused.Adapter, got {adapter!r}")
    registered[cls] = adapter


def register_norm(cls: type, *, keeps_dtype: bool = False, activated: bool = False) -> None:
    """From now on ``patch`` fuses the instances of ``cls``, not of its subclasses, as GroupNorms with the attributes
    ``num_groups``, ``weight``, ``bias`` and ``eps``, alone and in blocks. A class whose forward can be read needs none.

    Args:
        keeps_dtype: it gives the input's dtype under CUDA autocast, too, where ``nn.GroupNorm`` gives float32.
        activated: it gives swish of what it has normalized.

    Raises:
        TypeError: for a ``cls`` that is no class of modules.
    """
    _check_class(cls)
    norms[cls] = bypass.Norm(keeps_dtype=keeps_dtype, activated=activated)


def _check_class(cls: Any) -> None:
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls must be a subclass of nn.Module, got {cls!r}")


def imported(path: str) -> Optional[type]:
    """The class of modules at ``path``, such as "torch.nn.modules.Linear", if its file has been imported; else None."""
    parts = path.split(".")
    for i in range(len(parts) - 1, 0, -1):
        found = sys.modules.get(".".join(parts[:i]))
        if found is not None:
            for name in parts[i:]:  # getattr would make a lazy module import what nobody asked for
                found = vars(found).get(name) if isinstance(found, ModuleType) else getattr(found, name, None)
            return found if isinstance(found, type) and issubclass(found, nn.Module) else None
    return None
