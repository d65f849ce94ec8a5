"""The block of EDM's UNets."""

import torch
import torch.nn.functional as F
from torch import nn


class GroupNorm(nn.Module):
    def __init__(self, num_channels, num_groups=8, eps=1e-5):
        super().__init__()
        self.num_groups, self.eps = num_groups, eps
        self.weight, self.bias = nn.Parameter(torch.ones(num_channels)), nn.Parameter(torch.zeros(num_channels))

    def forward(self, x):
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Conv2d(nn.Module):
    """A convolution that may halve or double the size before."""

    def __init__(self, in_channels, out_channels, kernel, up=False, down=False):
        super().__init__()
        self.up, self.down, self.kernel = up, down, kernel
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel) * 0.1)
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2) if self.up else F.avg_pool2d(x, 2) if self.down else x
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=self.kernel // 2)


class Attention(torch.autograd.Function):
    """Weights that are computed in float32, whatever they are of, in both passes."""

    @staticmethod
    def forward(ctx, q, k):
        scores = q.transpose(1, 2).to(torch.float32) @ (k * k.shape[1] ** -0.5).to(torch.float32)
        w = scores.softmax(2).to(q.dtype)
        ctx.save_for_backward(q, k, w)
        return w

    @staticmethod
    def backward(ctx, dw):
        q, k, w = ctx.saved_tensors
        ds = torch._softmax_backward_data(grad_output=dw.to(torch.float32), output=w.to(torch.float32), dim=2,
                                          input_dtype=torch.float32) * k.shape[1] ** -0.5
        return (k.to(torch.float32) @ ds.mT).to(q.dtype), (q.to(torch.float32) @ ds).to(k.dtype)


class UNetBlock(nn.Module):
    def __init__(self, in_channels, out_channels, emb_channels, up=False, down=False, num_heads=0, dropout=0.0,
                 skip_scale=1.0, adaptive_scale=True):
        super().__init__()
        self.in_channels, self.out_channels, self.emb_channels = in_channels, out_channels, emb_channels
        self.num_heads, self.dropout = num_heads, dropout
        self.skip_scale, self.adaptive_scale = skip_scale, adaptive_scale
        self.norm0 = GroupNorm(in_channels)
        self.conv0 = Conv2d(in_channels, out_channels, 3, up, down)
        self.affine = nn.Linear(emb_channels, out_channels * (2 if adaptive_scale else 1))
        self.norm1 = GroupNorm(out_channels)
        self.conv1 = Conv2d(out_channels, out_channels, 3)
        changes = up or down or in_channels != out_channels
        self.skip = Conv2d(in_channels, out_channels, 1, up, down) if changes else None
        if num_heads:
            self.norm2 = GroupNorm(out_channels)
            self.qkv, self.proj = Conv2d(out_channels, 3 * out_channels, 1), Conv2d(out_channels, out_channels, 1)

    def forward(self, x, emb):
        before = x
        x = self.conv0(F.silu(self.norm0(x)))
        params = self.affine(emb)[..., None, None].to(x.dtype)
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            x = F.silu(self.norm1(x) * (scale + 1) + shift)
        else:
            x = F.silu(self.norm1(x + params))
        x = self.conv1(F.dropout(x, p=self.dropout, training=self.training))
        x = (x + (before if self.skip is None else self.skip(before))) * self.skip_scale
        if self.num_heads:
            qkv = self.qkv(self.norm2(x)).reshape(x.shape[0] * self.num_heads, x.shape[1] // self.num_heads, 3, -1)
            q, k, v = qkv.unbind(2)
            w = Attention.apply(q, k)
            x = (self.proj(torch.einsum("nqk,nck->ncq", w, v).reshape(x.shape)) + x) * self.skip_scale
        return x
