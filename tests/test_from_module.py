"""FusedResnetBlock.from_module: what it accepts, and what it refuses with which reason."""

import copy
import threading

import pytest
import torch
from torch import nn

from ldm_fused import FusedResnetBlock, UnsupportedBlock, reference
from ldm_fused.compat import ldm


class PrivateCopy(nn.Module):
    """The block as many repositories carry it: another class, the same parts."""

    def __init__(self, in_channels=32, out_channels=32):
        super().__init__()
        for name, module in reference.ResnetBlock(in_channels=in_channels, out_channels=out_channels,
                                                  dropout=0.1).named_children():
            self.add_module(name, module)

    def forward(self, x, temb):
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        h = self.conv2(self.dropout(nn.functional.silu(self.norm2(h))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Preactivated(PrivateCopy):
    def forward(self, x, temb=None):
        return super().forward(nn.functional.relu(x), temb)


class Scaled(PrivateCopy):
    def forward(self, x, temb=None):
        return super().forward(x, temb) / 2**0.5


class WrongGradient(PrivateCopy):
    def forward(self, x, temb=None):
        return super().forward(x, temb).detach() + (x - x.detach())


class DropoutLast(PrivateCopy):
    def forward(self, x, temb=None):
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        return x + self.dropout(self.conv2(nn.functional.silu(self.norm2(h))))


class AlwaysDropout(PrivateCopy):
    def forward(self, x, temb=None):
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        return x + self.conv2(nn.functional.dropout(nn.functional.silu(self.norm2(h)), self.dropout.p))


class Subclass(FusedResnetBlock):
    def __init__(self):
        super().__init__(in_channels=32, dropout=0.0)

    def forward(self, x, temb=None):
        return super().forward(x, temb) * 2


class Failing(PrivateCopy):
    def forward(self, x):
        raise KeyError("no such thing")


class WithBatchNorm(PrivateCopy):
    def __init__(self):
        super().__init__()
        self.norm3 = nn.BatchNorm2d(32)


class WithScale(PrivateCopy):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))


def uncopyable(block):
    block.lock = threading.Lock()
    return block


@pytest.mark.parametrize("make", [
    lambda: reference.ResnetBlock(in_channels=32, dropout=0.1, temb_channels=8),
    lambda: FusedResnetBlock(in_channels=32, dropout=0.1),
    lambda: ldm.ResnetBlock(in_channels=32, out_channels=64, dropout=0.1),
    lambda: PrivateCopy(),
    lambda: PrivateCopy(32, 64).eval(),
    lambda: uncopyable(PrivateCopy()),
], ids=["reference", "fused", "compat", "private copy", "private copy with shortcut", "uncopyable"])
def test_from_module_shares_parameters(make):
    block = make()
    state = torch.get_rng_state()
    fused = FusedResnetBlock.from_module(block)
    assert torch.equal(state, torch.get_rng_state())
    assert [id(p) for p in fused.parameters()] == [id(p) for p in block.parameters()]
    assert list(fused.state_dict()) == list(block.state_dict()) and fused.training == block.training
    fused.eval()
    x = torch.randn(2, 32, 5, 5)
    torch.testing.assert_close(fused(x), block(x, None), rtol=1e-4, atol=1e-5)


class Carrying(PrivateCopy):
    """As ComfyUI's, which is called with four arguments."""

    def forward(self, hidden_states, temb=None, conv_carry_in=None, conv_carry_out=None, **others):
        h = self.conv1(nn.functional.silu(self.norm1(hidden_states)))
        h = self.conv2(self.dropout(nn.functional.silu(self.norm2(h))))
        if conv_carry_in is not None:
            h = h * conv_carry_in
        return h + (self.nin_shortcut(hidden_states) if hasattr(self, "nin_shortcut") else hidden_states)


@pytest.mark.parametrize("args,kwargs", [((), {}), ((None, None, None), {}), ((), {"conv_carry_out": None}),
                                         ((None, 3.0), {}), ((), {"conv_carry_in": 2.0, "scale": 1})], ids=str)
def test_from_module_takes_the_classes_own_arguments(args, kwargs):
    block = Carrying(32, 64).eval()
    x = torch.randn(2, 32, 5, 5)
    for fused in (FusedResnetBlock.from_module(block), copy.deepcopy(FusedResnetBlock.from_module(block))):
        assert list(fused.state_dict()) == list(block.state_dict())
        torch.testing.assert_close(fused(x, *args, **kwargs), block(x, *args, **kwargs), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fused(hidden_states=x), block(x), rtol=1e-4, atol=1e-5)
        with pytest.raises(TypeError):
            fused()


def hooked(block):
    block.register_forward_hook(lambda module, args, output: output * 2)
    return block


def strided(block):
    block.conv1 = nn.Conv2d(32, 32, 3, stride=2, padding=1)
    return block


def without_dropout(block):
    del block.dropout
    return block


@pytest.mark.parametrize("make,reason", [
    (Preactivated, "relu comes before the first norm"),
    (Scaled, "its result is multiplied by 0.7"),
    (WrongGradient, "detach"),
    (DropoutLast, "no norm that is known|is not swish"),
    (AlwaysDropout, "its dropout is 0.1"),
    (Subclass, "branches on"),
    (lambda: hooked(reference.ResnetBlock(in_channels=32, dropout=0.0)), "it has hooks"),
    (Failing, "cannot be traced"),
    (WithBatchNorm, "another submodule, norm3"),
    (WithScale, "parameters or buffers of its own"),
    (lambda: strided(PrivateCopy()), "conv1 is Conv2d"),
    (lambda: without_dropout(PrivateCopy()), "it has no dropout"),
    (lambda: nn.Linear(2, 2), "it has no norm1"),
], ids=["preactivated", "scaled", "wrong gradient", "dropout last", "always dropout", "subclass",
        "hooked", "failing", "batch norm", "own parameter", "strided",
        "no dropout", "linear"])
def test_from_module_refuses_what_it_cannot_stand_in_for(make, reason):
    with pytest.raises(UnsupportedBlock, match=reason):
        FusedResnetBlock.from_module(make())


def test_from_module_of_a_wrapped_convolution_and_a_shared_and_wrapped_norm():
    block = reference.ResnetBlock(in_channels=32, dropout=0.0)
    block.conv1, block.norm2 = nn.Sequential(block.conv1), nn.Sequential(block.norm1)
    x = torch.randn(2, 32, 5, 5)
    torch.testing.assert_close(FusedResnetBlock.from_module(block)(x), block(x), rtol=1e-4, atol=1e-5)


def test_from_module_wherever_it_is_called():
    for context in (torch.inference_mode(), torch.no_grad(), torch.device("meta"), torch.autocast("cpu")):
        block = PrivateCopy()
        with context:
            FusedResnetBlock.from_module(block)


def test_from_module_of_a_block_on_meta():
    fused = FusedResnetBlock.from_module(PrivateCopy().to("meta"))
    assert fused.conv1.weight.is_meta
