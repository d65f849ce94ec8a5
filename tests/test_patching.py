"""ldm_fused.patch on models of this repository: what it does, and what it skips.

test_patched_calls.py has what happens at run time. test_adapters.py has other libraries' classes, and
tests/integrations the real ones.
"""

import copy
import gc
import inspect
import pickle
import sys
import textwrap
import types
import weakref

import pytest
import torch
from patched import Model, TwoNorms, assert_close, check, inputs, random, randomize
from torch import nn
from torch.nn import functional as F

import ldm_fused
from ldm_fused import FusedResnetBlock, UnsupportedBlock, functional, patching, reference, resnet_block
from ldm_fused.compat import ldm as compat
from ldm_fused.patching import adapter, pair, swap

pytestmark = pytest.mark.usefixtures("one_thread")  # tensors are small here, and kernels have their own tests


# ---- What patch does ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [reference.ResnetBlock, FusedResnetBlock, compat.ResnetBlock])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_of_blocks_norms_and_a_sequential(block, recompute, biases):
    def make(**options):
        if block is compat.ResnetBlock:
            options.pop("num_groups", None)
        return block(**options)

    patched, run = check(Model(make).double(), inputs(), recompute=recompute)
    assert [(name, sites) for name, _, sites in patched.replaced] == [
        ("first", ("norm1", "norm2")), ("second", ("norm1", "norm2")), ("out", ("0",)), ("norm", ("",))]
    assert not patched.skipped
    assert [row.name for row in run.sites] == [
        "first.norm1", "first.norm2", "norm", "second.norm1", "second.norm2", "out.0"]
    assert run.share == 1 and all(row.calls >= 1 and not row.fallbacks for row in run.sites)


def test_keeps_names_instances_and_parameters():
    model = Model()
    before = [(name, type(m)) for name, m in model.named_modules()]
    parameters = [id(p) for p in model.parameters()]
    ldm_fused.patch(model)
    for (name, cls), (other, m) in zip(before, model.named_modules()):
        assert name == other and isinstance(m, cls)
        assert (type(m).__name__, type(m).__qualname__, type(m).__module__) == (
            cls.__name__, cls.__qualname__, cls.__module__)
        assert "forward" not in vars(m)
    assert [id(p) for p in model.parameters()] == parameters
    assert type(model.first.norm1) is nn.GroupNorm and type(model.first.conv1) is nn.Conv2d
    assert type(model.out[0]) is nn.GroupNorm
    assert str(inspect.signature(model.first.forward)) == str(inspect.signature(reference.ResnetBlock.forward)).replace(
        "self, ", "")


def test_patch_twice_changes_nothing():
    model = Model()
    assert len(ldm_fused.patch(model).replaced) == 4
    classes = [type(m) for m in model.modules()]
    again = ldm_fused.patch(model)
    assert not again.replaced and not again.skipped and [type(m) for m in model.modules()] == classes
    assert "nothing new" in str(again)


@pytest.mark.parametrize("blocks,norms,names", [
    (True, False, ["first", "second", "out"]), (False, True, ["norm", "out.0"]), (False, False, [])])
def test_blocks_and_norms_are_switches(blocks, norms, names):
    patched = ldm_fused.patch(Model(), blocks=blocks, norms=norms)
    assert [name for name, _, _ in patched.replaced] == names and not patched.skipped


def test_copies_and_pickles_are_patched_and_give_the_same_bits():
    model = randomize(Model())
    ldm_fused.patch(model)
    arguments = inputs(torch.float32)
    y = model(*arguments)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(copy.copy(model))):
        assert ldm_fused.is_patched(other) and torch.equal(other(*arguments), y)
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert ldm_fused.report(other).fused == 6  # its own, not the original's too
        ldm_fused.unpatch(other)
        assert ldm_fused.is_patched(model) and not ldm_fused.is_patched(other)


def test_a_slice_of_a_patched_sequential_is_a_sequential():
    model = nn.Sequential(nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 3, 1))
    ldm_fused.patch(model)
    x = torch.randn(2, 32, 5, 4)
    torch.testing.assert_close(model[:2](x), F.silu(model[0](x)))
    assert torch.equal(copy.deepcopy(model[:2])(x), model[:2](x))


def test_patched_is_a_context_manager():
    model = Model()
    with pytest.raises(KeyError):
        with ldm_fused.patched(model, norms=False) as found:
            assert ldm_fused.is_patched(model) and len(found.replaced) == 3
            raise KeyError
    assert not ldm_fused.is_patched(model)


