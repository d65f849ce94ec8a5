"""PyTorch's layers with weights that may be cast or changed in each call."""

import torch.nn.functional as F
from torch import nn


class CastWeightBiasOp:
    comfy_cast_weights = False
    weight_function = ()
    bias_function = ()


class disable_weight_init:
    class Conv2d(nn.Conv2d, CastWeightBiasOp):
        pass

    class GroupNorm(nn.GroupNorm, CastWeightBiasOp):
        def forward(self, x):
            if not (self.comfy_cast_weights or self.weight_function or self.bias_function):
                return super().forward(x)
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            for function in self.weight_function:
                weight = function(weight)
            for function in self.bias_function:
                bias = function(bias)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class manual_cast(disable_weight_init):
    class GroupNorm(disable_weight_init.GroupNorm):
        comfy_cast_weights = True
