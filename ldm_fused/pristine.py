"""Whether a module may be bypassed: only if calling it would do nothing but its class's own arithmetic.

Offloading libraries replace ``forward`` in the instance and leave parameters on ``meta``, LoRA wraps convolutions,
profilers hook modules. Where anything of the kind is found the module itself is called, and the result is right.
"""

from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

_FORWARD = {cls: cls.forward for cls in (nn.GroupNorm, nn.Conv2d, nn.Dropout, nn.Linear)}
_CALL = nn.Module._call_impl  # not __call__, which tracers replace to see each module


def why_not(module: nn.Module, cls: type, device: Optional[torch.device] = None) -> Optional[str]:
    """The reason why ``module`` must be called rather than bypassed as a plain ``cls``, or None.

    With ``device`` given, its parameters must be there.
    """
    if type(module) is not cls:
        return f"it is a {type(module).__name__}, not a plain {cls.__name__}"
    if cls.forward is not _FORWARD[cls] or cls._call_impl is not _CALL:
        return f"{cls.__name__}.forward is replaced"
    reason = why_not_instance(module)
    if reason is not None:
        return reason
    if (_module._global_forward_hooks or _module._global_forward_pre_hooks or _module._global_backward_hooks
            or _module._global_backward_pre_hooks):
        return "there are global module hooks"
    if device is not None:
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device != device:
                return f"its {name} is on {parameter.device} and the input on {device}"
    return None


def why_not_instance(module: nn.Module) -> Optional[str]:
    """The reason why calling ``module`` does more than its class's forward does, or None."""
    if "forward" in module.__dict__ or "_call_impl" in module.__dict__:
        return "its forward is replaced"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks"
    return None


def why_not_norm(norm: nn.GroupNorm, x: Tensor) -> Optional[str]:
    """The reason why ``norm(x)`` must be called as it is, or None where the fused op may compute it."""
    reason = why_not(norm, nn.GroupNorm, x.device)
    if reason is None and norm.weight is not None and norm.weight.dtype not in (x.dtype, torch.float32):
        reason = f"its weight is {norm.weight.dtype} and the input {x.dtype}"
    return reason
