"""The ops' CUDA kernels, run by the emulator on CPU tensors: the same signatures as ``torch.ops.ldm_fused``."""

import torch
from emulator import build


def _kernels():
    return build.load("bindings")


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _flat(t):
    """A dense tensor's elements in the order of its memory, as a numpy array; 16-bit types as int16."""
    t = t.detach().as_strided((t.numel(),), (1,))
    return (t.view(torch.int16) if t.element_size() == 2 else t).numpy()


def _sizes(x):
    return x.shape[0], x.shape[1], x[0, 0].numel()


def _poisoned(t):
    """Memory that no kernel has written: NaN, and a failed test wherever it is left."""
    return t.fill_(float("nan"))


def _parameters(x, tensors):
    return [None if t is None else (_flat(t.contiguous()), _name(t.dtype), x.shape[1] if t.dim() == 2 else 0)
            for t in tensors]


def group_norm_act(x, num_groups, weight, bias, eps, silu, pre_bias, scale, shift, out_dtype, *, multiprocessors=4):
    y = _poisoned(torch.empty_like(x, dtype=out_dtype or x.dtype))
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, rstd = (_poisoned(torch.empty(x.shape[0], num_groups, dtype=statistics)) for _ in range(2))
    _kernels().forward(_flat(x), _flat(y), _flat(mean), _flat(rstd), _sizes(x), num_groups, not x.is_contiguous(),
                       _name(x.dtype), _name(y.dtype), _parameters(x, (weight, bias, pre_bias, scale, shift)), eps,
                       silu, multiprocessors)
    return y, mean, rstd


def group_norm_act_backward(dy, x, mean, rstd, weight, bias, silu, pre_bias, scale, shift, output_mask, *,
                            multiprocessors=4):
    parameters = (weight, bias, pre_bias, scale, shift)
    dx = _poisoned(torch.empty_like(x)) if output_mask[0] else None
    gradients = [_poisoned(torch.empty(t.shape, dtype=t.dtype)) if t is not None and wanted else None
                 for t, wanted in zip(parameters, output_mask[1:])]
    dy = torch.empty_like(x, dtype=dy.dtype).copy_(dy)  # the order that x has in memory
    _kernels().backward(_flat(dy), _flat(x), _flat(mean), _flat(rstd), None if dx is None else _flat(dx), _sizes(x),
                        mean.shape[1], not x.is_contiguous(), _name(x.dtype), _name(dy.dtype),
                        _parameters(x, parameters), _parameters(x, gradients), silu, multiprocessors)
    return dx, *gradients


def set_order(order, seed=0):
    """The order in which the threads of a block run: "forward", "reverse" or "random"."""
    _kernels().set_order(order, seed)


def plan_forward(x, num_groups, *, out_dtype=None, aligned=True, multiprocessors=4):
    return _kernels().plan_forward(_sizes(x), num_groups, not x.is_contiguous(), _name(x.dtype),
                                   _name(out_dtype or x.dtype), aligned, multiprocessors)


def plan_backward(x, num_groups, *, dy_dtype=None, aligned=True, sums=2, multiprocessors=4):
    return _kernels().plan_backward(_sizes(x), num_groups, not x.is_contiguous(), _name(x.dtype),
                                    _name(dy_dtype or x.dtype), aligned, sums, multiprocessors)
