"""The ops on DTensors: each process runs the op on its part of x, and gets its part of the result.

A GroupNorm needs whole groups of whole samples: x may be cut along the batch, and along the channels between groups.
:func:`ldm_fused.bias_add_residual` takes any cut. Tensors that are placed otherwise are redistributed first. The other
arguments follow x. A vector of the channels is cut where x's channels are; where x is cut along another axis, each
process has a part of the sum that is its gradient.

Shards may be uneven or empty. A process whose part is empty runs the op too, for the others wait for its gradients.
"""

from typing import Any, Callable, List, Sequence, Tuple, Union

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from . import ops

AnyArguments = Union[ops.Arguments, ops.ResidualArguments]


def takes(a: AnyArguments) -> bool:
    """Whether all of the tensors lie on one mesh that this process is part of."""
    tensors = [t for t in a if isinstance(t, Tensor)]
    if not all(isinstance(t, DTensor) for t in tensors):
        return False
    mesh = a.x.device_mesh
    return all(t.device_mesh == mesh for t in tensors) and mesh.get_coordinate() is not None


def by_parts(op: Callable[[AnyArguments], Any], a: AnyArguments) -> Any:
    """``op(a)``, a tensor or several of x's shape, by ``op`` of this process's part of each argument."""
    is_norm = isinstance(a, ops.Arguments)
    placements = whole_groups(a.x, a.num_groups) if is_norm else same_cuts(a.x, a.residual)
    parts = a._replace(**{name: _part(t, placements) for name, t in zip(a._fields, a) if isinstance(t, Tensor)})
    if is_norm:
        channels = parts.x.shape[1]
        parts = parts._replace(num_groups=a.num_groups * channels // a.x.shape[1] if channels else 1)
    results = op(parts)
    if isinstance(results, tuple):
        return tuple(_whole(y, a.x, placements) for y in results)
    return _whole(results, a.x, placements)


def whole_groups(x: DTensor, num_groups: int) -> Tuple[Placement, ...]:
    """The placements nearest to x's that leave each group of each sample to one process, by axis of the mesh."""
    placements: List[Placement] = []
    group, sizes = x.shape[1] // num_groups, {x.shape[1]}  # of the channels that processes have
    for placement, processes in zip(x.placements, x.device_mesh.shape):
        if _is_cut(placement, 1):
            chunks = {size: -(-size // processes) for size in sizes}
            if all(chunk == size or chunk % group == 0 for size, chunk in chunks.items()):
                sizes = {max(0, min(chunk, size - i * chunk)) for size, chunk in chunks.items()
                         for i in range(processes)}
                placements.append(placement)
                continue
        placements.append(placement if _is_cut(placement, 0) else Replicate())
    return tuple(placements)


def same_cuts(x: DTensor, residual: DTensor) -> Tuple[Placement, ...]:
    """Placements for both: x's cuts, and the residual's where x has none, by axis of the mesh."""
    return tuple(next((p for p in both if _is_cut(p)), Replicate()) for both in zip(x.placements, residual.placements))


def _is_cut(placement: Placement, axis: Union[int, None] = None) -> bool:
    """Whether a tensor is cut, along ``axis`` if that is given, into chunks that follow each other."""
    return type(placement) is Shard and axis in (None, placement.dim)


def _part(t: DTensor, placements: Sequence[Placement]) -> Tensor:
    """This process's part of an argument where x has ``placements``."""
    gradient = placements
    if t.dim() == 1:
        gradient = tuple(Shard(0) if _is_cut(p, 1) else Partial() if _is_cut(p) else Replicate() for p in placements)
        placements = tuple(p if _is_cut(p) else Replicate() for p in gradient)
    if t.placements != placements:
        t = t.redistribute(placements=placements)
    return t.to_local(grad_placements=gradient)


def _whole(y: Tensor, x: DTensor, placements: Sequence[Placement]) -> DTensor:
    """The tensor of x's shape, and in the memory format that the op gives it, of which each process has a part ``y``.
    """
    format_of = torch.empty_strided(x.shape, x.stride(), device="meta")
    if not ops.is_channels_last(format_of):
        format_of = format_of.contiguous()
    y = DTensor.from_local(y, x.device_mesh, placements, shape=x.shape, stride=format_of.stride())
    # A gradient that is placed otherwise is redistributed here, for what from_local does is not differentiable.
    return y.redistribute(placements=placements)
