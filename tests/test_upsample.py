"""ldm_fused.patch(model, fold_upsample=True): nearest upsampling and its convolution in one.

tests/integrations has the libraries' own classes.
"""

import copy
import pickle

import pytest
import torch
from oracle import laid_out
from patched import assert_close, check, random, randomize, results
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import ldm_fused
from ldm_fused import UnsupportedBlock
from ldm_fused.patching import upsample

pytestmark = pytest.mark.usefixtures("one_thread")


class Sizes(nn.Module):
    """It names the sizes, and takes an argument that it does not use, as MONAI's."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 4, 3, padding="same", bias=False)

    def forward(self, x, emb=None):
        del emb
        if x.shape[1] != self.conv.in_channels:
            raise ValueError(f"not {x.shape[1]}")
        return self.conv(F.interpolate(x, size=[x.shape[-2] * 2, 2 * x.shape[3]], mode="nearest-exact"))


class Monais(nn.Sequential):
    """A Sequential of its own kind, whose convolution is in another one."""

    def __init__(self, up=None):
        super().__init__()
        self.up = up or nn.Upsample(scale_factor=(2.0, 2.0))
        self.postconv = Held()
        self.postconv.add_module("conv", nn.Conv2d(8, 8, 3, padding=1))


class Held(nn.Sequential):
    pass


def openai(load, **options):
    load("guided_diffusion.nn")
    return load("guided_diffusion.unet").Upsample(8, **options)


MAKE = {
    "ldm": (lambda load: load("ldm.modules.diffusionmodules.model").Upsample(8), (3, 8, 5, 7)),
    "flux": (lambda load: load("flux.modules.autoencoder").Upsample(8), (1, 8, 6, 1)),
    "openai": (openai, (2, 8, 1, 1)),
    "openai 1-D": (lambda load: openai(load, dims=1, out_channels=6), (2, 8, 5)),
    "openai videos": (lambda load: openai(load, dims=3, out_channels=4), (2, 8, 3, 4, 5)),
    "sizes": (lambda load: Sizes(), (2, 8, 4, 3)),
    "monai": (lambda load: Monais(), (2, 8, 4, 3)),
    "sequential": (lambda load: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv3d(8, 4, 3, padding=1)),
                   (1, 8, 2, 3, 4)),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", MAKE)
def test_outputs_and_gradients(name, layout, load):
    make, shape = MAKE[name]
    x = laid_out(torch.randn(shape, dtype=torch.float64), layout).requires_grad_()
    patched, run = check(make(load).double(), (x,), fold_upsample=True, strict=True)
    assert len(patched.replaced) == 1 and not run.sites
    [site] = run.upsamplings
    assert site.calls >= 1 and not site.fallbacks and site.name in str(run)


@pytest.mark.parametrize("name", MAKE)
@torch.no_grad()
def test_inference_in_float32(name, load):
    make, shape = MAKE[name]
    model, x = randomize(make(load)), torch.randn(shape)
    exact = copy.deepcopy(model).double()(x.double())
    ldm_fused.patch(model, fold_upsample=True)
    assert_close([model(x).double()], [exact], 1e-5)


@pytest.mark.parametrize("way", [upsample.transposed, upsample.by_phases])
@pytest.mark.parametrize("sizes", [(1,), (6,), (1, 1), (5, 3), (2, 3, 1), (1, 2, 2)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@torch.no_grad()
def test_each_way_at_borders_and_odd_sizes(sizes, way, layout):
    """Each border by itself, against an interpolation in float64."""
    for doubled in {(True,) * len(sizes), (False, *(True,) * (len(sizes) - 1))} - {(False,)}:
        x = laid_out(torch.randn(3, 4, *sizes, dtype=torch.float64), layout)
        weight, bias = torch.randn(5, 4, *(3,) * len(sizes), dtype=torch.float64), torch.randn(5, dtype=torch.float64)
        large = x
        for axis, doubles in enumerate(doubled, 2):
            large = large.repeat_interleave(2, axis) if doubles else large
        expected = getattr(F, f"conv{len(sizes)}d")(large, weight, bias, padding=1)
        y = way(x, weight, bias, doubled)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        for axis in range(2, y.dim()):
            for end in (0, -1):
                torch.testing.assert_close(y.select(axis, end), expected.select(axis, end), rtol=1e-12, atol=1e-12)
        if len(sizes) == 2 and sizes[0] > 1:
            assert (y.stride(1) == 1) == (layout == "channels_last")


def errors(model, x, dy):
    """What to compare, in float64: output, each of its borders, and the gradients of x and of the parameters."""
    y = model(x)
    dx, *gradients = torch.autograd.grad(y, (x, *model.parameters()), dy.to(y.dtype))
    with torch.no_grad():
        inference = model(x)
    borders = [t.select(axis, end) for t in (y, inference) for axis in (2, 3) for end in (0, -1)]
    return [t.detach().double() for t in (y, inference, *borders, dx, torch.cat([g.flatten() for g in gradients]))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("batch", [1, 3])
def test_accuracy(dtype, layout, batch, load):
    """The root mean square error is at most 1.5 times the class's own: of outputs, borders and gradients."""
    model = load("somebodys.copy").Upsample(128).to(dtype)
    x = laid_out(torch.randn(batch, 128, 9, 7).to(dtype), layout).requires_grad_()
    dy = torch.randn(batch, 128, 18, 14).to(dtype)
    exact = errors(copy.deepcopy(model).double(), x.detach().double().requires_grad_(), dy)
    theirs = errors(model, x, dy)
    ldm_fused.patch(model, fold_upsample=True)
    for ours, eager, true in zip(errors(model, x, dy), theirs, exact):
        assert (ours - true).norm() <= 1.5 * (eager - true).norm()


