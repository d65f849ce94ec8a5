"""ldm_fused.patch on models of this repository: what it does, what it skips, what happens at run time.

test_adapters.py has other libraries' classes, and tests/integrations the real ones.
"""

import copy
import gc
import inspect
import os
import pickle
import subprocess
import sys
import textwrap
import types
import weakref
from pathlib import Path

import pytest
import torch
from patched import TwoNorms, assert_close, check, hook, random, randomize, results
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import ldm_fused
from ldm_fused import FusedResnetBlock, UnsupportedBlock, bypass, functional, patching, reference, resnet_block
from ldm_fused.compat import ldm as compat
from ldm_fused.patching import adapter, pair, swap

pytestmark = pytest.mark.usefixtures("one_thread")  # tensors are small here, and kernels have their own tests


class Model(nn.Module):
    """Two blocks, a norm that stands alone, and an end of norm, activation and convolution."""

    def __init__(self, block=reference.ResnetBlock):
        super().__init__()
        self.first = block(in_channels=32, out_channels=64, dropout=0.1, temb_channels=24)
        self.norm = nn.GroupNorm(8, 64)
        self.second = block(in_channels=64, dropout=0.0, temb_channels=24)
        self.out = nn.Sequential(nn.GroupNorm(8, 64), nn.SiLU(), nn.Conv2d(64, 3, 3, padding=1))

    def forward(self, x, temb):
        h = self.norm(self.first(x, temb))
        return self.out(self.second(h, temb))


def inputs(dtype=torch.float64):
    return random(2, 32, 8, 6, dtype=dtype), random(2, 24, dtype=dtype)


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


# ---- At run time -------------------------------------------------------------------------------------------------


def replace_forward(norm):
    forward = norm.forward
    norm.forward = lambda x: 2 * forward(x)


def hook_before(norm):
    norm.register_forward_pre_hook(lambda module, args: (2 * args[0] + 1,))


def parametrize(norm):
    parametrizations.weight_norm(norm)


DISTURBANCES = {replace_forward: "its forward is replaced", hook: "it has hooks", hook_before: "it has hooks",
                parametrize: "it is a ParametrizedGroupNorm, not a plain GroupNorm"}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("disturb", DISTURBANCES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["first.norm2", "out.0"])
def test_a_disturbed_norm_falls_back_with_the_reason(name, disturb, when):
    model = randomize(Model()).double()
    if when == "before":
        disturb(model.get_submodule(name))
        ldm_fused.patch(model)
    else:
        ldm_fused.patch(model)
        disturb(model.get_submodule(name))
    arguments = inputs()
    found = results(model, arguments)
    [row] = [row for row in ldm_fused.report(model).sites if row.name == name]
    reason = DISTURBANCES[disturb]
    if when == "before" and disturb is parametrize and name == "out.0":  # such a Sequential has no norm that is known
        reason = "it is a subclass of GroupNorm: it has parts"
    assert row.calls == 0 and row.fallbacks == {reason: 1} and row.fallback_bytes > 0
    assert 0 < ldm_fused.report(model).share < 1
    with ldm_fused.disabled():
        assert_close(found, results(model, arguments))


@pytest.mark.parametrize("disturb", DISTURBANCES, ids=lambda f: f.__name__)
def test_a_disturbed_norm_that_stands_alone_does_what_it_is_told(disturb):
    model = randomize(Model()).double()
    ldm_fused.patch(model)
    disturb(model.norm)
    arguments = inputs()
    found = results(model, arguments)
    with ldm_fused.disabled():
        assert_close(found, results(model, arguments))


