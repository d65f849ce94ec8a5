"""The short ways of common calls: an op of fewer arguments, and PyTorch's own kernel where nothing is fused."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import ldm_fused
from ldm_fused import functional, ops

ENOUGH = 2, 64, 32, 32  # elements that PyTorch's kernel is worth


def leaves(shape=(2, 8, 5, 7), dtype=torch.float32):
    """x, weight and bias, which are differentiated."""
    return [torch.randn(size).to(dtype).requires_grad_() for size in (shape, shape[1], shape[1])]


def gradients(f, leaves, dy):
    return torch.autograd.grad(f(*leaves), leaves, dy)


def is_pytorchs(y):
    return y.grad_fn.name() == "NativeGroupNormBackward0"


def test_the_short_way_gives_the_bits_of_the_long_one(monkeypatch):
    x, weight, bias = leaves()
    call = lambda x, weight, bias: ldm_fused.group_norm_silu(x, 4, weight, bias)  # noqa: E731
    short = call(x, weight, bias)
    assert type(short.grad_fn).__name__ == "PlainGroupNormActBackward"
    dy = torch.randn_like(short)
    found = gradients(call, (x, weight, bias), dy)
    monkeypatch.setattr(functional, "_plain", lambda *a: None)
    long = call(x, weight, bias)
    assert type(long.grad_fn).__name__ == "GroupNormActBackward"
    assert torch.equal(short, long)
    assert all(map(torch.equal, found, gradients(call, (x, weight, bias), dy)))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_only_what_is_wanted_gets_a_gradient(wanted):
    tensors = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(leaves())]
    y = ldm_fused.group_norm_silu(tensors[0], 4, *tensors[1:])
    y.backward(torch.randn_like(y))
    assert [i for i, t in enumerate(tensors) if t.grad is not None] == list(wanted)


def test_hooks_on_saved_tensors_are_given_what_the_long_way_saves():
    x, weight, bias = leaves()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ldm_fused.group_norm_silu(x, 4, weight, bias)
    assert type(y.grad_fn).__name__ == "GroupNormActBackward" and len(saved) == 5
    y.backward(torch.ones_like(y))


def test_a_checkpoint_within_which_the_switch_changes_repeats_its_forward():
    x, weight, bias = leaves()
    y = checkpoint(lambda: ldm_fused.group_norm_silu(x, 4, weight, bias).square(), use_reentrant=False)
    with ldm_fused.disabled():
        found = torch.autograd.grad(y.sum(), (x, weight, bias))
    expected = gradients(lambda *a: ldm_fused.group_norm_silu(a[0], 4, *a[1:]).square().sum(), (x, weight, bias),
                         torch.tensor(1.0))
    assert all(map(torch.equal, found, expected))


def test_float32_without_an_activation_is_pytorchs_own():
    x, weight, bias = leaves(ENOUGH)
    y = ldm_fused.group_norm_act(x, 32, weight, bias, activation=None)
    assert is_pytorchs(y) and torch.equal(y, F.group_norm(x, 32, weight, bias))
    with torch.no_grad():
        assert torch.equal(ldm_fused.group_norm_act(x, 32, weight, bias, activation=None), y)


@pytest.mark.parametrize("why", ["activation", "bfloat16", "float64", "channels_last", "small", "a bias alone",
                                 "pre_bias", "strides"])
def test_what_is_not_pytorchs(why):
    dtype = {"bfloat16": torch.bfloat16, "float64": torch.float64}.get(why, torch.float32)
    x, weight, bias = leaves((2, 64, 4, 4) if why == "small" else ENOUGH, dtype)
    if why == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    if why == "strides":
        x = x.transpose(2, 3)
    y = ldm_fused.group_norm_act(x, 32, None if why == "a bias alone" else weight, bias,
                                 activation="silu" if why == "activation" else None,
                                 pre_bias=weight if why == "pre_bias" else None)
    assert not is_pytorchs(y)


def test_what_is_pytorchs_does_not_depend_on_the_threads():
    tensors, dy, threads, found = leaves(ENOUGH), torch.randn(ENOUGH), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = ldm_fused.group_norm_act(tensors[0], 32, *tensors[1:], activation=None)
            found.append([y, *torch.autograd.grad(y, tensors, dy)])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, found[0] * 2, found[1] + found[2]))


@pytest.mark.parametrize("needs", itertools.product([False, True], repeat=3))
def test_the_backward_op_gives_what_is_needed_and_the_bits_of_the_other(needs):
    x, weight, bias = (t.detach() for t in leaves())
    dy = torch.randn_like(x)
    _, mean, rstd = ops.group_norm_act_training(x, 4, weight, bias, 1e-5, True)
    found = ops.group_norm_act_training_backward(dy, x, mean, rstd, weight, bias, True, *needs)
    others = ops.group_norm_act_backward(dy, x, mean, rstd, weight, bias, True, None, None, None, [*needs] + 3 * [False])
    assert [t.numel() > 0 for t in found] == list(needs)
    assert all(map(torch.equal, found, others))
