"""A norm and the activation behind it in the forward of a module that is no block, as at a decoder's end."""

import pytest
import torch
from patched import assert_close, check, hook, random, randomize
from torch import nn
from torch.nn import functional as F

import ldm_fused
from ldm_fused import functional

pytestmark = pytest.mark.usefixtures("one_thread")


def swish(x):
    return x * torch.sigmoid(x)


class Swish(nn.Module):
    def forward(self, x):
        return swish(x)


class GroupNorm32(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class Parts(nn.Module):
    def __init__(self, act=None, norm=nn.GroupNorm):
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(4, 32, 3, padding=1), nn.Conv2d(32, 3, 3, padding=1)
        self.last, self.act = norm(8, 32), act or nn.SiLU()


def child_in_statements(self, z):
    h = self.conv_in(z)
    h = self.last(h)
    h = self.act(h)
    return self.conv_out(h)


def child_in_an_expression(self, z):
    return self.conv_out(self.act(self.last(self.conv_in(z))))


def child_in_a_list(self, z):
    h = self.conv_in(z)
    h = self.last(h)
    h = [self.act(h)]
    return self.conv_out(h.pop())


def child_where_the_norm_is(self, z):
    h = self.conv_in(z)
    if self.last:
        h = self.last(h)
        h = self.act(h)
    return self.conv_out(h)


def function_in_an_expression(self, z):
    return self.conv_out(swish(self.last(self.conv_in(z))))


def function_in_a_list(self, z):
    h = self.conv_in(z)
    h = self.last(h)
    h = [swish(h)]
    return self.conv_out(h.pop())


def silu_in_an_expression(self, z):
    return self.conv_out(F.silu(self.last(F.relu(self.conv_in(z)))))


def silu_by_a_long_name(self, z):
    return self.conv_out(torch.nn.functional.silu(self.last(torch.relu(self.conv_in(z)))))


CHILD = (child_in_statements, child_in_an_expression, child_in_a_list, child_where_the_norm_is)
FUNCTION = (function_in_an_expression, function_in_a_list, silu_in_an_expression, silu_by_a_long_name)


def model_of(forward, **options):
    cls = type("Decoder", (Parts,), {"forward": forward, "__module__": __name__})
    return randomize(cls(**options))


@pytest.fixture
def activations(monkeypatch):
    """The activation of each fused call."""
    told, plain, checked = [], functional._plain, functional.checked

    def counted(*a):
        y = plain(*a)
        if y is not None:
            told.append(a[5])
        return y

    monkeypatch.setattr(functional, "_plain", counted)
    monkeypatch.setattr(functional, "checked", lambda *a: told.append(a[5]) or checked(*a))
    return told


@pytest.mark.parametrize("act", [nn.SiLU, lambda: nn.SiLU(inplace=True), Swish], ids=["SiLU", "in place", "own class"])
@pytest.mark.parametrize("forward", CHILD, ids=lambda f: f.__name__)
def test_a_child_of_any_name_that_computes_swish(forward, act, activations):
    model = model_of(forward, act=act()).double()
    patched, run = check(model, (random(2, 4, 8, 6),))
    assert patched.replaced == [("", type(model), ("last",))] and not patched.skipped
    assert run.share == 1 and run.fused == 1 and activations == ["silu"]


@pytest.mark.parametrize("forward", FUNCTION, ids=lambda f: f.__name__)
def test_a_global_function_by_any_name(forward, activations):
    model = model_of(forward).double()
    patched, run = check(model, (random(2, 4, 8, 6),))
    assert patched.replaced == [("", type(model), ("last",))] and not patched.skipped
    assert run.share == 1 and run.fused == 1 and activations == ["silu"]


@pytest.mark.parametrize("forward", (*CHILD, *FUNCTION), ids=lambda f: f.__name__)
def test_compiled_whole(forward):
    model, z = model_of(forward), torch.randn(2, 4, 8, 6)
    expected = model(z)
    ldm_fused.patch(model, strict=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert_close([compiled(z)], [expected], 1e-4)


def read_twice(self, z):
    h = self.conv_in(z)
    g = self.last(h)
    h = self.act(g)
    return self.conv_out(h + g)


def called_twice(self, z):
    return self.conv_out(self.act(self.last(self.last(self.conv_in(z)))))


calls = 0


def writes_to_a_global_name(self, z):
    global calls
    calls += 1
    return self.conv_out(swish(self.last(self.conv_in(z))))


def unknown(self, z):
    swish = torch.tanh
    return self.conv_out(swish(self.last(self.conv_in(z))))


@pytest.mark.parametrize("forward,act", [(child_in_an_expression, nn.ReLU), (read_twice, nn.SiLU),
                                         (called_twice, nn.SiLU), (writes_to_a_global_name, nn.SiLU),
                                         (child_in_statements, nn.GELU)])
def test_of_another_end_the_norm_alone_is_fused(forward, act, activations):
    model, before = model_of(forward, act=act()).double(), calls
    patched, run = check(model, (random(2, 4, 8, 6),))
    assert [name for name, _, _ in patched.replaced] == ["last"] and set(activations) == {None} and run.share == 1
    assert calls - before == (5 if forward is writes_to_a_global_name else 0)  # check calls it so often


def test_a_local_name_that_hides_the_function_is_noticed():
    model = model_of(unknown).double()
    z = random(2, 4, 8, 6)
    expected = model(z)
    ldm_fused.patch(model)
    for _ in range(2):
        assert_close([model(z)], [expected])
    assert ldm_fused.report(model).fallbacks == {"swish was not called on what last gave": 2}


@pytest.mark.parametrize("part,reason", [("last", "it has hooks"), ("act", "its activation: it has hooks")])
def test_a_hooked_part_is_called(part, reason):
    model = model_of(child_in_an_expression, act=Swish()).double()
    hook(getattr(model, part))
    z = random(2, 4, 8, 6)
    expected = model(z)
    ldm_fused.patch(model)
    assert_close([model(z)], [expected])
    assert ldm_fused.report(model).fallbacks == {reason: 1}


@pytest.mark.parametrize("forward", [child_in_statements, silu_in_an_expression], ids=lambda f: f.__name__)
def test_a_norm_that_computes_in_float32(forward, activations):
    model = model_of(forward, norm=GroupNorm32)
    patched, run = check(model, (random(2, 4, 8, 6, dtype=torch.float32),), tolerance=1e-4)
    assert patched.replaced == [("", type(model), ("last",))] and activations[-1] == "silu" and run.share == 1
