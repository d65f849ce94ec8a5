"""Checkpoints compute a forward again in the backward pass, when what was looked at in the forward may have changed."""

import contextlib

import pytest
import torch
from patched import TwoNorms, assert_close, random, randomize
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ldm_fused
from ldm_fused import FusedResnetBlock

pytestmark = pytest.mark.usefixtures("one_thread")


class Model(nn.Module):
    """Parts of each kind, and a checkpoint around each."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([
            ldm_fused.reference.ResnetBlock(in_channels=32, dropout=0.0), TwoNorms(), nn.GroupNorm(8, 32),
            nn.Sequential(nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 32, 1))])

    def forward(self, x):
        for part in self.parts:
            x = checkpoint(part, x, use_reentrant=False)
        return x


@contextlib.contextmanager
def global_hook():
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        yield
    finally:
        handle.remove()


CONTEXTS = {"disabled": ldm_fused.disabled, "global hook": global_hook,
            "flop counter": lambda: FlopCounterMode(display=False)}


@pytest.mark.parametrize("around", ["forward", "backward"])
@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_around_one_pass_only(name, around, recompute, biases):
    if (name, around) == ("flop counter", "backward"):
        pytest.skip("torch's flop counter does not work around autograd.grad")
    model, x = randomize(Model()).double(), random(2, 32, 6, 5)
    leaves = x, *model.parameters()
    expected = torch.autograd.grad(model(x).square().sum(), leaves)
    ldm_fused.patch(model, recompute=recompute)
    for _ in range(2):
        with CONTEXTS[name]() if around == "forward" else contextlib.nullcontext():
            y = model(x)
        with CONTEXTS[name]() if around == "backward" else contextlib.nullcontext():
            assert_close(torch.autograd.grad(y.square().sum(), leaves), expected)


@pytest.mark.parametrize("part", ["parts.0.norm2", "parts.1.norm1", "parts.3.0", "parts.0.conv1"])
def test_a_hook_that_removes_itself(part):
    model, x = randomize(Model()).double(), random(2, 32, 6, 5)
    leaves = x, *model.parameters()
    expected = torch.autograd.grad(model(x).square().sum(), leaves)
    ldm_fused.patch(model)
    handles = []

    def once(module, args, output):
        handles[0].remove()

    handles.append(model.get_submodule(part).register_forward_hook(once))
    assert_close(torch.autograd.grad(model(x).square().sum(), leaves), expected)


@pytest.mark.parametrize("name", CONTEXTS)
def test_our_own_block_that_recomputes(name):
    block, x = randomize(FusedResnetBlock(in_channels=32, dropout=0.0)).double(), random(2, 32, 6, 5)
    leaves = x, *block.parameters()
    expected = torch.autograd.grad(block(x).square().sum(), leaves)
    block.recompute = True
    with CONTEXTS[name]():
        y = block(x)
    assert_close(torch.autograd.grad(y.square().sum(), leaves), expected)


def test_two_backward_passes_and_two_forwards_in_another_order():
    model, x = randomize(Model()).double(), random(2, 32, 6, 5)
    leaves = x, *model.parameters()
    expected = torch.autograd.grad(model(x).square().sum(), leaves)
    ldm_fused.patch(model)
    with global_hook():
        first = model(x).square().sum()
    second = model(x).square().sum()
    for y in (second, first):
        assert_close(torch.autograd.grad(y, leaves, retain_graph=True), expected)
        assert_close(torch.autograd.grad(y, leaves), expected)
