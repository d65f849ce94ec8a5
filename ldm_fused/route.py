"""What is decided at run time is decided once a forward, and the same where a checkpoint computes it again.

Hooks come and go, ``disabled()`` ends, a profiler stops: between a forward and its recomputation in the backward pass.
PyTorch's checkpoint holds that both save the same tensors. So what was decided is kept with the checkpoint's frame,
which is found in the hooks on saved tensors that it sets.
"""

import weakref
from typing import Any, Callable, Dict, List, Optional, Tuple, TypeVar

import torch

T = TypeVar("T")

_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignored: None)


class _Route:
    """The decisions of a checkpoint's frame in their order, and how many each recomputation has taken."""

    def __init__(self) -> None:
        self.decisions: List[Any] = []
        self.taken: Dict[Any, int] = {}


def decided(decide: Callable[..., T], *args: Any) -> T:
    """``decide(*args)``, or in a checkpoint's recomputation what its forward decided here."""
    if torch.compiler.is_compiling():
        return decide(*args)
    hooks = _top_hooks(False)
    if hooks is None:
        return decide(*args)
    frame, group = _frame(hooks[0])
    if frame is None:
        return decide(*args)
    route = vars(frame).setdefault("_ldm_fused_route", _Route())
    if group is None:
        decision = decide(*args)
        route.decisions.append(decision)
        return decision
    i = route.taken.get(group, 0)
    route.taken[group] = i + 1
    return route.decisions[i] if i < len(route.decisions) else decide(*args)


def _frame(pack_hook: Callable) -> Tuple[Optional[Any], Any]:
    """The frame of a non-reentrant checkpoint whose hook this is, and of which recomputation; else (None, None)."""
    pack_hook = getattr(pack_hook, "_torchdynamo_orig_callable", pack_hook)
    if getattr(pack_hook, "__module__", None) != "torch.utils.checkpoint":
        return None, None
    cells = dict(zip(pack_hook.__code__.co_freevars, (cell.cell_contents for cell in pack_hook.__closure__ or ())))
    if "frame" in cells:
        return cells["frame"], None
    reference = cells.get("target_frame_ref")
    return (reference(), cells.get("gid")) if isinstance(reference, weakref.ref) else (None, None)
