"""Swapping an instance's class for a subclass that fuses it, and back; what the instance keeps."""

import copyreg
import weakref
from types import FunctionType
from typing import Any, Dict, List, Optional, Set, Tuple

import torch
from torch import Tensor, nn

from .. import bypass, readers
from ..decisions import decided
from .adapter import STATE, Adapter, sites
from .call import Call

# ---- What an instance keeps ----------------------------------------------------------------------------------------


class Site:
    """One norm at run time: its calls and its inputs' bytes, by the reason why it was not fused, or None."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls: Dict[Optional[str], int] = {}
        self.bytes: Dict[Optional[str], int] = {}

    def count(self, x: Optional[Tensor], reason: Optional[str]) -> None:
        """Counts a call. ``x`` is None where nobody saw it.

        Compiled code does not count: its guards would see the counter change, and compile anew in each call. Neither
        does a backward pass, which computes again what was counted.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._current_graph_task_id() != -1:
            return
        self.calls[reason] = self.calls.get(reason, 0) + 1
        self.bytes[reason] = self.bytes.get(reason, 0) + (0 if x is None else x.numel() * x.element_size())

    def __reduce__(self):
        return Site, (self.name,)  # a copy starts at zero


class State:
    """How an instance is fused."""

    def __init__(self, adapter: Adapter, module: nn.Module, recompute: bool) -> None:
        self.adapter = adapter
        self.sites = tuple(Site(name) for name in adapter.sites(module))
        self.recompute = recompute
        self.obstacle: Optional[str] = None  # one that only a call shows
        self.known = bypass.knowledge(module)
        # A class that defines how it is copied or pickled keeps its own way. Its copies are unpatched.
        cls = type(module)
        self.travels = (cls.__reduce__ is object.__reduce__ and cls.__reduce_ex__ is object.__reduce_ex__
                        or "_ldm_fused_original" in vars(cls))

    def __reduce__(self):
        if not self.travels:
            return dict, ()
        return _revived, (self.known, self.adapter, self.sites, self.recompute)


def _revived(known, adapter: Adapter, sites: Tuple[Site, ...], recompute: bool) -> State:
    """Makes the state of a copy or pickle, perhaps in a process that has not read the classes of its norms."""
    bypass.learn(known)
    state = State.__new__(State)
    state.adapter, state.sites, state.recompute, state.known = adapter, sites, recompute, known
    state.obstacle, state.travels = None, True
    return state


def count_unseen(module: nn.Module, reason: str) -> None:
    """Counts a call of each norm of a patched module that was not fused, where nobody saw the norms' inputs."""
    for site in sites(module):
        site.count(None, reason)


# ---- Classes -------------------------------------------------------------------------------------------------------

# A subclass lives as long as one of its instances.
_subclasses: "weakref.WeakValueDictionary[Tuple[type, Adapter], type]" = weakref.WeakValueDictionary()


