"""The float64 oracle, and the one place where tolerances stand.

Errors are measured against the reference in float64 and judged by the errors that PyTorch's own ops make in that dtype
on the same input. Root mean squares: at most twice eager's plus one unit in the last place of the root mean square
result. Largest errors, which among a few hundred roundings are a matter of luck: at most four times eager's plus four
units of the largest result, which is what catches single wrong elements. For the gradients of parameters, which are
long sums, the unit is that of the sum of the magnitudes added up. The oracle is no better than float64 results, so
these get a thousand units.
"""

from dataclasses import dataclass, replace
from typing import Optional

import torch
from torch import Tensor

from ldm_fused import reference

#               times eager's, units
ROOT_MEAN_SQUARE = (2, 1)
LARGEST = (4, 4)
FLOAT64_UNITS = 1000

GRADIENTS = ("x", "weight", "bias", "pre_bias", "scale", "shift")


@dataclass(frozen=True)
class Case:
    """Arguments of the op and the gradient of its output."""

    x: Tensor
    num_groups: int
    dy: Tensor
    weight: Optional[Tensor] = None
    bias: Optional[Tensor] = None
    eps: float = 1e-5
    silu: bool = True
    pre_bias: Optional[Tensor] = None
    scale: Optional[Tensor] = None
    shift: Optional[Tensor] = None
    out_dtype: Optional[torch.dtype] = None

    def arguments(self):
        """In the order of the op's schema."""
        return (self.x, self.num_groups, self.weight, self.bias, self.eps, self.silu, self.pre_bias, self.scale,
                self.shift, self.out_dtype)

    def to(self, target):
        """Tensors of another dtype, or on another device."""
        tensors = {name: t.to(target) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **tensors)


LAYOUTS = {"contiguous": None, "channels_last": {4: torch.channels_last, 5: torch.channels_last_3d}}


def laid_out(x, layout):
    """x in that layout, or None where it has none of the kind: channels_last needs axes behind the channels."""
    if layout == "contiguous":
        return x.contiguous()
    memory_format = LAYOUTS[layout].get(x.dim())
    if memory_format is None:  # PyTorch has no name for it
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else None
    return x.contiguous(memory_format=memory_format)


def make_case(shape, num_groups, dtype=torch.float32, layout="contiguous", *, seed=0, options=GRADIENTS[1:],
              parameter_dtype=None, out_dtype=None, mean=1.0, device="cpu", **constants):
    """A case of fresh random data with the named optional parameters; None where the layout does not exist."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64, device=device)

    batch, channels = shape[:2]
    x = laid_out((random(*shape) * 1.5 + mean).to(dtype), layout)
    if x is None:
        return None
    sizes = {"weight": (channels,), "bias": (channels,), "pre_bias": (batch, channels), "scale": (batch, channels),
             "shift": (batch, channels)}
    tensors = {name: (random(*sizes[name]) * 0.5).to(parameter_dtype or dtype) for name in options}
    dy = laid_out(random(*shape).to(out_dtype or dtype), layout)
    return Case(x, num_groups, dy, out_dtype=out_dtype, **tensors, **constants)


def composed(case, dtype):
    """Output and gradients of the reference computed in ``dtype``: {"y": ..., "x": dx, "weight": dweight, ...}."""
    leaves = {name: getattr(case, name).detach().to(dtype).requires_grad_()
              for name in GRADIENTS if getattr(case, name) is not None}
    weight = leaves.get("weight")
    if weight is None and case.bias is not None:  # F.group_norm's own backward fails on a bias without a weight
        weight = torch.ones_like(leaves["bias"]).detach()
    y = reference.group_norm_act(leaves["x"], case.num_groups, weight, leaves.get("bias"), case.eps,
                                 activation="silu" if case.silu else None,
                                 **{name: leaves.get(name) for name in ("pre_bias", "scale", "shift")})
    gradients = torch.autograd.grad(y, list(leaves.values()), case.dy.to(dtype))
    return {"y": y.detach(), **dict(zip(leaves, gradients))}


def oracle(case):
    return composed(case, torch.float64)


def eager(case):
    """What PyTorch's ops give, computed in float32 where the output is float32, else in x's dtype; rounded as ours."""
    results = composed(case, torch.float32 if case.out_dtype == torch.float32 else case.x.dtype)
    dtype = {name: getattr(case, name).dtype for name in results if name != "y"}
    return {name: result.to(dtype.get(name, case.out_dtype or case.x.dtype)) for name, result in results.items()}


def with_shortcut(case, shortcut):
    """What the oracle and eager give where ``shortcut`` is the shortcut's gradient."""
    results = oracle(case), eager(case)
    for named in results:
        named["x"] = named["x"] + shortcut.to(named["x"])
    return results


def assert_within_bound(case, results, expected=None, baseline=None):
    """``results`` as of :func:`composed` are within the bound of this module's docstring, shape and dtype are right."""
    expected, baseline = expected or oracle(case), baseline or eager(case)
    assert set(results) <= set(expected)
    for name, result in results.items():
        exact, dtype = expected[name], baseline[name].dtype
        assert result.dtype == dtype and result.shape == exact.shape, name
        unit = torch.finfo(dtype).eps * (FLOAT64_UNITS if dtype == torch.float64 else 1)
        error, eager_error = (_error(r, exact) for r in (result, baseline[name]))
        for measure, (times, units) in ((_root_mean_square, ROOT_MEAN_SQUARE), (_largest, LARGEST)):
            magnitude = measure(exact) if name in ("y", "x") else _sum_of_magnitudes(case)
            found, bound = measure(error), times * measure(eager_error) + units * unit * magnitude
            assert found <= bound, f"{name}: {measure.__name__} error {found:.3g} is above {bound:.3g}"


def _error(result, exact):
    return result.detach().to(exact.device).double() - exact


def _root_mean_square(t):
    return t.square().mean().sqrt().item() if t.numel() else 0.0


def _largest(t):
    return t.abs().max().item() if t.numel() else 0.0


def _sum_of_magnitudes(case):
    """The most that is added up, in magnitude, for the gradient of one parameter: |dy| (1 + |normalized x|) * gain."""
    x = case.x.double()
    grouped = x.reshape(x.shape[0], case.num_groups, -1)
    normalized = ((grouped - grouped.mean(-1, keepdim=True)) / (grouped.std(-1, keepdim=True) + 1e-30)).reshape(x.shape)
    terms = case.dy.double().abs() * (1 + normalized.abs())
    gain = 1 if case.scale is None else 1 + case.scale.double().abs().max()
    return gain * terms.reshape(*x.shape[:2], -1).sum(dim=(0, 2)).max().item()
