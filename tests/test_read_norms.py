"""Norm classes that nobody registered: known by what their forward computes."""

import gc
import weakref

import pytest
import torch
from patched import assert_close, check, random, randomize
from torch import nn
from torch.nn import functional as F

import ldm_fused
from ldm_fused import bypass
from ldm_fused.patching import adapter

pytestmark = pytest.mark.usefixtures("one_thread")


class GroupNorm32(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


class Unchanged(nn.GroupNorm):
    pass


class Functional(nn.GroupNorm):
    def forward(self, input):
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(input.float(), self.num_groups, weight, bias, self.eps).to(input.dtype)


class Alone(nn.Module):
    """As EDM's."""

    def __init__(self, num_groups, num_channels, eps=1e-5):
        super().__init__()
        self.num_groups, self.eps = num_groups, eps
        self.weight, self.bias = nn.Parameter(torch.ones(num_channels)), nn.Parameter(torch.zeros(num_channels))

    def forward(self, x):
        return F.group_norm(x, num_groups=self.num_groups, weight=self.weight.to(x.dtype), bias=self.bias.to(x.dtype),
                            eps=self.eps)


class WithSwish(nn.GroupNorm):
    """As glide's."""

    def __init__(self, num_groups, num_channels, swish=1.0):
        super().__init__(num_groups, num_channels)
        self.swish = swish

    def forward(self, x):
        y = super().forward(x.float()).to(x.dtype)
        if self.swish == 1.0:
            y = F.silu(y)
        elif self.swish:
            y = y * F.sigmoid(y * float(self.swish))
        return y


KNOWN = [GroupNorm32, Unchanged, Functional, Alone, WithSwish]


@pytest.mark.parametrize("sizes", [(), (9,), (5, 4), (3, 4, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", KNOWN)
def test_a_norm_that_can_be_read_is_fused(cls, dtype, sizes):
    norm = randomize(cls(8, 32))
    x = torch.randn(2, 32, *sizes)
    exact = norm(x)
    weights = dtype if cls is Unchanged else torch.float32
    norm, x = norm.to(weights), x.to(dtype)
    expected = norm(x)
    assert ldm_fused.patch(norm, strict=True).replaced
    y = norm(x)
    assert y.dtype == expected.dtype and ldm_fused.report(norm).fused == 1
    unit = torch.finfo(dtype).eps
    assert (y - exact).abs().max() <= 2 * (expected - exact).abs().max() + 4 * unit * exact.abs().max()


@pytest.mark.parametrize("swish,told", [(1.0, 1), (0.0, 1), (1.702, 0)])
def test_an_activation_in_the_norm(swish, told):
    model = nn.Sequential(WithSwish(8, 32, swish), nn.Conv2d(32, 8, 3), WithSwish(8, 8, 0.0))
    patched, run = check(model, (random(2, 32, 6, 5, dtype=torch.float32),), tolerance=1e-4)
    assert run.fused == 1 + told and len(patched.skipped) == 1 - told


def test_a_norm_that_changes_its_mind_is_called():
    norm, x = randomize(WithSwish(8, 32)), torch.randn(2, 32, 5)
    ldm_fused.patch(norm)
    norm.swish = 2.0
    assert torch.equal(norm(x), WithSwish.forward(norm, x))
    assert list(ldm_fused.report(norm).fallbacks) == ["its attributes have changed since it was read"]


class InBlock(nn.Module):
    """Glide's block: the activation is the norm's."""

    def __init__(self):
        super().__init__()
        self.one, self.two = WithSwish(8, 32), WithSwish(8, 32)
        self.first, self.second = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x):
        return x + self.second(self.two(self.first(self.one(x))))


def test_a_block_whose_norms_activate():
    model, x = InBlock(), random(2, 32, 6, 5, dtype=torch.float32)
    patched, run = check(model, (x,), tolerance=1e-3)
    assert patched.replaced == [("", InBlock, ("one", "two"))] and run.share == 1
    expected = model(x)
    ldm_fused.patch(model)
    model.two.register_forward_hook(lambda module, args, output: output)
    assert_close([model(x)], [expected], 1e-4)
    assert ldm_fused.report(model).fallbacks == {"it has hooks": 1}


class Twice(nn.GroupNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class Float32(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.float())


class Frozen(nn.GroupNorm):
    def forward(self, x):
        return F.group_norm(x, self.num_groups, None, None, self.eps)


class OneMore(nn.GroupNorm):
    def forward(self, x):
        return F.group_norm(x, self.num_groups, self.weight + 1, self.bias, self.eps)


class BySize(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x) if x.numel() < 2**31 else x


@pytest.mark.parametrize("cls", [Twice, Float32, Frozen, OneMore, BySize])
def test_a_norm_that_computes_something_else_is_called_and_counted(cls):
    model = nn.Sequential(nn.GroupNorm(8, 32), cls(8, 32))
    x = torch.randn(2, 32, 5)
    expected = randomize(model)(x)
    found = ldm_fused.patch(model)
    assert [name for name, _, _ in found.replaced] == ["0"]
    assert found.skipped[0][2].startswith("it is a subclass of GroupNorm: ")
    assert_close([model(x)], [expected], 1e-5)
    run = ldm_fused.report(model)
    assert run.share == 0.5 and list(run.fallbacks) == [found.skipped[0][2]]
    with pytest.raises(ldm_fused.UnsupportedBlock):
        ldm_fused.patch(model, strict=True)
    ldm_fused.unpatch(model)
    assert type(model[1]) is cls and torch.equal(model(x), expected)


class InflatedGroupNorm(nn.GroupNorm):
    """As AnimateDiff's, which goes by frame."""

    def forward(self, x):
        frames = x.shape[2]
        x = super().forward(x.transpose(1, 2).flatten(0, 1))
        return x.unflatten(0, (-1, frames)).transpose(1, 2)


class Inflated(nn.Module):
    """AnimateDiff's block."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = InflatedGroupNorm(8, 32), InflatedGroupNorm(8, 32)
        self.conv1, self.conv2 = nn.Conv3d(32, 32, 3, padding=1), nn.Conv3d(32, 32, 3, padding=1)
        self.last = nn.GroupNorm(8, 32)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.last(x + self.conv2(F.silu(self.norm2(h))))


def test_norms_that_go_by_frame_are_called_and_counted():
    model, x = randomize(Inflated()).double(), random(2, 32, 3, 5, 4)
    found, run = check(model, (x,))
    assert [name for name, _, _ in found.replaced] == ["last"]
    assert [name for name, _, _ in found.skipped] == ["norm1", "norm2"]
    assert run.fused == 1 and run.share == pytest.approx(1 / 3) and sum(run.fallbacks.values()) == 2


@pytest.fixture
def register_norm():
    yield ldm_fused.register_norm
    for cls in adapter.norms:
        bypass.forget_norm(cls)
    adapter.norms.clear()


def hidden(x):
    return x


class Hidden(nn.GroupNorm):
    """Which cannot be read."""

    def forward(self, x):
        try:
            return super().forward(hidden(x))
        finally:
            pass


class HiddenTwice(Hidden):
    def forward(self, x):
        try:
            return 2 * super().forward(x)
        finally:
            pass


def test_register_norm(register_norm):
    norm, x = randomize(Hidden(8, 32)).double(), random(2, 32, 5)
    assert "catches exceptions" in ldm_fused.patch(norm).skipped[0][2]
    ldm_fused.unpatch(norm)
    register_norm(Hidden)
    patched, run = check(norm, (x,))
    assert run.share == 1 and not patched.skipped
    for wrong in (norm, int):
        with pytest.raises(TypeError):
            register_norm(wrong)


def test_a_registered_norm_is_tried(register_norm):
    register_norm(HiddenTwice)
    assert "in a trial" in ldm_fused.patch(HiddenTwice(8, 32)).skipped[0][2]


@pytest.mark.parametrize("channels", [8, 16, 32])
def test_one_channel_a_group_and_few(channels):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = GroupNorm32(8, channels), GroupNorm32(8, channels)
            self.first = nn.Conv2d(channels, channels, 3, padding=1)
            self.second = nn.Conv2d(channels, channels, 3, padding=1)

        def forward(self, x):
            return x + self.second(F.silu(self.two(self.first(F.silu(self.one(x))))))

    for seed in range(10):
        torch.manual_seed(seed)
        assert ldm_fused.patch(randomize(Block()), strict=True).replaced


def test_lazy_modules():
    model = nn.Sequential(nn.GroupNorm(8, 32), nn.SiLU(), nn.LazyConv2d(8, 3))
    ldm_fused.patch(model)
    assert model(torch.randn(1, 32, 5, 5)).shape == (1, 8, 3, 3) and ldm_fused.report(model).fused == 1


def test_a_patched_class_goes_with_its_last_instance():
    def make():
        class Block(InBlock):
            pass
        model = Block()
        ldm_fused.patch(model, strict=True)
        return weakref.ref(type(model)), weakref.ref(Block)

    references = make()
    gc.collect()
    gc.collect()  # what was made of a class goes before it
    assert [r() for r in references] == [None, None]
