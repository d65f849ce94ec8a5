"""The fused ops: :func:`group_norm_act`, :func:`group_norm_silu` and :func:`bias_add_residual`."""

import math
import numbers
import operator
import warnings
from functools import partial
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import ops, readers, reference, sharded, sizes
from .decisions import decided, has_hooks

__all__ = ["bias_add_residual", "group_norm_act", "group_norm_silu"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_CASTABLE = (torch.float32, torch.float16, torch.bfloat16)  # autocast leaves float64 alone
_ACTIVATIONS = {"silu": True, "swish": True, None: False}
_KERNEL_DEVICES = frozenset({"cpu", "meta", "cuda"} if ops.HAS_CUDA else {"cpu", "meta"})
# Dropout's kernels decide by 16 bits an element: probabilities nearer to 0 or 1 than this would be met too coarsely.
_LEAST_DROPOUT = 2.0**-8
# Elements from which a kernel's time counts more than what its call costs.
_LEAST_HANDED_OVER = 2**17
_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_warned = set()  # device types


def group_norm_silu(
    x: Tensor, num_groups: int, weight: Optional[Tensor] = None, bias: Optional[Tensor] = None, eps: float = 1e-5
) -> Tensor:
    """``silu(group_norm(x))`` in one op: ``F.silu(F.group_norm(x, num_groups, weight, bias, eps))``.

    Args:
        x: (N, C, \\*), any number of trailing axes; float32, float16, bfloat16 or float64. Contiguous tensors and
            those with their channels innermost (channels_last) are used as they are, others are made contiguous.
        num_groups: groups that the C channels are divided into.
        weight: (C,), in x's dtype, or float32 with a 16-bit x.
        bias: (C,), in weight's dtype.
        eps: added to the variance.

    Returns:
        A new tensor of x's shape and memory format, in the dtype that ``F.group_norm`` gives: x's, or float32 under
        CUDA autocast. Arithmetic and statistics are in float32 (float64 for float64) and rounded once.

    Raises:
        RuntimeError, ValueError, TypeError, NotImplementedError: what ``F.group_norm`` refuses is refused, with the
            same type of exception; ``num_groups`` below 1 is a ValueError.

    Source: GroupNorm, Wu and He 2018 (arXiv:1803.08494); SiLU, Elfwing et al. 2017 (arXiv:1702.03118).
    """
    return group_norm_act(x, num_groups, weight, bias, eps)


def group_norm_act(
    x: Tensor,
    num_groups: int,
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    eps: float = 1e-5,
    *,
    activation: Optional[str] = "silu",
    pre_bias: Optional[Tensor] = None,
    scale: Optional[Tensor] = None,
    shift: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    group=None,
) -> Tensor:
    """``dropout(act(group_norm(x + pre_bias) * (1 + scale) + shift))``.

    Args:
        x, num_groups, weight, bias, eps: as in :func:`group_norm_silu`.
        activation: "silu", its other name "swish", or None.
        pre_bias: (C,) or (N, C), added to x before the statistics: a convolution's bias, a time embedding.
        scale, shift: (N, C), adaptive GroupNorm; either may stand alone.
            ``pre_bias``, ``scale`` and ``shift`` are each in x's dtype, or float32 with a 16-bit x.
        dropout_p: probability of zeroing an element after the activation, by a mask drawn at each call, as
            ``F.dropout(training=True)`` does. From 2^-8 to 1 - 2^-8 the kernels meet it to within 2^-17. Their mask is
            a function of a seed and of each element's place in memory, so the backward pass needs only the seed. The
            seed is drawn from the generator of x's device: ``torch.manual_seed`` repeats the mask, which is another
            than ``F.dropout`` draws. Source of the mask's generator: Philox4x32-10, Salmon et al. 2011.
        group: a ``torch.distributed`` process group, over whose ranks a tensor's trailing axes are cut: x is this
            rank's part, of any size or empty, and each group is normalized over all parts (docs/data_parallel.md).
            All ranks must call it, with the same N and C and the same need of gradients.

    Returns and raises: as :func:`group_norm_silu`; ValueError for an unknown activation or a ``dropout_p`` outside
    of 0 to 1.
    """
    tensors = (x, weight, bias, pre_bias, scale, shift)
    if has_torch_function(tensors):
        if group is None and readers.have_functions(tensors):
            y = ops.formula(x, num_groups, weight, bias, eps, activation is not None, pre_bias, scale, shift)
            return F.dropout(y, dropout_p) if dropout_p else y
        return handle_torch_function(group_norm_act, tensors, x, num_groups, weight, bias, eps, activation=activation,
                                     pre_bias=pre_bias, scale=scale, shift=shift, dropout_p=dropout_p, group=group)
    if group is None and pre_bias is None and scale is None and shift is None and dropout_p == 0.0:
        y = _plain(x, num_groups, weight, bias, eps, activation)
        if y is not None:
            return y
    out_dtype = autocast_dtype(x)
    if out_dtype is not None:
        weight, bias = castable(weight, x), castable(bias, x)
    if (pre_bias is not None or scale is not None or shift is not None) and is_autocast(x):
        pre_bias, scale, shift = castable(pre_bias, x), castable(scale, x), castable(shift, x)
    return group_norm_act_as(out_dtype, x, num_groups, weight, bias, eps, activation=activation, pre_bias=pre_bias,
                             scale=scale, shift=shift, dropout_p=dropout_p, group=group)


def group_norm_act_as(out_dtype: Optional[torch.dtype], x, num_groups, weight, bias, eps, *, activation="silu",
                      pre_bias=None, scale=None, shift=None, dropout_p=0.0, group=None) -> Tensor:
    """:func:`group_norm_act`, but it stores in ``out_dtype`` (None: x's dtype), whatever autocast would do."""
    a = readers.untraced(checked, x, num_groups, weight, bias, eps, activation, pre_bias, scale, shift, out_dtype,
                         group is not None)
    op = ops.GROUP_NORM_ACT if group is None else sharded.op(group, a)
    if dropout_p == 0.0:
        return route(op, a)
    p = _number(dropout_p, "dropout_p")
    if not 0 <= p <= 1:
        raise ValueError(f"dropout_p must be between 0 and 1, got {p}")
    if (not has_kernels(x) or ops.in_transform() or readers.to_onnx() or readers.are_sharded(a)
            or decided(readers.is_off) or not _LEAST_DROPOUT <= p <= 1 - _LEAST_DROPOUT):
        return F.dropout(route(op, a), p)
    seed = torch.randint(2**63 - 1, (1,), device=x.device)
    return route(op, a._replace(dropout_seed=seed, dropout_p=p))


def group_norm_act_and_shortcut(out_dtype: Optional[torch.dtype], x, num_groups, weight, bias, eps, *, pre_bias=None,
                                scale=None, shift=None) -> Tuple[Tensor, Tensor]:
    """:func:`group_norm_act_as`, and x for a shortcut: in eager mode the shortcut's gradient is added to dx in the same
    kernel."""
    a = readers.untraced(checked, x, num_groups, weight, bias, eps, "silu", pre_bias, scale, shift, out_dtype)
    if x.requires_grad and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        return route(ops.GROUP_NORM_ACT_AND_SHORTCUT, a)
    return route(ops.GROUP_NORM_ACT, a), x


def route(op: ops.Op, a):
    """The op on checked arguments, by the cheapest way that is right where it is called."""
    if not has_kernels(a.x):
        warn_without_kernels(a.x.device)
        return op.composed(a)
    if ops.in_transform():
        return op.composed(a)
    if readers.are_sharded(a):
        from . import dtensor  # which imports torch.distributed.tensor

        if decided(readers.is_off) or not dtensor.takes(a):
            return op.formula(a)
        return dtensor.by_parts(partial(route, op), a)
    is_compiling = torch.compiler.is_compiling()
    if is_compiling or torch._C._get_tracing_state() is not None:
        if readers.off:
            return op.formula(a)
        if readers.to_onnx():
            return op.composed(a)
        return op.registered(*a) if is_compiling else ops.below_autograd(op.registered, *a)  # a trace keeps the op
    if torch.is_grad_enabled() and a.requires_grad:
        return op.formula(a) if decided(readers.is_off) else op.autograd.apply(*a)
    if readers.off:
        return op.formula(a)
    return ops.below_autograd(op.registered, *a)


def _plain(x, num_groups, weight, bias, eps, activation) -> Optional[Tensor]:
    """The op of plain tensors in eager mode, where nothing looks on and no dtype has to be cast; None elsewhere.

    The checks of :func:`checked` cost half as much as a small GroupNorm. So here the op itself refuses whatever they
    would refuse. They run only after that, to say what is wrong.
    """
    if torch.compiler.is_compiling() or readers.off or type(x) not in _PLAIN or not (x.is_cpu or _is_plain_cuda(x)):
        return None
    if type(num_groups) is not int or type(eps) is not float or activation not in _ACTIVATIONS:
        return None
    if weight is not None and type(weight) not in _PLAIN or bias is not None and type(bias) not in _PLAIN:
        return None
    if ops.in_transform() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
        return None
    op, silu = ops.group_norm_act_inference, _ACTIVATIONS[activation]
    if torch.is_grad_enabled() and (x.requires_grad or weight is not None and weight.requires_grad
                                    or bias is not None and bias.requires_grad):
        if has_hooks():  # a checkpoint's, perhaps: what is decided here is decided once
            return None
        op = ops.PlainGroupNormAct.apply
    try:
        if not silu and _is_pytorchs(x, num_groups, weight, bias):
            return torch.group_norm(x, num_groups, weight, bias, eps)
        return op(x, num_groups, weight, bias, eps, silu)
    except RuntimeError:
        checked(x, num_groups, weight, bias, eps, activation, None, None, None, None)
        if x.numel() == 0:  # left to the other op
            return None
        raise


def _is_pytorchs(x, num_groups, weight, bias) -> bool:
    """Whether PyTorch's own kernel takes the place of the op without an activation: on a CPU, in contiguous float32.

    There is nothing to fuse, and both read, write and keep as much. In channels_last PyTorch's kernel loses digits. In
    contiguous bfloat16 it is the slower one forward (benchmarks/NOTES.md).
    """
    return (x.is_cpu and x.dtype is torch.float32 and x.numel() >= _LEAST_HANDED_OVER and x.is_contiguous()
            and x.dim() > 1 and x.shape[0] * num_groups < x.numel()  # more than 1 value per group
            and (weight is None) == (bias is None))  # it cannot differentiate a bias without a weight


def _is_plain_cuda(x: Tensor) -> bool:
    """Whether x is a CUDA tensor that its device's kernels take as it is."""
    return (x.is_cuda and "cuda" in _KERNEL_DEVICES and not torch.is_autocast_enabled("cuda")
            and ops.has_cuda_code(x.get_device()))


def has_kernels(x: Tensor) -> bool:
    """Whether the ops have kernels for x's device. Elsewhere they are composed of PyTorch ops."""
    kind = x.device.type
    return kind in _KERNEL_DEVICES and (kind != "cuda" or ops.has_cuda_code(x.get_device()))


def bias_add_residual(
    x: Tensor,
    residual: Tensor,
    bias: Optional[Tensor] = None,
    residual_bias: Optional[Tensor] = None,
    scale: float = 1.0,
) -> Tensor:
    """``(x + bias + residual + residual_bias) * scale`` in one op: the end of a ResNet block.

    Args:
        x: (N, C, \\*), of the dtypes and layouts that :func:`group_norm_silu` takes.
        residual: of x's shape and device. In x's memory format it is used as it is.
        bias: (C,), in x's dtype, or float32 with a 16-bit x: of the convolution that gave x.
        residual_bias: (C,), likewise in the residual's dtype or float32.
        scale: the output's factor, as ``1 / output_scale_factor`` in diffusers.

    Returns:
        A new tensor of x's shape and memory format, in the dtype that ``x + residual`` has. Arithmetic is in float32
        (float64 for float64) and rounded once. Where the two dtypes differ the op is composed of PyTorch ops. Nothing
        is kept for the backward pass, which reads the gradient once for both biases.

    Raises:
        RuntimeError, TypeError, NotImplementedError: for other shapes, dtypes, devices or layouts than these.
    """
    tensors = (x, residual, bias, residual_bias)
    if has_torch_function(tensors):
        if readers.have_functions(tensors):
            return reference.bias_add_residual(x, residual, bias, residual_bias, scale)
        return handle_torch_function(bias_add_residual, tensors, x, residual, bias, residual_bias, scale)
    a = readers.untraced(_checked_residual, x, residual, bias, residual_bias, scale)
    return ops.composed_residual(a) if x.dtype != residual.dtype else route(ops.BIAS_ADD_RESIDUAL, a)


def _checked_residual(x, residual, bias, residual_bias, scale) -> ops.ResidualArguments:
    _check_input(x)
    _check_input(residual, "residual")
    if sizes.differ(residual.shape, x.shape):
        raise RuntimeError(f"residual must have x's shape {list(x.shape)}, got {list(residual.shape)}")
    if residual.device != x.device:
        raise RuntimeError(f"residual must be on x's device {x.device}, got {residual.device}")
    channels = (x.shape[1],)
    if bias is not None:
        _check_parameter(bias, "bias", x.dtype, x.device, channels, None)
    if residual_bias is not None:
        _check_parameter(residual_bias, "residual_bias", residual.dtype, x.device, channels, None)
    return ops.ResidualArguments(x, residual, bias, residual_bias, _number(scale, "scale"))


def is_autocast(x) -> bool:
    """Whether autocast is on where x lives."""
    if not isinstance(x, Tensor):
        return False
    device_type = x.device.type
    return ops.has_autocast(device_type) and torch.is_autocast_enabled(device_type)


def autocast_dtype(x) -> Optional[torch.dtype]:
    """The dtype that autocast wants of the op, or None: on CUDA it runs F.group_norm in float32."""
    return torch.float32 if isinstance(x, Tensor) and x.is_cuda and x.dtype in _CASTABLE and is_autocast(x) else None


def castable(t, x: Tensor):
    """A parameter for autocast: cast, as autocast would, if the kernels do not take it beside x."""
    if isinstance(t, Tensor) and t.is_floating_point() and t.dtype not in (x.dtype, torch.float32, torch.float64):
        return t.float()
    return t


def warn_without_kernels(device: torch.device) -> None:
    if device.type in _warned or torch.compiler.is_compiling():
        return
    _warned.add(device.type)
    rebuild = ""
    if device.type in _KERNEL_DEVICES:
        rebuild = (f"{device} runs none of the code that it has. Build it again with this GPU's architecture in "
                   f"TORCH_CUDA_ARCH_LIST to get it.")
    elif device.type == "cuda":
        rebuild = "Build it again where PyTorch and nvcc have CUDA to get them."
    warnings.warn(f"ldm_fused has no kernels for '{device.type}' tensors in this build, and composes the op of PyTorch "
                  f"ops. {rebuild}", stacklevel=4)


# ---- Checks ----------------------------------------------------------------------------------------------------


def checked(x, num_groups, weight, bias, eps, activation, pre_bias, scale, shift, out_dtype,
            in_parts=False) -> ops.Arguments:
    """The op's arguments, checked before anything is written.

    Raises what ``F.group_norm`` raises for a bad argument, odd as some of these types are. A part of a tensor may be
    smaller than a tensor may.
    """
    _check_input(x)
    shape, dtype, device = x.shape, x.dtype, x.device
    if type(num_groups) is not int and not isinstance(num_groups, torch.SymInt):
        num_groups = _integer(num_groups)
    if num_groups < 1:
        raise ValueError(f"num_groups must be at least 1, got {num_groups}")
    batch, channels = shape[0], shape[1]
    # One product: no size is compared by itself.
    if not in_parts and batch * channels // num_groups * math.prod(shape[2:]) == 1:
        raise ValueError(f"x must have more than 1 value per group, got {list(shape)} and num_groups={num_groups}")
    if channels % num_groups:
        raise RuntimeError(f"num_groups must divide the number of channels of x, got num_groups={num_groups} and shape "
                           f"{list(shape)}")
    if type(eps) is not float:
        eps = _number(eps, "eps")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be 'silu', 'swish' or None, got {activation!r}")
    if weight is not None:
        _check_parameter(weight, "weight", dtype, device, (channels,), None)
    if bias is not None:
        _check_parameter(bias, "bias", dtype, device, (channels,), None)
        if weight is not None and weight.dtype != bias.dtype:
            raise RuntimeError(f"bias must have weight's dtype {weight.dtype}, got {bias.dtype}")
    if pre_bias is not None:
        _check_parameter(pre_bias, "pre_bias", dtype, device, (channels,), (batch, channels))
    if scale is not None:
        _check_parameter(scale, "scale", dtype, device, None, (batch, channels))
    if shift is not None:
        _check_parameter(shift, "shift", dtype, device, None, (batch, channels))
    # Torch releases differ in which empty tensors they refuse.
    if not in_parts and not torch.compiler.is_compiling() and 0 in shape:
        F.group_norm(x, num_groups, weight, bias, eps)
    return ops.Arguments(x, num_groups, weight, bias, eps, _ACTIVATIONS[activation], pre_bias, scale, shift, out_dtype)


def takes_beside(dtype: torch.dtype, x_dtype: torch.dtype) -> bool:
    """Whether parameters may have ``dtype`` beside an x of ``x_dtype``."""
    return dtype == x_dtype or (dtype == torch.float32 and x_dtype in (torch.float16, torch.bfloat16))


def _check_input(x, name="x"):
    if not isinstance(x, Tensor):
        raise AttributeError(f"{name} must be a Tensor, got {type(x).__name__}")
    if len(x.shape) < 2:
        raise RuntimeError(f"{name} must have at least 2 dimensions (N, C, *), got shape {list(x.shape)}")
    if x.dtype not in _DTYPES:
        raise NotImplementedError(f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}")
    if x.layout is not torch.strided:
        raise NotImplementedError(f"{name} must be a strided tensor, got layout {x.layout}")


def _check_parameter(t, name, dtype, device, shape, batched_shape):
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a Tensor or None, got {type(t).__name__}")
    if (shape is None or sizes.differ(t.shape, shape)) and (batched_shape is None
                                                             or sizes.differ(t.shape, batched_shape)):
        expected = " or ".join(str(list(s)) for s in (shape, batched_shape) if s is not None)
        raise RuntimeError(f"{name} must have shape {expected}, as x has {(shape or batched_shape)[-1]} channels, "
                           f"got {list(t.shape)}")
    if not takes_beside(t.dtype, dtype):
        expected = f"x's dtype {dtype}" + (" or torch.float32" if dtype.itemsize == 2 else "")
        raise RuntimeError(f"{name} must have {expected}, got {t.dtype}")
    if t.device != device:
        raise RuntimeError(f"{name} must be on x's device {device}, got {t.device}")
    if t.layout is not torch.strided:
        raise NotImplementedError(f"{name} must be a strided tensor, got layout {t.layout}")


def _integer(num_groups):
    try:
        if isinstance(num_groups, bool):
            raise TypeError
        return operator.index(num_groups)
    except TypeError:
        raise TypeError(f"num_groups must be an int, got {num_groups!r}") from None


def _number(value, name):
    if not isinstance(value, (numbers.Real, Tensor, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} must be a float, got {value!r}")
    return value if isinstance(value, torch.SymFloat) else float(value)
