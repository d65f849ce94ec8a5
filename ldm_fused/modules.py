"""Modules: :class:`GroupNormSiLU` and :class:`FusedResnetBlock`."""

import inspect
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import bypass, functional, readers, reference
from .decisions import decided
from .patching import read_block, trial
from .patching.adapters.own import BLOCK
from .patching.call import Call
from .patching.report import UnsupportedBlock
from .patching.source import Unreadable
from .resnet_block import Stage, resnet

__all__ = ["FusedResnetBlock", "GroupNormSiLU", "UnsupportedBlock"]


class GroupNormSiLU(nn.GroupNorm):
    """``nn.GroupNorm`` followed by SiLU, in one op: a drop-in for ``nn.Sequential(nn.GroupNorm(...), nn.SiLU())``.

    Arguments, parameters, state dict and errors are those of ``nn.GroupNorm``; input and output are (N, C, \\*), see
    :func:`ldm_fused.group_norm_silu`.

    Attributes:
        group: a process group over whose ranks the input's trailing axes are cut, as in
            :func:`ldm_fused.group_norm_act`; by default None.
    """

    group = None

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.silu(F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps))
        else:  # which a script leaves out
            if self.group is not None:
                return functional.group_norm_act(input, self.num_groups, self.weight, self.bias, self.eps,
                                                 group=self.group)
            return functional.group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps)


class FusedResnetBlock(reference.ResnetBlock):
    """The ResNet block of latent diffusion models with GroupNorm and swish in one op.

    A drop-in for :class:`ldm_fused.reference.ResnetBlock`: the same submodules, creation order and state dict, so that
    the same seed gives the same weights and a checkpoint of either loads into the other. ``norm1`` and ``norm2`` stay
    plain ``nn.GroupNorm``. Each call fuses a norm only if nothing has replaced, hooked or moved it
    (:mod:`ldm_fused.bypass`), and calls it as a module otherwise.

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

        Accepts the reference block, fused blocks, and any other class that has exactly their submodules and computes
        their formula. Its forward is read, and then tried on a copy with random weights.

        Raises:
            UnsupportedBlock: with the reason.
        """
        reason = bypass.instance_obstacle(block)
        if reason is None and type(block) not in KNOWN_CLASSES:
            reason = structure_obstacle(block) or formula_obstacle(block) or trial.difference(block, BLOCK)
        if reason is not None:
            raise UnsupportedBlock(f"{type(block).__name__} cannot be fused: {reason}")
        if type(block) not in KNOWN_CLASSES and not _takes_x_and_temb(type(block)):
            fused = StandIn._sharing(block, recompute)
            fused._own, fused._call = (block,), Call(type(block).forward, FusedResnetBlock.forward)
            return fused
        return cls._sharing(block, recompute)

    @classmethod
    def _sharing(cls, block: nn.Module, recompute: bool) -> "FusedResnetBlock":
        fused = cls.__new__(cls)
        nn.Module.__init__(fused)
        # A known class has its sizes as attributes, whatever replaced its parts. Another class's parts were checked.
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
        if decided(readers.is_off) or readers.is_read((x, temb)):
            return super().forward(x, temb)
        if temb is not None:
            if not hasattr(self, "temb_proj"):
                raise ValueError("temb was given to a block without temb_proj: construct it with temb_channels > 0")
            temb = self.temb_proj(reference.swish(temb))
        shortcut = None
        if self.in_channels != self.out_channels:
            shortcut = self.conv_shortcut if self.use_conv_shortcut else self.nin_shortcut
        return resnet(x, Stage(self.norm1, self.conv1), Stage(self.norm2, self.conv2), temb=temb, dropout=self.dropout,
                      shortcut=shortcut, recompute=self.recompute)


class StandIn(FusedResnetBlock):
    """Stands in for a block whose class takes other arguments, under that class's names.

    Where one of these is not its default, the block itself runs.
    """

    def forward(self, *args, **kwargs):
        bound = self._call.bind(args, kwargs)
        return self._own[0](*args, **kwargs) if bound is None else super().forward(*bound)


def _takes_x_and_temb(cls: type) -> bool:
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    return [p.name for p in parameters] in (["x"], ["x", "temb"]) and all(
        p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


# Classes whose forward is known to be the reference block's, by identity: a subclass may compute something else.
KNOWN_CLASSES = {reference.ResnetBlock, FusedResnetBlock}


# ---- from_module -----------------------------------------------------------------------------------------------


def structure_obstacle(block: nn.Module) -> Optional[str]:
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
        reason = bypass.module_obstacle(child, expected[name])
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


def formula_obstacle(block: nn.Module) -> Optional[str]:
    """The reason why ``block``'s forward is not the reference block's, or None."""
    try:
        read = read_block.read(block)
    except Unreadable as reason:
        return str(reason)
    for found in read.formulas.values():
        roles = found.norm1, found.act1, found.conv1, found.norm2, found.act2, found.conv2, found.resample
        if roles != ("norm1", None, "conv1", "norm2", None, "conv2", None):
            return f"its parts have other roles: {', '.join(map(str, roles))}"
        if found.embedding not in (None, (None, "temb_proj")) or found.modulation is not None:
            return "it uses its time embedding in another way"
        if found.dropout != "dropout" or found.factor != 1.0:
            return f"its dropout is {found.dropout}, and its result is multiplied by {found.factor}"
    return None


def _is_same_convolution(conv: nn.Conv2d, in_channels: int, out_channels: int, size: int) -> bool:
    """Whether a convolution leaves height and width as they are, with one kernel size, stride and group."""
    return (conv.in_channels == in_channels and conv.out_channels == out_channels and conv.kernel_size == (size, size)
            and conv.padding in ((size // 2, size // 2), "same") and conv.stride == (1, 1) and conv.dilation == (1, 1)
            and conv.groups == 1 and conv.padding_mode == "zeros")
