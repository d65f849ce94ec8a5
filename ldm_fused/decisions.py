"""Decisions at run time: each is made once a forward, and repeated where a checkpoint computes that forward again.

Between a forward and its recomputation in the backward pass hooks may come and go, ``disabled()`` may end, a profiler
may stop. PyTorch's checkpoint requires that both save the same tensors. So decisions are kept with the checkpoint's
frame, which is found in the hooks that it sets on saved tensors.
"""

import weakref
from typing import Any, Callable, Dict, List, Optional, Tuple, TypeVar

import torch

T = TypeVar("T")

_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignored: None)


class _Decisions:
    """The decisions of a checkpoint's frame in their order, and how many each recomputation has taken."""

    def __init__(self) -> None:
        self.made: List[Any] = []
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
    known = vars(frame).setdefault("_ldm_fused_decisions", _Decisions())
    if group is None:
        decision = decide(*args)
        known.made.append(decision)
        return decision
    i = known.taken.get(group, 0)
    known.taken[group] = i + 1
    return known.made[i] if i < len(known.made) else decide(*args)


def has_hooks() -> bool:
    """Whether hooks on saved tensors are set, as a checkpoint's are."""
    return _top_hooks(False) is not None


def _frame(pack_hook: Callable) -> Tuple[Optional[Any], Any]:
    """The frame of the non-reentrant checkpoint whose hook this is, and which recomputation; else (None, None)."""
    pack_hook = getattr(pack_hook, "_torchdynamo_orig_callable", pack_hook)
    if getattr(pack_hook, "__module__", None) != "torch.utils.checkpoint":
        return None, None
    cells = dict(zip(pack_hook.__code__.co_freevars, (cell.cell_contents for cell in pack_hook.__closure__ or ())))
    if "frame" in cells:
        return cells["frame"], None
    reference = cells.get("target_frame_ref")
    return (reference(), cells.get("gid")) if isinstance(reference, weakref.ref) else (None, None)