# ---- What is not folded ----------------------------------------------------------------------------------------------


class Then(nn.Module):
    """Upsampling by ``up``, then ``conv``."""

    def __init__(self, conv=None, **up):
        super().__init__()
        self.conv = conv or nn.Conv2d(8, 8, 3, padding=1)
        self.size, self.factor, self.mode = up.get("size"), up.get("scale_factor", 2.0), up.get("mode", "nearest")

    def forward(self, x):
        return self.conv(F.interpolate(x, self.size, self.factor, mode=self.mode))


class InTraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2 if self.training else 2.0))


class Clamped(Then):
    def forward(self, x):
        return self.conv(F.interpolate(x.clamp(-1, 1), scale_factor=2))


@pytest.mark.parametrize("make,reason", [
    (lambda: Then(mode="bilinear"), "interpolates by 'bilinear'"),
    (lambda: Then(scale_factor=3), "does not double"),
    (lambda: Then(scale_factor=1), "does not double"),
    (lambda: Then(scale_factor=(2, 2)), "it reads self.factor, a tuple"),  # it is right, and may become a list
    (lambda: Then(scale_factor=None, size=[10, 8]), "it reads self.size, a list"),
    (lambda: Then(nn.Conv2d(8, 8, 5, padding=2)), "its convolution is Conv2d"),
    (lambda: Then(nn.Conv2d(8, 8, 3)), "its convolution is Conv2d"),
    (lambda: Then(nn.Conv2d(8, 8, 3, padding=1, stride=2)), "its convolution is Conv2d"),
    (lambda: Then(nn.Conv2d(8, 8, 3, padding=1, groups=8)), "its convolution is Conv2d"),
    (lambda: Then(nn.Conv2d(8, 8, 3, padding=2, dilation=2)), "its convolution is Conv2d"),
    (lambda: Then(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")), "its convolution is Conv2d"),
    (lambda: Then(nn.ConvTranspose2d(8, 8, 3, padding=1)), "its convolution is a ConvTranspose2d"),
    (InTraining, "differs in training"),
    (Clamped, "not of its input"),
    (lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1)), "no interpolation"),
    (lambda: Monais(nn.Upsample(scale_factor=2, mode="bilinear")), "interpolates by 'bilinear'"),
], ids=str)
def test_what_is_no_such_upsampling_is_skipped_with_the_reason(make, reason):
    model, x = make().eval(), torch.randn(1, 8, 5, 4)
    expected = model(x)
    found = ldm_fused.patch(model, fold_upsample=True)
    assert not found.replaced and torch.equal(model(x), expected)
    [(_, cls, told)] = found.skipped
    assert reason in told and cls is type(model)
    with pytest.raises(UnsupportedBlock, match="1 modules"):
        ldm_fused.patch(model, fold_upsample=True, strict=True)
    assert not ldm_fused.patch(model).skipped  # nobody has asked


def test_it_is_a_switch(load):
    model = load("somebodys.copy").Upsample(8)
    assert not ldm_fused.patch(model).replaced and not ldm_fused.is_patched(model)


# ---- What happens at run time ----------------------------------------------------------------------------------------


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


def replace_forward(conv):
    conv.forward = lambda x: 3 * type(conv).forward(conv, x)


