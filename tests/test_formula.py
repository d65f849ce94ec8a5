"""Classes that nobody registered: known by the formula that their forward computes, and by nothing else."""

import copy
import os

import numpy as np
import pytest
import torch
from patched import assert_close, check, random, randomize
from torch import nn
from torch.nn import functional as F

import ldm_fused
from ldm_fused.patching import Block

pytestmark = pytest.mark.usefixtures("one_thread")


def nonlinearity(x):
    return x * torch.sigmoid(x)


class Swish(nn.Module):
    def forward(self, x):
        return x * x.sigmoid()


class GroupNorm32(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class Causal(nn.Module):
    """A convolution of somebody's own."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 3)

    def forward(self, x):
        return self.conv(F.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate"))


class Parts(nn.Module):
    """The parts of a block, by names that no library has."""

    def __init__(self, channels=32, out_channels=32, emb=24, norm=nn.GroupNorm):
        super().__init__()
        self.a, self.b = norm(8, channels), norm(8, out_channels)
        self.c = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.d = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.e = nn.Linear(emb, out_channels)
        self.f = nn.Linear(emb, 2 * out_channels)
        self.drop, self.p = nn.Dropout(0.1), 0.1
        self.same = nn.Identity()
        self.act, self.swish = nn.SiLU(inplace=True), Swish()
        self.skip = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()
        self.gate = torch.tensor(1.0)
        self.factor, self.numpy_factor, self.flag, self.log = 0.5**0.5, np.sqrt(0.5), False, []

    def body(self, x):
        return self.d(F.silu(self.b(self.c(F.silu(self.a(x))))))


def block(forward, **options):
    """An instance of a class of its own with that forward."""
    cls = type("Block", (Parts,), {"forward": forward, "__module__": __name__})
    return randomize(cls(**options))


# ---- Served ------------------------------------------------------------------------------------------------------


def plain(self, x):
    return x + self.body(x)


def other_way_round(self, x, *, flag=None):
    h = nonlinearity(self.a(x))
    h = self.d(self.drop(nonlinearity(self.b(self.c(h)))))
    return h + self.skip(x)


def modules_for_swish(self, x):
    return self.skip(x) + self.d(self.same(self.swish(self.b(self.c(self.act(self.a(x)))))))


def embedding_added(self, x, emb):
    h = self.c(F.silu(self.a(x)))
    h = h + self.e(F.silu(emb))[:, :, None, None]
    return self.skip(x) + self.d(F.dropout(F.silu(self.b(h)), self.p, training=self.training))


def embedding_by_rank(self, x, emb=None, more=None, **others):
    h = self.c(F.silu(self.a(x)))
    if emb is not None:
        emb = self.e(emb).type(h.dtype)
        while len(emb.shape) < len(h.shape):
            emb = emb[..., None]
        h += emb
    return self.skip(x) + self.d(F.silu(self.b(h)))


def scale_and_shift(self, x, emb):
    shift, scale = self.f(self.swish(emb))[..., None, None].chunk(2, dim=1)
    h = self.b(self.c(F.silu(self.a(x)))) * (1 + scale) + shift
    return (self.d(F.silu(h)) + self.skip(x)) * self.factor


def addcmul(self, x, emb):
    scale, shift = self.f(emb).unsqueeze(2).unsqueeze(3).to(x.dtype).chunk(chunks=2, dim=1)
    h = torch.addcmul(shift, self.b(self.c(F.silu(self.a(x)))), scale + 1)
    return (self.d(F.silu(h)) + self.skip(x)) / 2


def numpy_factor(self, x):
    return (self.skip(x) + self.body(x)) * self.numpy_factor


def branches(self, x, emb=None):
    factor = self.factor if self.flag or not hasattr(self, "act") else 1.0
    if self.flag is None and emb is not None:
        raise ValueError
    h = self.body(x.contiguous())
    return (h + x) * factor


SERVED = {f.__name__: f for f in (plain, other_way_round, modules_for_swish, embedding_added, embedding_by_rank,
                                  scale_and_shift, addcmul, numpy_factor, branches)}
WITH_EMBEDDING = ("embedding_added", "embedding_by_rank", "scale_and_shift", "addcmul")


@pytest.mark.parametrize("norm", [nn.GroupNorm, GroupNorm32])
@pytest.mark.parametrize("name", SERVED)
def test_a_block_of_any_names_is_fused(name, norm, biases):
    wider = name not in ("plain", "branches")
    model = block(SERVED[name], out_channels=64 if wider else 32, norm=norm)
    dtype, tolerance = (torch.float64, 1e-9) if norm is nn.GroupNorm else (torch.float32, 1e-3)
    arguments = random(2, 32, 6, 5, dtype=dtype), *([random(2, 24, dtype=dtype)] if name in WITH_EMBEDDING else [])
    patched, run = check(model.to(dtype), arguments, tolerance=tolerance)
    assert patched.replaced == [("", type(model), ("a", "b"))] and not patched.skipped and run.share == 1


@pytest.mark.parametrize("name", ["numpy_factor", "scale_and_shift", "embedding_by_rank"])
def test_what_is_read_compiles_in_one_graph(name):
    model = block(SERVED[name])
    arguments = random(2, 32, 6, 5, dtype=torch.float32), *([torch.randn(2, 24)] if name in WITH_EMBEDDING else [])
    expected = model(*arguments)
    ldm_fused.patch(model, strict=True)
    torch._dynamo.reset()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert_close([run(*arguments)], [expected], 1e-4)


def test_blocks_each_with_a_number_of_numpys_compile_in_one_graph():
    model = nn.Sequential(*(block(numpy_factor) for _ in range(2)))
    model[1].numpy_factor = np.sqrt(0.5)
    x = random(2, 32, 6, 5, dtype=torch.float32)
    expected = model(x)
    ldm_fused.patch(model, strict=True)
    torch._dynamo.reset()
    for run in (model, copy.deepcopy(model)):
        assert_close([torch.compile(run, backend="aot_eager", fullgraph=True)(x)], [expected], 1e-4)
    model[0].numpy_factor = np.float64(2.0)
    with ldm_fused.disabled():
        expected = model(x)
    assert_close([model(x)], [expected], 1e-4)
    assert list(ldm_fused.report(model).fallbacks) == ["its numpy_factor has changed since it was read"]


def test_dropout_that_goes_by_the_mode():
    model = block(embedding_added, out_channels=64)
    arguments = random(2, 32, 6, 5, dtype=torch.float32), random(2, 24, dtype=torch.float32)
    ldm_fused.patch(model, strict=True)
    model.train()
    torch.manual_seed(3)
    assert not torch.equal(model(*arguments), model(*arguments)) and ldm_fused.report(model).share == 1
    assert torch.equal(model.eval()(*arguments), model(*arguments)) and ldm_fused.report(model).share == 1


@pytest.mark.parametrize("name,value", [("factor", 3.0), ("flag", True), ("factor", torch.tensor(2.0))])
def test_an_attribute_that_changes_is_seen(name, value):
    model = block(branches).double()
    model.flag = True
    ldm_fused.patch(model, strict=True)
    setattr(model, name, value)
    x = random(2, 32, 6, 5)
    with ldm_fused.disabled():
        expected = model(x)
    assert_close([model(x)], [expected])
    assert (ldm_fused.report(model).fused == 2) == (name == "flag")


def test_causal_blocks_in_three_dimensions():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.GroupNorm(8, 32), nn.GroupNorm(8, 64)
            self.first, self.second, self.nonlinearity = Causal(32, 64), Causal(64, 64), nn.SiLU()
            self.beside = Causal(32, 64)

        def forward(self, hidden_states):
            hidden_states = hidden_states.contiguous()
            residual = hidden_states
            hidden_states = self.first(self.nonlinearity(self.one(hidden_states)))
            hidden_states = self.second(self.nonlinearity(self.two(hidden_states)))
            return hidden_states + self.beside(residual)

    patched, run = check(Block().double(), (random(2, 32, 3, 5, 4),))
    assert patched.replaced[0][2] == ("one", "two") and run.share == 1


def test_layers_in_sequentials():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.into = nn.Sequential(GroupNorm32(8, 32), Swish(), nn.Conv2d(32, 64, 3, padding=1))
            self.out = nn.Sequential(nn.GroupNorm(8, 64), Swish(), nn.Dropout(0.1), nn.Conv2d(64, 64, 3, padding=1))
            self.emb = nn.Sequential(Swish(), nn.Linear(24, 64))
            self.beside = nn.Conv2d(32, 64, 1)

        def forward(self, x, emb):
            return self._forward(x, emb)

        def _forward(self, x, emb):
            return self.beside(x) + self.out(self.into(x) + self.emb(emb)[..., None, None])

    model = Block()
    arguments = random(2, 32, 6, 5, dtype=torch.float32), random(2, 24, dtype=torch.float32)
    patched, run = check(model, arguments, tolerance=1e-3)
    assert not patched.skipped and patched.replaced[0][2] == ("into.0", "out.0") and run.share == 1
    for change in (lambda: model.out.register_forward_hook(lambda m, a, y: 2 * y),
                   lambda: model.into.append(nn.ReLU())):
        ldm_fused.patch(model)
        change()
        found = model(*arguments)
        [reason] = ldm_fused.report(model).fallbacks
        assert ldm_fused.report(model).fused == 0 and reason in ("its out: it has hooks", "its into: it has 4 layers")
        ldm_fused.unpatch(model)
        assert_close([found], [model(*arguments)], 1e-3)
        model.out._forward_hooks.clear()


# ---- Left --------------------------------------------------------------------------------------------------------


def clamp_in_16_bits(self, x):
    y = x + self.body(x)
    return y.clamp(-60000, 60000) if y.dtype == torch.float16 else y


def clamp(self, x):
    return torch.clamp(x + self.body(x), -1e6, 1e6)


def by_size(self, x):
    return x + self.body(x) if x.shape[0] < 64 else x - self.body(x)


def by_odd_width(self, x):
    odd = x.shape[-1] % 2
    return x + self.body(x) if not odd else x


def by_grad_mode(self, x):
    return x + self.body(x) if torch.is_grad_enabled() else x - self.body(x)


def by_local(self, x):
    fast = torch.is_autocast_enabled()
    return x - self.body(x) if fast else x + self.body(x)


def by_environment(self, x):
    return x + self.body(x) if os.environ.get("HOME") != "x" else x


def by_helper(self, x):
    return x + helper(self, x)


def helper(block, x):
    return block.body(x) if torch.is_grad_enabled() else x


def by_list(self, x):
    if self.log:
        return x
    return x + self.body(x)


def by_tensor(self, x):
    return x + self.body(x) if self.gate else x


def counts(self, x):
    self.factor = 2 * self.factor
    return x + self.body(x)


def logs(self, x):
    self.log.append(1)
    return x + self.body(x)


def keeps(self, x):
    h = self.body(x)
    self.log[:] = [h]
    return x + h


def in_place(self, x):
    y = self.body(x)
    x += y
    return x


def in_place_of_an_alias(self, x):
    h = self.same(x)
    h += 1
    return x + self.body(x)


def in_place_of_what_is_read(self, x, emb):
    h = self.c(F.silu(self.a(x)))
    before = h
    h += self.e(emb)[:, :, None, None]
    return before + self.d(F.silu(self.b(h)))


def without_autocast(self, x):
    with torch.autocast("cpu", enabled=False):
        return x + self.body(x)


def relu(self, x):
    return x + self.d(F.relu(self.b(self.c(F.silu(self.a(x))))))


def scaled_branch(self, x):
    return x + 0.5 * self.body(x)


def swapped_norm(self, x):
    return x + self.d(F.silu(self.b(self.c(F.silu(self.c(x))))))


def twice(self, x):
    h = self.c(F.silu(self.a(x)))
    return h + self.d(F.silu(self.b(h)))


def reads_inner(self, x):
    h = F.silu(self.a(x))
    return x + self.d(F.silu(self.b(self.c(h)))) + 0 * h


def embedding_of_x(self, x, emb):
    h = self.c(F.silu(self.a(x)))
    h = h + (self.e(emb)[:, :, None, None] * x.mean())
    return x + self.d(F.silu(self.b(h)))


def embedding_in_front(self, x, emb):
    h = self.c(F.silu(self.a(x)))
    h = h + self.e(emb)[None, None]
    return x + self.d(F.silu(self.b(h)))


def scale_without_one(self, x, emb):
    scale, shift = self.f(emb)[..., None, None].chunk(2, dim=1)
    return x + self.d(F.silu(self.b(self.c(F.silu(self.a(x)))) * scale + shift))


def thirds(self, x, emb):
    scale, shift = self.f(emb)[..., None, None].chunk(2, dim=-1)
    return x + self.d(F.silu(self.b(self.c(F.silu(self.a(x)))) * (1 + scale) + shift))


def two_tensors(self, x):
    return x + self.body(x), x


LEFT = {f.__name__: f for f in (
    clamp_in_16_bits, clamp, by_size, by_odd_width, by_grad_mode, by_local, by_environment, by_helper, by_list,
    by_tensor, counts, logs, keeps, in_place, in_place_of_an_alias, in_place_of_what_is_read, without_autocast, relu,
    scaled_branch, swapped_norm, twice, reads_inner, embedding_of_x,
    embedding_in_front, scale_without_one, thirds, two_tensors)}


@pytest.mark.parametrize("name", LEFT)
def test_whatever_is_not_the_formula_is_left_and_its_norms_are_fused(name):
    model = block(LEFT[name])
    before = {k: list(v) if isinstance(v, list) else v for k, v in vars(model).items() if k[0] != "_"}
    found = ldm_fused.patch(model)
    assert [name for name, _, _ in found.replaced] == ["a", "b"] and found.skipped[0][0] == ""
    assert found.skipped[0][2].startswith("it is not known to be a ResNet block")
    assert {k: v for k, v in vars(model).items() if k[0] != "_"} == before  # it was not called


class Listing(Parts):
    """Which the trial of a registered class calls."""

    def forward(self, x):
        self.log.append(x)
        self.counts["calls"] += 1
        return x + self.body(x)


class ListingAdapter(Block):
    def sites(self, module):
        return "a", "b"

    def example(self, module):
        return (torch.randn(2, 32, 6, 4),)

    def forward(self, module, x):
        return self.resnet(module, x, norm1=module.a, conv1=module.c, norm2=module.b, conv2=module.d)


def test_a_trial_leaves_lists_and_dicts_alone(registered):
    registered(Listing, ListingAdapter())
    model = randomize(Listing())
    model.counts = {"calls": 0}
    assert ldm_fused.patch(model).replaced
    assert model.log == [] and model.counts == {"calls": 0}


@pytest.mark.parametrize("change", [
    lambda y: y.clamp(-60000, 60000) if y.dtype == torch.float16 else y, lambda y: y.clamp(-1e6, 1e6),
    lambda y: y if y.shape[0] > 1 else 2 * y, lambda y: y if y.shape[-1] % 2 == 0 else 2 * y,
    lambda y: y if torch.is_grad_enabled() else 2 * y], ids=["16 bits", "clamp", "batch", "odd width", "grad mode"])
def test_a_trial_sees_what_a_registered_class_does_beside(change, registered):
    class Changed(Listing):
        def forward(self, x):
            return change(x + self.body(x))

    registered(Changed, ListingAdapter())
    found = ldm_fused.patch(randomize(Changed()))
    assert [name for name, _, _ in found.replaced] == ["a", "b"] and "in a trial" in found.skipped[0][2]


# ---- How blocks are called ---------------------------------------------------------------------------------------


def carried(self, x, temb=None, conv_carry_in=None, conv_carry_out=None):
    h = self.c(F.silu(self.a(x)))
    if temb is not None:
        h = h + self.e(F.silu(temb))[:, :, None, None]
    h = self.d(F.silu(self.b(h)))
    if conv_carry_in is not None:
        h = h * conv_carry_in
    return x + h


@pytest.mark.parametrize("args,kwargs,fused", [
    (("x",), {}, True), (("x", None, None, None), {}, True), (("x", "temb", None), {}, True),
    ((), {"x": "x", "temb": "temb"}, True), (("x",), {"conv_carry_out": None}, True),
    (("x", "temb", "carry"), {}, False), (("x",), {"conv_carry_in": "carry"}, False)], ids=str)
def test_arguments_are_bound_by_the_classes_own_signature(args, kwargs, fused):
    model = block(carried).double()
    values = {"x": random(2, 32, 6, 5), "temb": random(2, 24), "carry": torch.tensor(3.0, dtype=torch.float64)}
    args = [values.get(a, a) for a in args]
    kwargs = {k: values.get(v, v) for k, v in kwargs.items()}
    expected = model(*args, **kwargs)
    ldm_fused.patch(model, strict=True)
    assert_close([model(*args, **kwargs)], [expected])
    run = ldm_fused.report(model)
    assert run.fused == 2 * fused and (fused or set(run.fallbacks) == {"it was called with other arguments"})


def test_other_arguments_raise_as_the_class_does():
    model = block(carried)
    x = torch.randn(2, 32, 6, 5)
    wrong = [((), {}), ((x,), {"unknown": 1}), ((x, None), {"temb": None}), ((x,) * 6, {}), ((), {"temb": None})]
    errors = []
    for _ in range(2):
        for args, kwargs in wrong:
            with pytest.raises(TypeError) as error:
                model(*args, **kwargs)
            errors.append(str(error.value))
        ldm_fused.patch(model)
    assert errors[:len(wrong)] == errors[len(wrong):]
