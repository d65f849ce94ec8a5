"""Swapping an instance's class for a subclass that serves it, and back."""

import copyreg
import weakref
from types import FunctionType
from typing import Any, Tuple

from torch import nn

from ..route import decided
from . import site
from .adapter import Adapter
from .call import Call, has_proxy
from .site import STATE, State, is_disabled, state

# A class goes when its last instance does, and with it what it was made of.
_subclasses: "weakref.WeakValueDictionary[Tuple[type, Adapter], type]" = weakref.WeakValueDictionary()


def subclass(original: type, adapter: Adapter) -> type:
    """The subclass of ``original`` in which the adapter's forward takes the place of the method it names; always the
    same one. It goes by the original's name, so that what finds classes by name finds it, and pickles as the original.
    """
    found = _subclasses.get((original, adapter))
    if found is None:
        method = adapter.method
        before = getattr(original, method)
        call = Call(before, adapter.forward)

        def is_before(self):
            return is_disabled() or getattr(original, method) is not before or STATE not in self.__dict__

        def forward(self, *args, **kwargs):
            # A class's forward that was replaced is meant to be run; an instance without state is another's, made from
            # this one's class, as a slice of a Sequential.
            if decided(is_before, self) or has_proxy(args, kwargs):
                return getattr(original, method)(self, *args, **kwargs)
            if call.takes_all:
                return adapter.forward(self, *args, **kwargs)
            bound = call.bind(args, kwargs)
            if bound is None:
                site.count_unseen(self, "it was called with other arguments")
                return before(self, *args, **kwargs)
            return adapter.forward(self, *bound)

        # Code of its own: compilers keep what they compiled, and their limit of how often, by code object.
        code = forward.__code__.replace(co_name=method)
        forward = FunctionType(code, forward.__globals__, method, None, forward.__closure__)

        def __reduce_ex__(self, protocol):
            make, args, *more = original.__reduce_ex__(self, max(protocol, 2))
            if make is copyreg.__newobj__ and args == (found,) and is_swapped(self) and state(self).travels:
                return (_new, (original, adapter), *more)
            # A class with ways of its own, or what has no state: unpatched.
            return (make, tuple(original if a is found else a for a in args), *more)

        forward.__qualname__ = f"{original.__qualname__}.{method}"
        forward.__doc__ = before.__doc__
        forward.__wrapped__ = before  # signatures are asked for, by accelerate for one
        names = {method: forward, "__reduce_ex__": __reduce_ex__, "__module__": original.__module__,
                 "__qualname__": original.__qualname__, "__doc__": original.__doc__, "_ldm_fused_original": original}
        found = type(original)(original.__name__, (original,), names)
        _subclasses[original, adapter] = found
    return found


def _new(original: type, adapter: Adapter) -> nn.Module:
    cls = subclass(original, adapter)
    return cls.__new__(cls)


def original(cls: type) -> type:
    """The class that an instance of ``cls``, or of what something else has made of it since, had before it was patched;
    the same for all others."""
    for base in cls.__mro__:
        if "_ldm_fused_original" in base.__dict__:
            return base.__dict__["_ldm_fused_original"]
    return cls


def is_swapped(module: nn.Module) -> bool:
    """Whether it is served: it has a patched class, and the state that belongs to it."""
    return isinstance(module.__dict__.get(STATE), State) and original(type(module)) is not type(module)


def clean(module: nn.Module) -> None:
    """Takes away what a copy has left of a patched module: a state without its class, or a class without its state."""
    if not is_swapped(module):
        module.__dict__.pop(STATE, None)
        if "_ldm_fused_original" in type(module).__dict__:
            module.__class__ = original(type(module))


def swap(module: nn.Module, adapter: Adapter, recompute: bool) -> None:
    module.__dict__[STATE] = State(adapter, module, recompute)
    for name, part in adapter.parts(module).items():
        child = module.get_submodule(name)
        if not is_swapped(child):  # one that serves in two places
            swap(child, part, recompute)
    module.__class__ = subclass(type(module), adapter)


def swap_back(module: nn.Module) -> None:
    """
    Raises:
        RuntimeError: where something else has swapped the class since.
    """
    if "_ldm_fused_original" not in type(module).__dict__:
        raise RuntimeError(f"{type(module).__name__} cannot be unpatched: its class was changed after it was patched, "
                           "as fully_shard does")
    module.__class__ = original(type(module))
    del module.__dict__[STATE]


def as_before(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What a patched module's forward, or whichever method was taken over, computed before."""
    return getattr(original(type(module)), module.__dict__[STATE].adapter.method)(module, *args, **kwargs)
