"""Modules: :class:`GroupNormSiLU` and :class:`FusedResnetBlock`."""

import copy
from typing import Callable, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import functional, ops, pristine, reference

__all__ = ["FusedResnetBlock", "GroupNormSiLU", "UnsupportedBlock"]


class GroupNormSiLU(nn.GroupNorm):
    """``nn.GroupNorm`` followed by SiLU, in one op: a drop-in for ``nn.Sequential(nn.GroupNorm(...), nn.SiLU())``.

    Arguments, parameters, state dict and errors are those of ``nn.GroupNorm``; input and output are (N, C, \\*), see
    :func:`ldm_fused.group_norm_silu`.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps)


class UnsupportedBlock(ValueError):
    """Raised by :meth:`FusedResnetBlock.from_module` for a block that it cannot stand in for; says why."""


class FusedResnetBlock(reference.ResnetBlock):
    """The ResNet block of latent diffusion models with GroupNorm and swish in one op.

    A drop-in for :class:`ldm_fused.reference.ResnetBlock`: the same submodules, creation order and state dict, so that
    the same seed gives the same weights and a checkpoint of either loads into the other. ``norm1`` and ``norm2`` stay
    plain ``nn.GroupNorm``; each is fused only while nothing has replaced, hooked or moved it, which is looked at in
    every call (:mod:`ldm_fused.pristine`), and called as it is otherwise.

    Args:
        in_channels, out_channels, conv_shortcut, dropout, temb_channels, num_groups, eps: as the reference block's.
        recompute: keep for the backward pass only the block's input and conv1's output, and compute the activated
            tensors again: less memory, one more op a norm, the same gradients to the bit.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: Optional[int] = None,
        conv_shortcut: bool = False,
        dropout: float,
        temb_channels: int = 0,
        num_groups: int = 32,
        eps: float = 1e-6,
        recompute: bool = False,
    ) -> None:
        super().__init__(in_channels=in_channels, out_channels=out_channels, conv_shortcut=conv_shortcut,
                         dropout=dropout, temb_channels=temb_channels, num_groups=num_groups, eps=eps)
        self.recompute = recompute

    @classmethod
    def from_module(cls, block: nn.Module, *, recompute: bool = False) -> "FusedResnetBlock":
        """A fused block that shares ``block``'s submodules and Parameters.

        Accepts the reference block, fused blocks, and any other class that has exactly their submodules and, in a
        trial on a private copy with random weights, computes what they compute, forward and backward.

        Raises:
            UnsupportedBlock: with the reason.
        """
        reason = pristine.why_not_instance(block)
        if reason is None and type(block) not in KNOWN_CLASSES:
            reason = _why_not_structure(block) or _why_not_meaning(block)
        if reason is not None:
            raise UnsupportedBlock(f"{type(block).__name__} cannot be fused: {reason}")
        return cls._sharing(block, recompute)

    @classmethod
    def _sharing(cls, block: nn.Module, recompute: bool) -> "FusedResnetBlock":
        fused = cls.__new__(cls)
        nn.Module.__init__(fused)
        # A known class tells its sizes, whatever replaced its parts; another class's parts are what was checked.
        known = type(block) in KNOWN_CLASSES
        fused.in_channels = block.in_channels if known else block.norm1.num_channels
        fused.out_channels = block.out_channels if known else block.norm2.num_channels
        fused.use_conv_shortcut = hasattr(block, "conv_shortcut")
        fused.recompute = recompute
        for name, module in block._modules.items():  # named_children() would leave out one that serves twice
            fused.add_module(name, module)
        fused.training = block.training
        return fused

    def forward(self, x: Tensor, temb: Optional[Tensor] = None) -> Tensor:
        """``x`` (N, in_channels, H, W) and optionally ``temb`` (N, temb_channels) to (N, out_channels, H, W).

        Raises:
            ValueError: for a ``temb`` given to a block without ``temb_proj``.
        """
        if temb is not None:
            if not hasattr(self, "temb_proj"):
                raise ValueError("temb was given to a block without temb_proj: construct it with temb_channels > 0")
            temb = self.temb_proj(reference.swish(temb))
        bias1, bias2 = bias_left(self.conv1, x), bias_left(self.conv2, x)
        if self.recompute and torch.is_grad_enabled() and not (ops.in_transform() or torch.compiler.is_exporting()):
            # The recomputation stops at what the convolution saves, its input: convolutions run once.
            h, x = checkpoint(self._first_half, x, bias1, use_reentrant=False)
            h = checkpoint(self._second_half, h, temb, bias1, bias2, use_reentrant=False)
        else:
            h, x = self._first_half(x, bias1)
            h = self._second_half(h, temb, bias1, bias2)
        shortcut_bias = None
        if self.in_channels != self.out_channels:
            shortcut = self.conv_shortcut if self.use_conv_shortcut else self.nin_shortcut
            shortcut_bias = bias_left(shortcut, x)
            x = convolution(shortcut, x, shortcut_bias)
        if bias2 is None and shortcut_bias is None or x.dtype != h.dtype:
            return with_bias(x, shortcut_bias) + with_bias(h, bias2)
        return functional.bias_add_residual(x, h, shortcut_bias, bias2)  # in this order: the result's layout is x's

    def _first_half(self, x: Tensor, bias1: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
        """conv1's output, and x for the shortcut."""
        h, x = norm_swish(self.norm1, x, into=self.conv1, shortcut=True)
        return convolution(self.conv1, h, bias1), x

    def _second_half(
        self, h: Tensor, temb: Optional[Tensor], bias1: Optional[Tensor], bias2: Optional[Tensor]
    ) -> Tensor:
        into = None if self.dropout.training and self.dropout.p else self.conv2
        h, _ = norm_swish(self.norm2, h, pre_bias=temb, conv_bias=bias1, into=into)
        return convolution(self.conv2, self.dropout(h), bias2)


# Classes whose forward is known to be the reference block's, by identity: a subclass may compute something else.
KNOWN_CLASSES = {reference.ResnetBlock, FusedResnetBlock}


def bias_left(conv: nn.Module, x: Tensor) -> Optional[Tensor]:
    """The bias that :func:`convolution` leaves to the op that reads its output; None where the convolution adds it.

    On CUDA PyTorch adds a convolution's bias in a kernel of its own, which reads and writes the whole tensor; on a CPU
    the convolution adds it on the way.
    """
    if not _has_separate_bias(x) or ops.in_transform() or not _is_plain_convolution(conv, x.device):
        return None
    bias, out_dtype = conv.bias, conv.weight.dtype
    if functional.is_autocast(x) and out_dtype != torch.float64:
        out_dtype = torch.get_autocast_dtype(x.device.type)
    return bias if bias is not None and functional.takes_beside(bias.dtype, out_dtype) else None


def _is_plain_convolution(conv: Optional[nn.Module], device: Optional[torch.device] = None) -> bool:
    return type(conv) in pristine.CONVOLUTIONS and pristine.why_not(conv, type(conv), device) is None


def _has_separate_bias(x: Tensor) -> bool:
    return x.is_cuda and ops.HAS_CUDA


def convolution(conv: nn.Module, x: Tensor, left: Optional[Tensor]) -> Tensor:
    """``conv(x)``, without the bias if that was ``left``."""
    return conv(x) if left is None else conv._conv_forward(x, conv.weight, None)


def with_bias(x: Tensor, left: Optional[Tensor]) -> Tensor:
    """A convolution's output with the bias that was ``left``, as the convolution would have given it."""
    return x if left is None else x + reference.per_channel(left, x).to(x.dtype)


def norm_swish(
    norm: nn.Module,
    x: Tensor,
    *,
    pre_bias: Optional[Tensor] = None,
    conv_bias: Optional[Tensor] = None,
    scale: Optional[Tensor] = None,
    shift: Optional[Tensor] = None,
    act: Optional[nn.Module] = None,
    called: Optional[Callable[[Tensor], Tensor]] = None,
    into: Optional[nn.Module] = None,
    shortcut: bool = False,
    count: Callable[[Tensor, Optional[str]], None] = lambda x, reason: None,
) -> Tuple[Tensor, Tensor]:
    """``swish(norm(x + conv_bias + pre_bias) * (1 + scale) + shift)``, in one op if ``norm`` is pristine, else by
    calling it; and x, which whoever else reads it takes from here: with ``shortcut`` its gradient is then added in
    norm's backward pass.

    ``pre_bias`` is (N, C), ``conv_bias`` what the convolution before has left out, ``scale`` and ``shift`` (N, C).
    ``act`` is the module that computes swish, where it is one. ``called`` is what calls a norm that computes ``scale``
    and ``shift`` itself. ``into`` is the convolution that takes the result: under autocast the op stores right in the
    dtype that a plain convolution would cast it to. ``count`` is told of x, and the reason why the norm was called, or
    None.
    """
    odd = pre_bias is not None and (pre_bias.dtype != x.dtype or pre_bias.shape != x.shape[:2])
    if odd or _why_not_norm_swish(norm, x, scale, shift, act) is not None:
        x, conv_bias = with_bias(x, conv_bias), None
        if pre_bias is not None:  # promoted or broadcast, as PyTorch does it
            x, pre_bias = x + reference.per_channel(pre_bias, x), None
    reason = _why_not_norm_swish(norm, x, scale, shift, act)
    count(x, reason)
    if reason is not None:
        h = norm(x) if called is None else called(x)
        if scale is not None and called is None:
            h = h * (1 + reference.per_channel(scale, h))
        if shift is not None and called is None:
            h = h + reference.per_channel(shift, h)
        return (reference.swish if act is None else act)(h), x
    if conv_bias is not None:
        pre_bias = conv_bias if pre_bias is None else pre_bias + conv_bias
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    dtype = _autocast_dtype_of_convolution(x, into)
    shortcut = shortcut and torch.is_grad_enabled()
    keeps_dtype = pristine.known_norm(type(norm)).keeps_dtype
    if dtype is None and not keeps_dtype and (functional.is_autocast(x) or not shortcut):
        return functional.group_norm_act(x, norm.num_groups, weight, bias, norm.eps, pre_bias=pre_bias, scale=scale,
                                         shift=shift), x
    arguments = functional.checked(x, norm.num_groups, weight, bias, norm.eps, "silu", pre_bias, scale, shift, dtype)
    return functional.run_and_shortcut(arguments) if shortcut else (functional.run(arguments), x)


def _why_not_norm_swish(norm: nn.Module, x: Tensor, scale, shift, act) -> Optional[str]:
    reason = pristine.why_not_norm(norm, x)
    if reason is not None:
        return reason
    if act is not None:
        reason = pristine.why_not_activation(act)
        if reason is not None:
            return f"its activation: {reason}"
    for name, t in (("scale", scale), ("shift", shift)):
        if t is not None and (t.shape != x.shape[:2] or t.dtype not in (x.dtype, torch.float32)):
            return f"its {name} is {t.dtype} {list(t.shape)} and the input {x.dtype} {list(x.shape)}"
    return None


def _autocast_dtype_of_convolution(x: Tensor, conv: Optional[nn.Module]) -> Optional[torch.dtype]:
    """The dtype that autocast casts a plain convolution's input to, if the op can store it; None to leave it alone."""
    device_type = x.device.type
    if not functional.is_autocast(x) or not _is_plain_convolution(conv):
        return None
    dtype = torch.get_autocast_dtype(device_type)
    return dtype if dtype == x.dtype or x.dtype == torch.float32 else None


# ---- from_module -----------------------------------------------------------------------------------------------


def _why_not_structure(block: nn.Module) -> Optional[str]:
    """The reason why ``block`` is not made of exactly the reference block's parts, or None."""
    children = dict(block._modules)
    shortcuts = {"nin_shortcut": 1, "conv_shortcut": 3}
    expected = {"norm1": nn.GroupNorm, "conv1": nn.Conv2d, "temb_proj": nn.Linear, "norm2": nn.GroupNorm,
                "dropout": nn.Dropout, "conv2": nn.Conv2d, **{name: nn.Conv2d for name in shortcuts}}
    for name in ("norm1", "conv1", "norm2", "dropout", "conv2"):
        if name not in children:
            return f"it has no {name}"
    for name, child in children.items():
        if name not in expected:
            return f"it has another submodule, {name}"
        reason = pristine.why_not(child, expected[name])
        if reason is not None:
            return f"{name}: {reason}"
    if any(True for _ in block.parameters(recurse=False)) or any(True for _ in block.buffers()):
        return "it has parameters or buffers of its own"
    channels, out_channels = block.conv1.in_channels, block.conv1.out_channels
    convolutions = {"conv1": (channels, out_channels, 3), "conv2": (out_channels, out_channels, 3)}
    convolutions.update({name: (channels, out_channels, size) for name, size in shortcuts.items() if name in children})
    for name, sizes in convolutions.items():
        if not _is_same_convolution(children[name], *sizes):
            return f"{name} is {children[name]}"
    if sum(name in children for name in shortcuts) != int(channels != out_channels):
        return "its shortcut is not one convolution where the channel counts differ and none where they are equal"
    if block.norm1.num_channels != channels or block.norm2.num_channels != out_channels:
        return "the norms' and the convolutions' channels differ"
    if "temb_proj" in children and block.temb_proj.out_features != out_channels:
        return f"temb_proj is {block.temb_proj}"
    return None


def _is_same_convolution(conv: nn.Conv2d, in_channels: int, out_channels: int, size: int) -> bool:
    """Whether a convolution leaves height and width as they are, with one kernel size, stride and group."""
    return (conv.in_channels == in_channels and conv.out_channels == out_channels and conv.kernel_size == (size, size)
            and conv.padding in ((size // 2, size // 2), "same") and conv.stride == (1, 1) and conv.dilation == (1, 1)
            and conv.groups == 1 and conv.padding_mode == "zeros")


def _why_not_meaning(block: nn.Module) -> Optional[str]:
    """The reason why ``block``'s own forward does not compute what a fused block computes, or None.

    Tried in float64 on a private copy with random weights, forward and backward, in training with dropout and in
    evaluation: an unknown class may have the reference block's parts and yet put them together in another way.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad(), \
                torch.autocast("cpu", enabled=False), torch.device("cpu"):
            torch.default_generator.manual_seed(0)  # the CPU's alone, which is given back as it was
            own = copy.deepcopy(block).to_empty(device="cpu").to(torch.float64).requires_grad_(True)
            own.dropout.p = 0.5
            for parameter in own.parameters():
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            fused = FusedResnetBlock._sharing(own, recompute=False)
            x = torch.randn(2, own.conv1.in_channels, 6, 4, dtype=torch.float64, requires_grad=True)
            temb = None
            if hasattr(own, "temb_proj"):
                temb = torch.randn(2, own.temb_proj.in_features, dtype=torch.float64, requires_grad=True)
            leaves = [t for t in (x, temb, *own.parameters()) if t is not None]
            for training in (True, False):
                own.train(training)
                found, expected = (_trial(call, x, temb, leaves) for call in (lambda x, t: _call(own, x, t), fused))
                names = ["output", *["gradient"] * len(leaves)]
                for name, a, b in zip(names, found, expected):
                    if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-9, atol=1e-9):
                        return (f"in {'training' if training else 'evaluation'} its forward computes another {name} "
                                "than norm, swish, conv, norm, swish, dropout, conv, add")
    except Exception as error:  # whatever an unknown class raises is a reason to leave it alone
        return f"its forward failed in a trial with {type(error).__name__}: {error}"
    return None


def _trial(call, x: Tensor, temb: Optional[Tensor], leaves) -> list:
    """Output and gradients, with the random numbers of every other trial."""
    torch.default_generator.manual_seed(1)
    y = call(x, temb)
    return [y, *torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape))]


def _call(block: nn.Module, x: Tensor, temb: Optional[Tensor]) -> Tensor:
    """``block(x, temb)``, or ``block(x)`` where it takes no temb."""
    if temb is not None:
        return block(x, temb)
    try:
        return block(x)
    except TypeError:  # CompVis blocks want temb even where it is None
        return block(x, None)
