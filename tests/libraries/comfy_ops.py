"""PyTorch's layers with weights that may be cast or changed in each call."""

import torch.nn.functional as F
from torch import nn


class CastWeightBiasOp:
    comfy_cast_weights = False
    weight_function = []
    bias_function = []

    def changes_weights(self):
        return self.comfy_cast_weights or len(self.weight_function) > 0 or len(self.bias_function) > 0

    def weights(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        for function in self.weight_function:
            weight = function(weight)
        for function in self.bias_function:
            bias = function(bias)
        return weight, bias


class disable_weight_init:
    class Conv2d(nn.Conv2d, CastWeightBiasOp):
        def forward(self, *args, **kwargs):
            if self.changes_weights():
                return self._conv_forward(*args, *self.weights(args[0]))
            return super().forward(*args, **kwargs)

    class GroupNorm(nn.GroupNorm, CastWeightBiasOp):
        def forward(self, *args, **kwargs):
            if self.changes_weights():
                return F.group_norm(*args, self.num_groups, *self.weights(args[0]), self.eps)
            return super().forward(*args, **kwargs)


class ForgeOperations:
    """Forge's, whose flag has another name."""

    class Conv2d(nn.Conv2d):
        parameters_manual_cast = False

        def forward(self, x):
            if self.parameters_manual_cast:
                return self._conv_forward(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
            return super().forward(x)

    class GroupNorm(nn.GroupNorm):
        parameters_manual_cast = False

        def forward(self, x):
            if self.parameters_manual_cast:
                return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
            return super().forward(x)


class manual_cast(disable_weight_init):
    class Conv2d(disable_weight_init.Conv2d):
        comfy_cast_weights = True

    class GroupNorm(disable_weight_init.GroupNorm):
        comfy_cast_weights = True
