"""The implementations that are compared: for each a function for the op and a class for the ResNet block."""

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ldm_fused
from benchmarks.workloads import Workload
from ldm_fused import reference

MEMORY_FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}


def group_norm_then_silu(x, num_groups, weight, bias, eps, *, activation="silu"):
    """What careful PyTorch code writes: two kernels, and autograd keeps two tensors."""
    y = F.group_norm(x, num_groups, weight, bias, eps)
    return y if activation is None else F.silu(y)


class SiluResnetBlock(reference.ResnetBlock):
    """The reference block with F.silu in place of x * sigmoid(x)."""

    def forward(self, x, temb=None):
        h = self.conv1(F.silu(self.norm1(x)))
        if temb is not None:
            h = h + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return x + h


class NormSwish(nn.GroupNorm):
    """A GroupNorm and its swish as the reference writes them, for the places outside blocks."""

    def forward(self, x):
        return reference.swish(super().forward(x))


class NormSilu(nn.GroupNorm):
    """The same with F.silu."""

    def forward(self, x):
        return F.silu(super().forward(x))


@dataclass(frozen=True)
class Provider:
    """One implementation: the op, the block, and the norm with its activation, where there are such; if `compiled`, by
    torch.compile with these options of Inductor's."""

    op: Callable[..., Tensor]
    block: Optional[Callable[..., nn.Module]] = None
    norm_act: Optional[Callable[..., nn.Module]] = None
    compiled: bool = False
    options: Dict[str, object] = field(default_factory=dict)


def triton_op(*arguments, **keywords) -> Tensor:
    from benchmarks import triton_group_norm  # here, for Triton is only where a GPU is

    return triton_group_norm.group_norm_act(*arguments, **keywords)


PROVIDERS: Dict[str, Provider] = {
    "eager": Provider(reference.group_norm_act, reference.ResnetBlock, NormSwish),
    "F.silu": Provider(group_norm_then_silu, SiluResnetBlock, NormSilu),
    "compile": Provider(group_norm_then_silu, SiluResnetBlock, NormSilu, compiled=True),
    "cooperative": Provider(
        group_norm_then_silu, SiluResnetBlock, NormSilu, compiled=True, options={"triton.cooperative_reductions": True}
    ),
    "triton": Provider(triton_op),
    "ours": Provider(ldm_fused.group_norm_act, ldm_fused.FusedResnetBlock, ldm_fused.GroupNormSiLU),
    "recompute": Provider(
        ldm_fused.group_norm_act, partial(ldm_fused.FusedResnetBlock, recompute=True), ldm_fused.GroupNormSiLU
    ),
    "again": Provider(ldm_fused.group_norm_act, ldm_fused.FusedResnetBlock, ldm_fused.GroupNormSiLU),
}
# A failure of one of these is not ours.
OTHERS = ("compile", "cooperative", "triton")


@dataclass
class Contender:
    """A provider at one task: `call(x)` gives y, and training also wants the gradients of `parameters`."""

    name: str
    call: Callable[[Tensor], Tensor]
    parameters: List[Tensor]


Contenders = Tuple[List[Contender], Contender]  # and the oracle


def compiled(function, provider: Provider):
    """`function` through torch.compile, for exactly these shapes (the fastest it can be), or as it is."""
    if not provider.compiled:
        return function
    return torch.compile(function, dynamic=False, fullgraph=True, options=provider.options or None)


def op_contenders(w: Workload, names: Sequence[str], device, dtype, layout: str) -> Contenders:
    """The op by each provider with the same random weights, and the oracle: the reference in float64."""
    weight = (1 + 0.1 * torch.randn(w.shape[1], device=device)).to(dtype).requires_grad_()
    bias = (0.1 * torch.randn(w.shape[1], device=device)).to(dtype).requires_grad_()

    def contender(name, op, weight, bias):
        return Contender(name, lambda x: op(x, w.groups, weight, bias, w.eps, activation=w.activation), [weight, bias])

    contenders = []
    for name in names:
        provider = PROVIDERS[name]
        contenders.append(contender(name, compiled(provider.op, provider), weight, bias))
    weight64, bias64 = (p.detach().double().requires_grad_() for p in (weight, bias))
    return contenders, contender("oracle", reference.group_norm_act, weight64, bias64)


def block_contenders(w: Workload, names: Sequence[str], device, dtype, layout: str) -> Contenders:
    """The ResNet block by each provider with the same random weights, and the oracle: the reference in float64."""
    arguments = dict(in_channels=w.shape[1], dropout=0.0, num_groups=w.groups, eps=w.eps)
    source = randomize_norms(reference.ResnetBlock(**arguments))
    source.to(device, dtype, memory_format=MEMORY_FORMATS[layout])
    contenders = []
    for name in names:
        provider = PROVIDERS[name]
        block = provider.block(**arguments)
        block.load_state_dict(source.state_dict(), assign=True)
        contenders.append(Contender(name, compiled(block, provider), list(block.parameters())))
    oracle = copy.deepcopy(source).double()
    return contenders, Contender("oracle", oracle, list(oracle.parameters()))


def randomize_norms(module: nn.Module) -> nn.Module:
    """Norms start as the identity, which would hide a forgotten weight or bias."""
    for norm in module.modules():
        if isinstance(norm, nn.GroupNorm):
            nn.init.normal_(norm.weight, 1.0, 0.1)
            nn.init.normal_(norm.bias, 0.0, 0.1)
    return module
