"""Whether a module may be bypassed: only if calling it would do nothing but its class's own arithmetic.

Offloading libraries replace ``forward`` in the instance and leave parameters on ``meta``, LoRA wraps convolutions,
profilers hook modules. Where anything of the kind is found the module itself is called, and the result is right.

A function named ``..._obstacle`` looks at what its name says, and gives the reason why that must not be fused, or None.
The adapters' ``obstacle`` does so for one instance before it is patched, and ``call_obstacle`` for one call of it.
"""

from typing import Any, Callable, Dict, Iterable, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from . import functional, readers

_CALL = nn.Module._call_impl  # not __call__, which tracers replace to see each module


def no_obstacle(module: nn.Module) -> Optional[str]:
    """Gives no reason: for a class whose instances are fused whatever their attributes are."""
    return None


ObstacleOf = Callable[[nn.Module], Optional[str]]  # gives the obstacle that an instance's attributes are, or None


class Norm(NamedTuple):
    """What is known of a class of norms that the fused op computes."""

    keeps_dtype: bool = False  # gives the input's dtype, also under CUDA autocast, where nn.GroupNorm gives float32
    obstacle: ObstacleOf = no_obstacle
    activated: bool = False  # gives swish of what it has normalized


Known = Union[Norm, Callable[[nn.Module], Optional[Norm]]]  # of a class, or asked of each instance

_FORWARD: Dict[type, Optional[Callable]] = {}
_NORMS: Dict[type, Known] = {}
_ACTIVATIONS = {nn.SiLU}
_CONVOLUTIONS: Dict[type, Tuple[ObstacleOf, Callable]] = {}  # with the class's _conv_forward


def know(cls: type) -> None:
    """From now on ``cls``, with the forward of the file that defines it, may be bypassed by whoever knows what it
    computes."""
    file = getattr(cls.forward, "__globals__", {}).get("__name__")
    definer = next((c for c in cls.__mro__ if "forward" in vars(c)), cls)
    # If its forward comes from another file, somebody has replaced it already.
    _FORWARD.setdefault(cls, cls.forward if file == definer.__module__ else None)


def know_norm(cls: type, norm: Known) -> None:
    know(cls)
    _NORMS.setdefault(cls, norm)


def forget_norm(cls: type) -> None:
    """``cls`` turned out to compute something else."""
    _NORMS.pop(cls, None)


def know_activation(cls: type) -> None:
    """``cls`` computes swish."""
    know(cls)
    _ACTIVATIONS.add(cls)


def know_convolution(cls: type, obstacle: ObstacleOf = no_obstacle) -> None:
    """``cls`` adds its bias to what it computes without it, unless ``obstacle`` gives a reason."""
    know(cls)
    _CONVOLUTIONS.setdefault(cls, (obstacle, cls._conv_forward))


def knowledge(module: nn.Module) -> Tuple[Tuple[Any, ...], ...]:
    """What is known of the classes of norms, activations and convolutions in ``module`` that are not PyTorch's own, for
    :func:`learn` in another process."""
    classes = {type(part) for part in module.modules() if not type(part).__module__.startswith("torch.")}
    return (*((know_norm, cls, _NORMS[cls]) for cls in classes & _NORMS.keys()),
            *((know_activation, cls) for cls in classes & _ACTIVATIONS),
            *((know_convolution, cls, _CONVOLUTIONS[cls][0]) for cls in classes & _CONVOLUTIONS.keys()))


def learn(known: Iterable[Tuple[Any, ...]]) -> None:
    for remember, cls, *what in known:
        remember(cls, *what)


for _cls in (nn.Dropout, nn.Identity, nn.Linear, nn.SiLU, nn.Sequential, nn.Upsample):
    know(_cls)
for _cls in (nn.Conv2d, nn.Conv3d, nn.Conv1d):
    know_convolution(_cls)
know_norm(nn.GroupNorm, Norm())


def known_norm(norm: nn.Module, cls: Optional[type] = None) -> Optional[Norm]:
    """What is known of a norm, or None. With ``cls`` given, the norm counts as an instance of that."""
    known = _NORMS.get(cls or type(norm))
    return known if known is None or isinstance(known, Norm) else known(norm)


def is_swish(function: Callable[[Tensor], Tensor]) -> bool:
    x = torch.linspace(-4, 4, 9, dtype=torch.float64, device="cpu")
    y = function(x.clone())
    return isinstance(y, Tensor) and torch.allclose(y, x * torch.sigmoid(x), rtol=1e-12)