def test_an_activation_that_serves_in_two_places(registered):
    registered(Both, pair.Parent("norm", "act"))
    model = nn.ModuleList([Both(), Both()])
    model[1].act = model[0].act
    x = torch.randn(2, 32, 5)
    expected = [randomize(m)(x) for m in model]
    ldm_fused.patch(model)
    assert_close([m(x) for m in model], expected, 1e-5)
    assert ldm_fused.report(model).fused == 2
    ldm_fused.unpatch(model)
    assert [m(x).equal(y) for m, y in zip(model, expected)] == [True, True]
    assert type(model[0].act) is nn.SiLU and type(model[1].norm) is nn.GroupNorm


class Both(nn.Module):
    """A norm and an activation that are called one after the other."""

    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.GroupNorm(8, 32), nn.SiLU()

    def forward(self, x):
        return self.act(self.norm(x)) + 1


def test_no_library_is_imported(monkeypatch):
    class Lazy(types.ModuleType):
        def __getattr__(self, name):
            raise AssertionError(f"{name} was asked for")

    for name in ("diffusers", "diffusers.models", "monai", "ldm", "flux", "comfy", "training"):
        monkeypatch.setitem(sys.modules, name, Lazy(name))
    before = set(sys.modules)
    assert len(ldm_fused.patch(Model()).replaced) == 4
    assert set(sys.modules) == before


def test_pipelines():
    class Pipeline:
        def __init__(self, vae):
            self.vae, self.scheduler, self.scale = vae, object(), 0.5

    class WithComponents(Pipeline):
        @property
        def components(self):
            return {"vae": self.vae, "scheduler": self.scheduler}

    for cls in (Pipeline, WithComponents):
        pipeline = cls(Model())
        found = ldm_fused.patch(pipeline)
        assert [name for name, _, _ in found.replaced] == ["vae.first", "vae.second", "vae.out", "vae.norm"]
        assert ldm_fused.is_patched(pipeline) and ldm_fused.is_patched(pipeline.vae)
        pipeline.vae(*inputs(torch.float32)[:1], torch.randn(2, 24))
        assert ldm_fused.report(pipeline).sites[0].name == "vae.first.norm1"
        ldm_fused.unpatch(pipeline)
        assert not ldm_fused.is_patched(pipeline.vae)
    for nothing in (object(), 3, [Model()]):
        with pytest.raises(TypeError, match="module or a pipeline"):
            ldm_fused.patch(nothing)