def subclass(original: type, adapter: Adapter) -> type:
    """The subclass of ``original`` in which the adapter's forward replaces the method that it names.

    The same arguments give the same class. It has the original's name and pickles as the original, so that what looks
    classes up by name finds the original.
    """
    found = _subclasses.get((original, adapter))
    if found is None:
        method = adapter.method
        before = getattr(original, method)
        call = Call(before, adapter.forward)

        def runs_before(self):
            # Somebody who has replaced the class's forward wants it to run. An instance without state was made from a
            # patched one's class, as a slice of a Sequential is.
            return readers.off > 0 or getattr(original, method) is not before or STATE not in self.__dict__

        # torch.jit.script reads the source of ``before``, and looks its names up in these functions' globals and cells.
        # So the globals are those of ``before``, and the cells have names that no source has.
        _class, _method, _before, _call, _adapter = original, method, before, call, adapter
        _decided, _runs_before, _is_read, _count_unseen = decided, runs_before, readers.is_read, count_unseen

        def forward(self, *args, **kwargs):
            if _decided(_runs_before, self) or _is_read((*args, *kwargs.values())):
                return getattr(_class, _method)(self, *args, **kwargs)
            if _call.takes_all:
                return _adapter.forward(self, *args, **kwargs)
            bound = _call.bind(args, kwargs)
            if bound is None:
                _count_unseen(self, "it was called with other arguments")
                return _before(self, *args, **kwargs)
            return _adapter.forward(self, *bound)

        # Each class has a code object of its own: compilers limit how often they compile one.
        code = forward.__code__.replace(co_name=method)
        forward = FunctionType(code, getattr(before, "__globals__", globals()), method, None, forward.__closure__)

        def __reduce_ex__(self, protocol):
            make, args, *more = original.__reduce_ex__(self, max(protocol, 2))
            if make is copyreg.__newobj__ and args == (found,) and is_swapped(self) and self.__dict__[STATE].travels:
                return (_new, (original, adapter), *more)
            return (make, tuple(original if a is found else a for a in args), *more)  # an unpatched one

        forward.__qualname__ = f"{original.__qualname__}.{method}"
        forward.__doc__ = before.__doc__
        forward.__wrapped__ = before  # accelerate, for one, asks for signatures
        names = {method: forward, "__reduce_ex__": __reduce_ex__, "__module__": original.__module__,
                 "__qualname__": original.__qualname__, "__doc__": original.__doc__, "_ldm_fused_original": original}
        found = type(original)(original.__name__, (original,), names)
        _subclasses[original, adapter] = found
    return found


def _new(original: type, adapter: Adapter) -> nn.Module:
    cls = subclass(original, adapter)
    return cls.__new__(cls)


def original(cls: type) -> type:
    """The class that an instance of ``cls`` had before it was patched, whatever else has subclassed it since; ``cls``
    itself where nothing is patched."""
    for base in cls.__mro__:
        if "_ldm_fused_original" in base.__dict__:
            return base.__dict__["_ldm_fused_original"]
    return cls


def is_swapped(module: nn.Module) -> bool:
    """Whether it has a patched class, and the state that belongs to it."""
    return isinstance(module.__dict__.get(STATE), State) and original(type(module)) is not type(module)


def clean(module: nn.Module) -> None:
    """Removes what a copy has left of a patched module: a state without its class, or a class without its state."""
    if not is_swapped(module):
        module.__dict__.pop(STATE, None)
        if "_ldm_fused_original" in type(module).__dict__:
            module.__class__ = original(type(module))


def swap(module: nn.Module, adapter: Adapter, recompute: bool) -> None:
    module.__dict__[STATE] = State(adapter, module, recompute)
    for name, part in adapter.parts(module).items():
        child = module.get_submodule(name)
        if not is_swapped(child):  # it may be used in two places
            swap(child, part, recompute)
    module.__class__ = subclass(type(module), adapter)


def swap_back(module: nn.Module) -> None:
    """Gives a patched module its class back.

    Raises:
        RuntimeError: where something else has swapped the class since.
    """
    if "_ldm_fused_original" not in type(module).__dict__:
        raise RuntimeError(f"{type(module).__name__} cannot be unpatched: its class was changed after it was patched, "
                           "as fully_shard does")
    module.__class__ = original(type(module))
    del module.__dict__[STATE]


def as_before(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Runs the method that was taken over as it was before ``module`` was patched."""
    return getattr(original(type(module)), module.__dict__[STATE].adapter.method)(module, *args, **kwargs)


def named_modules(model: Any) -> List[Tuple[str, nn.Module]]:
    """All modules of a module or a pipeline, each once, by qualified name.

    Raises:
        TypeError: if ``model`` is neither a module nor holds one.
    """
    if isinstance(model, nn.Module):
        roots = {"": model}
    else:
        parts = getattr(model, "components", None)
        parts = parts if isinstance(parts, dict) else getattr(model, "__dict__", {})
        roots = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
        if not roots:
            raise TypeError(f"model must be a module or a pipeline that holds modules, got {type(model).__name__}")
    memo: Set[nn.Module] = set()
    return [found for name, root in roots.items() for found in root.named_modules(memo, prefix=name)]
