"""Comparisons of shapes that a compiler may read: lengths come first, since it takes each comparison of a size that it
does not know for a condition on it; and what it cannot know, as of ``x[mask]``, is not asked."""

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