def is_activation(module: nn.Module) -> bool:
    return type(module) in _ACTIVATIONS


def module_obstacle(module: nn.Module, cls: type, device: Optional[torch.device] = None) -> Optional[str]:
    """Looks at everything of ``module`` that may differ from a plain ``cls``.

    With ``device`` given, its parameters must be there.
    """
    if type(module) is not cls:
        return f"it is a {type(module).__name__}, not a plain {cls.__name__}"
    reason = class_obstacle(cls) or hooks_obstacle(module)
    if reason is not None:
        return reason
    if device is not None:
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if type(parameter) is not nn.Parameter and readers.have_functions((parameter,)):
                return f"its {name} is a {type(parameter).__name__}, which may know PyTorch's functions only"
            if parameter.device != device:
                return f"its {name} is on {parameter.device} and the input on {device}"
    return None


def class_obstacle(cls: type) -> Optional[str]:
    """Looks at whether somebody has replaced the forward that all instances of ``cls`` share."""
    if cls.forward is not _FORWARD[cls] or cls._call_impl is not _CALL:
        return f"{cls.__name__}.forward is replaced"
    if issubclass(cls, nn.GroupNorm) and nn.GroupNorm.forward is not _FORWARD[nn.GroupNorm]:
        return "GroupNorm.forward is replaced"  # a subclass's own forward calls it
    return None


def hooks_obstacle(module: nn.Module) -> Optional[str]:
    """Looks at what a call of ``module`` runs beside its class's forward: hooks of its own and global ones."""
    reason = instance_obstacle(module)
    if reason is None and (_module._global_forward_hooks or _module._global_forward_pre_hooks
                           or _module._global_backward_hooks or _module._global_backward_pre_hooks):
        reason = "there are global module hooks"
    return reason


def instance_obstacle(module: nn.Module) -> Optional[str]:
    """Looks at hooks and a replaced forward of ``module`` itself."""
    if "forward" in module.__dict__ or "_call_impl" in module.__dict__:
        return "its forward is replaced"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks"
    return None


def norm_obstacle(norm: nn.Module, x: Tensor) -> Optional[str]:
    """Looks at everything that decides whether the fused op may compute ``norm(x)``."""
    cls = type(norm) if type(norm) in _NORMS else nn.GroupNorm
    reason = module_obstacle(norm, cls, x.device)
    if reason is not None:
        return reason
    known = known_norm(norm)
    if known is None:
        return "its attributes have changed since it was read"
    return weight_obstacle(norm, x) or known.obstacle(norm)


def activation_obstacle(act: nn.Module) -> Optional[str]:
    """Looks at whether ``act`` is a module that computes swish, and nothing else."""
    return module_obstacle(act, type(act) if type(act) in _ACTIVATIONS else nn.SiLU)


def is_plain_convolution(conv: Optional[nn.Module], device: Optional[torch.device] = None) -> bool:
    """Whether ``conv(x)`` is now ``conv._conv_forward(x, conv.weight, None)`` and its bias."""
    return convolution_obstacle(conv, device) is None


def convolution_obstacle(conv: Optional[nn.Module], device: Optional[torch.device] = None) -> Optional[str]:
    """Looks at everything that decides whether ``conv`` is a convolution that may be bypassed."""
    cls = type(conv)
    if cls not in _CONVOLUTIONS:
        return f"it is a {cls.__name__}, no convolution that is known"
    obstacle, conv_forward = _CONVOLUTIONS[cls]
    reason = module_obstacle(conv, cls, device) or obstacle(conv)
    if reason is not None:
        return reason
    if cls._conv_forward is not conv_forward or "_conv_forward" in conv.__dict__:
        return "its _conv_forward is replaced"
    bases = (base for base in cls.__mro__ if base in _CONVOLUTIONS)  # whose forward it calls
    return next((reason for reason in map(class_obstacle, bases) if reason is not None), None)


def weight_obstacle(norm: nn.Module, x: Tensor) -> Optional[str]:
    """Looks at whether the fused op takes the dtype and device of ``norm``'s weight beside ``x``."""
    weight = getattr(norm, "weight", None)
    if weight is None:
        return None
    if type(weight) is not nn.Parameter and readers.have_functions((weight,)):
        return f"its weight is a {type(weight).__name__}, which may know PyTorch's functions only"
    if not functional.takes_beside(weight.dtype, x.dtype):
        return f"its weight is {weight.dtype} and the input {x.dtype}"
    if weight.device != x.device:
        return f"its weight is on {weight.device} and the input on {x.device}"
    return None