def test_parameters_of_another_dtype_fall_back():
    norm = nn.GroupNorm(8, 32)
    ldm_fused.patch(norm)
    norm.to(torch.bfloat16)
    with pytest.raises(RuntimeError):  # as F.group_norm does
        norm(torch.randn(2, 32, 5))
    assert list(ldm_fused.report(norm).fallbacks) == ["its weight is torch.bfloat16 and the input torch.float32"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_replaced_class_forward_is_run(when, monkeypatch):
    def replaced(cls):
        forward = cls.forward
        monkeypatch.setattr(cls, "forward", lambda self, *args: 2 * forward(self, *args))

    model = randomize(Model()).double()
    arguments = inputs()
    classes = [nn.GroupNorm, nn.Sequential] + [reference.ResnetBlock] * (when == "after")
    if when == "before":
        [replaced(cls) for cls in classes]
    ldm_fused.patch(model)
    if when == "after":
        [replaced(cls) for cls in classes]
    found = results(model, arguments)
    assert ldm_fused.report(model).fused == 0
    ldm_fused.unpatch(model)
    assert_close(found, results(model, arguments))


def test_what_was_replaced_before_the_import_is_not_taken_for_the_class(monkeypatch):
    """Another library may have been there first."""
    class Norm(nn.GroupNorm):
        pass

    Norm.__module__ = "somewhere"
    Norm.forward = lambda self, x: 2 * nn.GroupNorm.forward(self, x)
    bypass.know(Norm)
    try:
        assert bypass.module_obstacle(Norm(2, 4), Norm) == "Norm.forward is replaced"
    finally:
        del bypass._FORWARD[Norm]


def test_disabled_nests_and_survives_exceptions():
    model = Model().eval()
    ldm_fused.patch(model)
    arguments = [t.float() for t in inputs()]
    with ldm_fused.disabled(), pytest.raises(KeyError):
        with ldm_fused.disabled():
            raise KeyError
    with ldm_fused.disabled():
        with ldm_fused.disabled():
            pass
        model(*arguments)
    assert ldm_fused.report(model).fused == 0
    model(*arguments)
    assert ldm_fused.report(model).fused == 6


@pytest.mark.parametrize("value,fused", [("1", 0), ("0", 2), ("", 2)])
def test_the_environment_variable_disables_from_the_start(value, fused):
    program = ("import torch, ldm_fused; block = ldm_fused.reference.ResnetBlock(in_channels=32, dropout=0.0); "
               "ldm_fused.patch(block); block(torch.randn(1, 32, 4, 4)); print(ldm_fused.report(block).fused)")
    path = os.pathsep.join([str(Path(ldm_fused.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                         env={**os.environ, "LDM_FUSED_DISABLE": value, "PYTHONPATH": path})
    assert run.stdout == f"{fused}\n", run.stderr


def test_report_counts_bytes_and_prints_a_table():
    model = randomize(Model())
    ldm_fused.patch(model)
    assert "not called yet" in str(ldm_fused.report(model))
    hook(model.first.norm1)
    arguments = [t.float() for t in inputs()]
    model(*arguments)
    model(*arguments)
    run = ldm_fused.report(model)
    one, other = 2 * 32 * 8 * 6 * 4, 2 * 64 * 8 * 6 * 4  # bytes at 32 and at 64 channels
    assert [(row.name, row.calls, row.bytes, row.fallback_bytes) for row in run.sites][:2] == [
        ("first.norm1", 0, 0, 2 * one), ("first.norm2", 2, 2 * other, 0)]
    assert run.fallbacks == {"it has hooks": 2} and run.fused == 10
    assert run.share == pytest.approx(5 * other / (5 * other + one))
    text = str(run)
    assert "first.norm1" in text and "it has hooks" in text and "90.9% of the norms' bytes fused" in text
    assert str(ldm_fused.report(nn.Linear(2, 2))) == "no norm is patched"


def test_in_place_consumers():
    model = randomize(Model())
    ldm_fused.patch(model)
    for module, x in ((model.first, torch.randn(2, 32, 5, 4)), (model.norm, torch.randn(2, 64, 5, 4))):
        before = x.clone()
        module(x).zero_()
        assert torch.equal(x, before)
    x = torch.randn(2, 64, 5, 4, requires_grad=True)
    model.norm(x).mul_(2).sum().backward()


def test_code_that_walks_a_block_by_itself():
    """As tiled decoders do."""
    block = randomize(reference.ResnetBlock(in_channels=32, dropout=0.0)).double()
    x = torch.randn(2, 32, 8, 8, dtype=torch.float64)
    ldm_fused.patch(block)
    h = block.conv1(F.silu(block.norm1(x)))
    h = x + block.conv2(F.silu(block.norm2(h)))
    assert_close([block(x)], [h])


@pytest.mark.parametrize("flip", [None, torch.channels_last, torch.contiguous_format])
def test_layouts_that_flip_midway(flip):
    class Flipping(Model):
        def forward(self, x, temb):
            h = self.norm(self.first(x, temb))
            return self.out(self.second(h if flip is None else h.contiguous(memory_format=flip), temb))

    for layout in (torch.contiguous_format, torch.channels_last):
        model = Flipping().double().to(memory_format=layout)
        x, temb = inputs()
        x = x.detach().contiguous(memory_format=layout).requires_grad_()
        check(model, (x, temb))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_with_mixed_parameter_dtypes(dtype):
    model = randomize(Model())
    arguments = inputs(torch.float32)
    exact = copy.deepcopy(model).double()(*(t.double() for t in arguments))
    model.second.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(*arguments)
        ldm_fused.patch(model)
        after = model(*arguments)
    assert after.dtype == before.dtype and ldm_fused.report(model).fused == 6
    errors = [(y.double() - exact).square().mean().sqrt() for y in (after, before)]
    assert errors[0] <= 1.2 * errors[1]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    model = randomize(Model())
    ldm_fused.patch(model)
    arguments = inputs(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert_close(results(compiled, arguments), results(model, arguments), 1e-4)
    before = ldm_fused.report(model).fused
    with torch._dynamo.config.patch(error_on_recompile=True):  # counters stand still: nothing is compiled anew
        compiled(*arguments)
        compiled(*arguments)
        if dynamic:
            compiled(torch.randn(2, 32, 6, 10, requires_grad=True), arguments[1])
    assert ldm_fused.report(model).fused == before
    with ldm_fused.disabled():
        assert_close([compiled(*arguments)], [model(*arguments)], 1e-4)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    model = randomize(Model())
    ldm_fused.patch(model, recompute=True)
    arguments = tuple(t.detach() for t in inputs(torch.float32))
    exported = torch.export.export(model, arguments, strict=strict)
    assert sum(n.target is torch.ops.ldm_fused.group_norm_act.default for n in exported.graph.nodes) == 6
    torch.testing.assert_close(exported.module()(*arguments), model(*arguments), rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing():
    model = randomize(Model()).double()
    arguments = inputs()
    expected = results(model, arguments)
    ldm_fused.patch(model)
    for reentrant in (False, True):
        class Checkpointed(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, *args):
                return torch.utils.checkpoint.checkpoint(self.model, *args, use_reentrant=reentrant)

        if reentrant:
            y = Checkpointed()(*arguments)
            y.sum().backward()
        else:
            assert_close(results(Checkpointed(), arguments), expected)


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
