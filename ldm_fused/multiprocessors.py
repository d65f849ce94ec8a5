"""How many multiprocessors of a GPU the CUDA kernels are planned for."""

import os
from typing import Optional

from .ops import _C


def limit_multiprocessors(limit: Optional[int]) -> Optional[int]:
    """Bounds how many multiprocessors CUDA kernels are planned for from now on, on all devices of this process.

    The largest groups are shared by a cooperative grid, which starts when every multiprocessor that it was planned for
    is free. Under DDP and FSDP, NCCL's kernels occupy some of them until another rank answers. The grid waits for them,
    and so does whatever waits for the grid. Kernels that are planned for fewer multiprocessors leave room for NCCL's.
    Results may differ in the last bits from those of another bound, because the order of sums does.

    Args:
        limit: at least 1: plans use at most so many multiprocessors; 0: all of them, but no grids, and what no block
            or cluster can hold takes two passes; None: no bound. The environment variable
            ``LDM_FUSED_MULTIPROCESSORS`` sets the first one.

    Returns:
        The bound until now.

    Raises:
        TypeError, ValueError: for anything else.
    """
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool)):
        raise TypeError(f"limit must be an int or None, got {limit!r}")
    if limit is not None and not 0 <= limit < 2**31:
        raise ValueError(f"limit must be at least 0 and below 2^31, got {limit}")
    before = _C.limit_multiprocessors(-1 if limit is None else limit)
    return None if before < 0 else before


if os.environ.get("LDM_FUSED_MULTIPROCESSORS"):
    try:
        limit_multiprocessors(int(os.environ["LDM_FUSED_MULTIPROCESSORS"]))
    except ValueError:
        raise ImportError(f"LDM_FUSED_MULTIPROCESSORS is '{os.environ['LDM_FUSED_MULTIPROCESSORS']}', and must be a "
                          f"number of multiprocessors, or 0.") from None
