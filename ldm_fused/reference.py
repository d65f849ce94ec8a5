"""The fused op and the ResNet block in plain PyTorch: oracle, documentation and baseline.

Everything here is written as diffusion code writes it, one PyTorch op after the other, so that it says
what the fused kernels must compute, in any dtype (float64 for the oracle) and under any transform.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ResnetBlock", "bias_add_residual", "group_norm_act", "group_norm_apply", "group_norm_statistics",
           "merge_statistics", "swish"]


def swish(x: Tensor) -> Tensor:
    """``x * sigmoid(x)``, also known as SiLU (Elfwing et al. 2017, arXiv:1702.03118; Ramachandran et al. 2017)."""
    return x * torch.sigmoid(x)


def per_channel(t: Tensor, x: Tensor) -> Tensor:
    """``t`` of shape (C,) or (N, C), viewed so that it broadcasts over the trailing axes of ``x`` (N, C, *)."""
    return t.reshape(t.shape if t.dim() == 2 else (1, -1)).reshape(-1, x.shape[1], *[1] * (x.dim() - 2))


def per_group(t: Tensor, x: Tensor) -> Tensor:
    """``t`` of shape (N, G), so that it broadcasts over the channels and trailing axes of ``x`` (N, C, *)."""
    return per_channel(t.repeat_interleave(x.shape[1] // t.shape[1], 1), x)


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
) -> Tensor:
    """What :func:`ldm_fused.group_norm_act` computes, with the same arguments, one PyTorch op at a time.

    ``group_norm(x + pre_bias) * (1 + scale) + shift``, then the activation, then dropout
    (GroupNorm: Wu and He 2018, arXiv:1803.08494).
    """
    h = x if pre_bias is None else x + per_channel(pre_bias, x)
    h = _modulated(F.group_norm(h, num_groups, weight, bias, eps), scale, shift, activation)
    return F.dropout(h, dropout_p) if dropout_p else h


def _modulated(h: Tensor, scale: Optional[Tensor], shift: Optional[Tensor], activation: Optional[str]) -> Tensor:
    if scale is not None:
        h = h * (1 + per_channel(scale, h))
    if shift is not None:
        h = h + per_channel(shift, h)
    return h if activation is None else swish(h)


def group_norm_statistics(x: Tensor, num_groups: int, *, pre_bias: Optional[Tensor] = None) -> Tensor:
    """What :func:`ldm_fused.group_norm_statistics` computes."""
    h = x if pre_bias is None else x + per_channel(pre_bias, x)
    h = h.unflatten(1, (num_groups, -1)).flatten(2)
    mean = h.sum(-1) / max(1, h.shape[-1])
    m2 = (h - mean[..., None]).square().sum(-1)
    return torch.stack([torch.full_like(mean, h.shape[-1]), mean, m2])


def merge_statistics(statistics: Tensor) -> Tensor:
    """(3, N, G): count, mean and sum of squared deviations of a whole, from those of its parts, (parts, 3, N, G), in
    their order (Chan, Golub and LeVeque 1979)."""
    counts, means, m2s = statistics.unbind(1)
    counts = counts.detach()
    count, mean, m2 = counts[0], means[0], m2s[0]
    for other, other_mean, other_m2 in zip(counts[1:], means[1:], m2s[1:]):
        share, delta = other / (count + other).clamp(min=1), other_mean - mean
        mean, m2, count = mean + delta * share, m2 + other_m2 + delta * delta * share * count, count + other
    return torch.stack([count, mean, m2])


def group_norm_apply(
    x: Tensor,
    statistics: Tensor,
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    eps: float = 1e-5,
    *,
    activation: Optional[str] = "silu",
    pre_bias: Optional[Tensor] = None,
    scale: Optional[Tensor] = None,
    shift: Optional[Tensor] = None,
) -> Tensor:
    """What :func:`ldm_fused.group_norm_apply` computes, with the same arguments."""
    count, mean, m2 = merge_statistics(statistics if statistics.dim() == 4 else statistics[None])
    h = x if pre_bias is None else x + per_channel(pre_bias, x)
    h = (h - per_group(mean, x)) * per_group((m2 / count.clamp(min=1) + eps).rsqrt(), x)
    if weight is not None:
        h = h * per_channel(weight, x)
    if bias is not None:
        h = h + per_channel(bias, x)
    return _modulated(h, scale, shift, activation)


def bias_add_residual(
    x: Tensor,
    residual: Tensor,
    bias: Optional[Tensor] = None,
    residual_bias: Optional[Tensor] = None,
    scale: float = 1.0,
) -> Tensor:
    """What :func:`ldm_fused.bias_add_residual` computes, one PyTorch op at a time."""
    if bias is not None:
        x = x + per_channel(bias, x)
    if residual_bias is not None:
        residual = residual + per_channel(residual_bias, residual)
    return (x + residual) * scale


class ResnetBlock(nn.Module):
    r"""The ResNet block of latent diffusion models, as their autoencoder writes it
    (Rombach et al. 2022, arXiv:2112.10752)::

        norm1, swish, conv1 3x3, (+ temb_proj(swish(temb))), norm2, swish, dropout, conv2 3x3, + shortcut

    Args:
        in_channels: channels of the input, a multiple of ``num_groups``.
        out_channels: channels of the output, ``in_channels`` if None.
        conv_shortcut: where the channel counts differ, a 3x3 convolution (``conv_shortcut``) rather than a 1x1
            one (``nin_shortcut``) on the shortcut.
        dropout: probability of zeroing an element before the second convolution, in training.
        temb_channels: size of the time embedding, 0 for none.
        num_groups: groups of both norms.
        eps: added to the variance of both norms.
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
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.use_conv_shortcut = conv_shortcut
        self.norm1 = nn.GroupNorm(num_groups, in_channels, eps=eps, affine=True)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=1, padding=1)
        if temb_channels > 0:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(num_groups, out_channels, eps=eps, affine=True)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, stride=1, padding=1)
        if in_channels != out_channels:
            if conv_shortcut:
                self.conv_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=1, padding=1)
            else:
                self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=1, padding=0)

    def forward(self, x: Tensor, temb: Optional[Tensor] = None) -> Tensor:
        """``x`` (N, in_channels, H, W) and optionally ``temb`` (N, temb_channels) to (N, out_channels, H, W)."""
        if temb is not None and not hasattr(self, "temb_proj"):
            raise ValueError("temb was given to a block without temb_proj: construct it with temb_channels > 0")
        h = self.conv1(swish(self.norm1(x)))
        if temb is not None:
            h = h + self.temb_proj(swish(temb))[:, :, None, None]
        h = self.conv2(self.dropout(swish(self.norm2(h))))
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return x + h