def test_recompute_keeps_two_tensors_a_block():
    def kept(recompute):
        block = randomize(reference.ResnetBlock(in_channels=32, dropout=0.0))
        ldm_fused.patch(block, recompute=recompute)
        x, saved = torch.randn(2, 32, 8, 6, requires_grad=True), {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
            y = block(x)
        torch.autograd.grad(y.sum(), (x, *block.parameters()))
        return sum(t.shape == x.shape for t in saved.values())

    assert [kept(False), kept(True)] == [4, 2]


def test_what_a_backward_pass_computes_again_is_counted_once():
    block = reference.ResnetBlock(in_channels=32, dropout=0.0)
    ldm_fused.patch(block, recompute=True)
    block(torch.randn(2, 32, 8, 6, requires_grad=True)).sum().backward()
    assert [s.calls for s in ldm_fused.report(block).sites] == [1, 1]


def test_dropout_goes_into_the_second_norm(monkeypatch):
    block, calls, route = reference.ResnetBlock(in_channels=32, dropout=0.4), [], functional.route
    ldm_fused.patch(block)
    monkeypatch.setattr(functional, "route", lambda op, a: calls.append(a) or route(op, a))
    x = torch.randn(2, 32, 8, 6)
    first, second = block(x), block(x)
    assert not torch.equal(first, second) and [a.dropout_p for a in calls] == [0.0, 0.4] * 2
    block.eval()
    assert torch.equal(block(x), block(x)) and calls[-1].dropout_seed is None


def test_patching_again_changes_recompute():
    model = Model()
    ldm_fused.patch(model)
    ldm_fused.patch(model, recompute=True)
    assert vars(model.first)[swap.STATE].recompute and not ldm_fused.patch(model).replaced
    assert not vars(model.first)[swap.STATE].recompute


def test_the_random_state_is_left_alone(load):
    model = load("somebodys.copy").Decoder()
    state = torch.get_rng_state()
    for context in (torch.inference_mode(), torch.no_grad(), torch.device("meta"), torch.autocast("cpu")):
        with context:
            assert ldm_fused.patch(model).replaced
        ldm_fused.unpatch(model)
    assert torch.equal(state, torch.get_rng_state())


def test_a_model_is_freed():
    model = Model()
    ldm_fused.patch(model)
    model(*(t.float() for t in inputs()))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# ---- What is skipped ---------------------------------------------------------------------------------------------


class Subclass(reference.ResnetBlock):
    def forward(self, x, temb=None):
        return super().forward(x, temb).clamp(-1, 1)


class Doubled(nn.GroupNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def with_forward():
    block = reference.ResnetBlock(in_channels=32, dropout=0.0)
    block.forward = lambda x: 3 * x
    return block


@pytest.mark.parametrize("make,reason", [
    (lambda: Subclass(in_channels=32, dropout=0.0), "it does not end in a sum, but in clamp"),
    (lambda: Doubled(8, 32), "a subclass of GroupNorm"),
    (with_forward, "its forward is replaced"),
], ids=["subclass of a block", "subclass of a norm", "forward of its own"])
def test_what_is_not_known_is_skipped_with_the_reason_and_its_norms_are_fused(make, reason):
    module = make().eval()
    made = type(module)
    x = torch.randn(2, 32, 6, 5)
    expected = module(x)
    found = ldm_fused.patch(nn.ModuleList([module]))
    [(name, cls, told)] = found.skipped
    assert name == "0" and cls is made and reason in told and reason in str(found)
    norms = [] if isinstance(module, nn.GroupNorm) else ["0.norm1", "0.norm2"]
    assert [name for name, _, _ in found.replaced] == norms
    assert_close([module(x)], [expected], 1e-5)


def test_strict_raises_and_changes_nothing():
    model = nn.ModuleList([Model(), Doubled(8, 32)])
    with pytest.raises(UnsupportedBlock, match="a subclass of GroupNorm"):
        ldm_fused.patch(model, strict=True)
    assert not ldm_fused.is_patched(model)
    ldm_fused.patch(model[0], strict=True)


def test_a_class_whose_forward_means_something_else_is_left(load, monkeypatch):
    file = load("ldm.modules.diffusionmodules.model")
    forward = file.ResnetBlock.forward
    monkeypatch.setattr(file.ResnetBlock, "forward", lambda self, x, temb: forward(self, x.relu(), temb))
    block = file.ResnetBlock(in_channels=32, dropout=0.0, temb_channels=0)
    found = ldm_fused.patch(block)
    assert [name for name, _, _ in found.replaced] == ["norm1", "norm2"]
    assert "relu comes before the first norm" in found.skipped[0][2]


# ---- Blocks of one's own -----------------------------------------------------------------------------------------


def test_the_documentations_example(registered):
    lines = inspect.getdoc(patching.Block).split("\n")
    start = next(i for i, line in enumerate(lines) if "class MyBlock" in line)
    example = textwrap.dedent("\n".join(lines[start:]))
    exec(example, dict(ldm_fused=ldm_fused, torch=torch, my_code=types.SimpleNamespace(Block=TwoNorms)))
    patched, run = check(TwoNorms().double(), (random(2, 32, 6, 5),))
    assert patched.replaced == [("", TwoNorms, ("norm1", "norm2"))] and run.share == 1


class Preact(nn.Module):
    """Norm, swish, linear over the channels."""

    def __init__(self):
        super().__init__()
        self.gn, self.linear = nn.GroupNorm(8, 32), nn.Conv1d(32, 32, 1)

    def forward(self, x, times=1.0):
        return times * self.linear(F.silu(self.gn(x)))


class PreactAdapter(ldm_fused.Adapter):
    factor = 1.0

    def sites(self, module):
        return ("gn",)

    def example(self, module):
        return torch.randn(2, 32, 5), 0.5

    def forward(self, module, x, times=1.0):
        h, _ = resnet_block.norm_swish(module.gn, x, count=adapter.sites(module)[0].count)
        return self.factor * times * module.linear(h)


class WrongAdapter(PreactAdapter):
    factor = 1.1


def test_register_block(registered):
    assert ldm_fused.patch(Preact()).replaced == [("", Preact, ("gn",))]  # the norm and the activation behind it
    registered(Preact, PreactAdapter())
    patched, run = check(Preact().double(), (random(2, 32, 7),))
    assert patched.replaced == [("", Preact, ("gn",))] and run.share == 1
    model = Preact()
    ldm_fused.patch(model)
    other = pickle.loads(pickle.dumps(model))
    assert type(other) is type(model)


def test_a_registered_adapter_is_tried(registered):
    registered(Preact, WrongAdapter())
    found = ldm_fused.patch(Preact())
    assert [name for name, _, _ in found.replaced] == ["gn"] and "computed another output" in found.skipped[0][2]


def test_register_block_refuses_what_is_none(registered):
    for cls, adapter in ((Preact(), PreactAdapter()), (int, PreactAdapter()), (Preact, PreactAdapter), (Preact, None)):
        with pytest.raises(TypeError):
            registered(cls, adapter)
