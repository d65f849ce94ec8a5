"""Compares shapes without making a compiler specialise.

A compiler takes a comparison with an unknown size for a condition on that size. So lengths are compared first. A size
that nothing tells before run time, as that of ``x[mask]``, counts as neither the same nor another.
"""

from typing import Sequence

import torch


def are_same(found: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether two shapes are known to be the same."""
    if not torch.compiler.is_compiling():
        return found == expected
    if len(found) != len(expected):
        return False
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # imports sympy

    return all(guard_or_false(a == b) for a, b in zip(found, expected))


def differ(found: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether two shapes are known to differ."""
    if not torch.compiler.is_compiling():
        return found != expected
    if len(found) != len(expected):
        return True
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # imports sympy

    return any(guard_or_false(a != b) for a, b in zip(found, expected))