@pytest.mark.parametrize("disturb,reason", [
    (lambda m: m.conv.register_forward_hook(lambda module, args, y: 2 * y), "it has hooks"),
    (lambda m: m.conv.register_forward_pre_hook(lambda module, args: (args[0] + 1,)), "it has hooks"),
    (lambda m: replace_forward(m.conv), "its forward is replaced"),
    (lambda m: parametrizations.weight_norm(m.conv), "ParametrizedConv2d"),
    (lambda m: setattr(m, "conv", Lora(m.conv)), "it is a Lora"),
    (lambda m: setattr(m.conv, "_conv_forward", lambda x, w, b: 0 * F.conv2d(x, w, b, padding=1)), "_conv_forward"),
    (lambda m: setattr(m.conv, "padding_mode", "circular"), "padding_mode=circular"),
    (lambda m: setattr(m, "with_conv", False), "its with_conv has changed"),
], ids=["hook", "pre-hook", "forward", "parametrized", "wrapped", "_conv_forward", "attribute", "the class's"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_convolution_that_was_changed_is_called(disturb, reason, order, load):
    model, x = randomize(load("somebodys.copy").Upsample(8)).double(), random(2, 8, 4, 3)
    if order == "before":
        disturb(model)
    found = ldm_fused.patch(model, fold_upsample=True)
    if order == "after":
        disturb(model)
    with ldm_fused.disabled():
        expected = model(x)
    assert torch.equal(model(x), expected)
    run = ldm_fused.report(model)
    assert found.skipped and not run.upsamplings or any(reason in told for told in run.upsamplings[0].fallbacks)


@pytest.mark.parametrize("disturb,reason", [
    (lambda m: setattr(m.up, "scale_factor", 3.0), "something else"),
    (lambda m: setattr(m.up, "mode", "bilinear"), "something else"),
    (lambda m: setattr(m, "up", nn.Upsample(size=(9, 9))), "something else"),
    (lambda m: setattr(m, "up", nn.Identity()), "it is a Identity"),
    (lambda m: m.up.register_forward_hook(lambda module, args, y: 2 * y), "it has hooks"),
    (lambda m: m.postconv.register_forward_hook(lambda module, args, y: 2 * y), "its Held: it has hooks"),
    (lambda m: m.postconv.add_module("act", nn.SiLU()), "its Held: it has other parts"),
    (lambda m: m.add_module("act", nn.SiLU()), "it has other parts"),
], ids=["factor", "mode", "size", "another", "hook", "hook on a container", "another layer", "another part"])
def test_parts_of_a_sequential_that_were_changed_are_called(disturb, reason):
    model, x = randomize(Monais()).double(), random(2, 8, 4, 3)
    ldm_fused.patch(model, fold_upsample=True, strict=True)
    disturb(model)
    with ldm_fused.disabled():
        expected = model(x)
    assert torch.equal(model(x), expected)
    [told] = ldm_fused.report(model).upsamplings[0].fallbacks
    assert reason in told


@pytest.mark.parametrize("change", [
    lambda m: m.load_state_dict({name: t + 1 for name, t in m.state_dict().items()}),
    lambda m: m.conv.weight.data.add_(1),
    lambda m: setattr(m.conv.weight, "data", m.conv.weight.data + 1),
    lambda m: setattr(m.conv, "weight", nn.Parameter(m.conv.weight + 1)),
    lambda m: torch.optim.SGD(m.parameters(), 0.1).step(),
], ids=["load_state_dict", "data in place", "data", "parameter", "optimizer"])
def test_every_change_of_the_weight_is_seen(change, load):
    model, x = randomize(load("somebodys.copy").Upsample(8)), torch.randn(2, 8, 4, 3)
    ldm_fused.patch(model, fold_upsample=True)
    model(x).square().sum().backward()
    with torch.no_grad():
        before = model(x)
        change(model)
        after = model(x)
    with ldm_fused.disabled():
        assert_close([after], [model(x)], 1e-5)
    assert not torch.allclose(before, after)


def test_other_inputs_are_refused_as_by_the_class(load):
    model = openai(load)
    ldm_fused.patch(model, fold_upsample=True)
    with pytest.raises(AssertionError):
        model(torch.randn(1, 4, 5, 5))


@pytest.mark.parametrize("other", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_are_folded(other, load):
    model, x = randomize(load("ldm.modules.diffusionmodules.model").Upsample(8)), torch.randn(2, 8, 4, 3)
    ldm_fused.patch(model, fold_upsample=True)
    y = model(x)
    found = other(model)
    assert torch.equal(found(x), y) and ldm_fused.report(found).upsamplings[0].calls == 1
    ldm_fused.unpatch(found)
    assert not ldm_fused.is_patched(found) and ldm_fused.is_patched(model)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compiled_and_transformed(memory_format, load):
    model, x = randomize(load("somebodys.copy").Upsample(8)).double(), random(2, 8, 4, 3)
    expected = results(model, (x,))
    ldm_fused.patch(model, fold_upsample=True)
    x = x.detach().contiguous(memory_format=memory_format).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    assert_close(results(model, (x,)), expected)
    torch.manual_seed(7)
    y = compiled(x)
    assert_close([y, *torch.autograd.grad(y, x, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape))],
                 expected[:2])
    tangent = torch.randn_like(x)
    _, found = torch.func.jvp(model, (x.detach(),), (tangent,))
    assert_close([found], [model(tangent) - model(torch.zeros_like(tangent))])
    assert_close([torch.func.vmap(model)(torch.stack([x, 2 * x]))], [torch.stack([model(x), model(2 * x)])])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed(use_reentrant, load):
    model, x = randomize(load("somebodys.copy").Upsample(8)), torch.randn(2, 8, 4, 3, requires_grad=True)
    ldm_fused.patch(model, fold_upsample=True)
    y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=use_reentrant)
    assert_close([y], [model(x)], 1e-5)
    y.sum().backward()
    assert_close([x.grad], torch.autograd.grad(model(x).sum(), x), 1e-5)
