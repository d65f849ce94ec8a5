"""ldm_fused.patch on models of this repository and on minimal classes of other libraries' structure.

tests/integrations has the same for the real libraries.
"""

import copy
import gc
import inspect
import os
import pickle
import subprocess
import sys
import threading
import types
import weakref
from pathlib import Path

import libraries
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import ldm_fused
from ldm_fused import FusedResnetBlock, UnsupportedBlock, functional, pristine, reference, resnet
from ldm_fused.compat import ldm as compat
from ldm_fused.patching import adapter as blocks
from ldm_fused.patching import pair, site, swap


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors are small here, and kernels have their own tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def load(monkeypatch):
    return lambda name: libraries.load(name, monkeypatch)


@pytest.fixture(params=["added", "left"])
def biases(request, monkeypatch):
    """"left" to the fused ops, as on CUDA, or added by the convolutions, as on a CPU."""
    if request.param == "left":
        monkeypatch.setattr(resnet, "_has_separate_bias", lambda x: True)
    return request.param


@pytest.fixture
def registered():
    """register_block for as long as the test runs."""
    before = dict(blocks.registered)
    yield ldm_fused.register_block
    blocks.registered.clear()
    blocks.registered.update(before)


def randomize(model):
    """Weights that hide nothing: no norm at its initial ones and zeros, no zero-initialised convolution; no dropout."""
    model.eval()
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.dim() < 2:
                nn.init.normal_(p, 1.0 if name == "weight" else 0.0, 0.5)
            elif p is not None:
                nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return model


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def results(model, inputs):
    """Output and all gradients, with the same random numbers each time."""
    torch.manual_seed(7)
    y = model(*inputs)
    leaves = [t for t in (*inputs, *model.parameters()) if t is not None]
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return [y, *torch.autograd.grad(y, leaves, dy, allow_unused=True)]


def assert_close(found, expected, tolerance=1e-9):
    for a, b in zip(found, expected):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, b.abs().max().item()))


def check(model, inputs, *, tolerance=1e-9, **options):
    """Outputs and gradients before and after patch, in evaluation; unpatch; what patch said and report says."""
    randomize(model)
    expected = results(model, inputs)
    names = list(model.state_dict())
    patched = ldm_fused.patch(model, **options)
    assert_close(results(model, inputs), expected, tolerance)
    run = ldm_fused.report(model)
    assert list(model.state_dict()) == names
    with ldm_fused.disabled():
        assert all(a is b or torch.equal(a, b) for a, b in zip(results(model, inputs), expected))
    assert ldm_fused.report(model).fused == run.fused
    ldm_fused.unpatch(model)
    assert all(a is b or torch.equal(a, b) for a, b in zip(results(model, inputs), expected))
    assert not ldm_fused.is_patched(model) and swap.STATE not in vars(model)
    return patched, run


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
    block, calls, run = reference.ResnetBlock(in_channels=32, dropout=0.4), [], functional.run
    ldm_fused.patch(block)
    monkeypatch.setattr(functional, "run", lambda a: calls.append(a) or run(a))
    x = torch.randn(2, 32, 8, 6)
    first, second = block(x), block(x)
    assert not torch.equal(first, second) and [a.dropout_p for a in calls] == [0.0, 0.4] * 2
    block.eval()
    assert torch.equal(block(x), block(x)) and calls[-1].dropout_seed is None


def test_patching_again_changes_recompute():
    model = Model()
    ldm_fused.patch(model)
    ldm_fused.patch(model, recompute=True)
    assert site.state(model.first).recompute and not ldm_fused.patch(model).replaced
    assert not site.state(model.first).recompute


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
        return 2 * super().forward(x, temb)


class Doubled(nn.GroupNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def with_forward():
    block = reference.ResnetBlock(in_channels=32, dropout=0.0)
    block.forward = lambda x: 3 * x
    return block


@pytest.mark.parametrize("make,reason", [
    (lambda: Subclass(in_channels=32, dropout=0.0), "a subclass of ldm_fused.reference.ResnetBlock"),
    (lambda: Doubled(8, 32), "a subclass of GroupNorm"),
    (with_forward, "its forward is replaced"),
], ids=["subclass of a block", "subclass of a norm", "forward of its own"])
def test_what_is_not_known_is_skipped_with_the_reason(make, reason):
    module = make()
    x = torch.randn(2, 32, 6, 5)
    expected = module(x)
    found = ldm_fused.patch(nn.ModuleList([module]))
    [(name, cls, told)] = found.skipped
    assert not found.replaced and name == "0" and cls is type(module) and reason in told and reason in str(found)
    assert torch.equal(module(x), expected)


def test_strict_raises_and_changes_nothing():
    model = nn.ModuleList([Model(), Doubled(8, 32)])
    with pytest.raises(UnsupportedBlock, match="a subclass of GroupNorm"):
        ldm_fused.patch(model, strict=True)
    assert not ldm_fused.is_patched(model)
    ldm_fused.patch(model[0], strict=True)


def test_a_class_whose_forward_means_something_else_fails_its_trial(load, monkeypatch):
    file = load("ldm.modules.diffusionmodules.model")
    forward = file.ResnetBlock.forward
    monkeypatch.setattr(file.ResnetBlock, "forward", lambda self, x, temb: forward(self, x.relu(), temb))
    block = file.ResnetBlock(in_channels=32, dropout=0.0, temb_channels=0)
    found = ldm_fused.patch(block)
    assert not found.replaced and "in a trial in training its forward computed another output" in found.skipped[0][2]


# ---- At run time -------------------------------------------------------------------------------------------------


def replace_forward(norm):
    forward = norm.forward
    norm.forward = lambda x: 2 * forward(x)


def hook(norm):
    norm.register_forward_hook(lambda module, args, output: 2 * output)


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
    [row] = [row for row in ldm_fused.report(model).sites if row.name == name] or [None]
    if when == "before" and disturb is parametrize and name == "out.0":
        assert row is None  # such a Sequential has no norm that is known
    else:
        assert row.calls == 0 and row.fallbacks == {DISTURBANCES[disturb]: 1} and row.fallback_bytes > 0
    assert 0 < ldm_fused.report(model).share < 1 or row is None
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
    pristine.know(Norm)
    try:
        assert pristine.why_not(Norm(2, 4), Norm) == "Norm.forward is replaced"
    finally:
        del pristine._FORWARD[Norm]


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


class TwoNorms(nn.Module):
    """The block of the documentation's example."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, 32), nn.GroupNorm(8, 64)
        self.conv1, self.conv2 = nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, 32, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


def test_the_documentations_example(registered):
    lines = inspect.getdoc(ldm_fused.Adapter).split("\n")
    start, end = (next(i for i, line in enumerate(lines) if text in line)
                  for text in ("import resnet", "Anything else"))
    example = "\n".join(line[4:] for line in lines[start:end])
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
        h, _ = resnet.norm_swish(module.gn, x, count=site.sites(module)[0].count)
        return self.factor * times * module.linear(h)


class WrongAdapter(PreactAdapter):
    factor = 1.1


def test_register_block(registered):
    assert ldm_fused.patch(Preact()).replaced[0][0] == "gn"  # only its norm, without the activation
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
    assert not found.replaced and "computed another output" in found.skipped[0][2]


def test_register_block_refuses_what_is_none(registered):
    for cls, adapter in ((Preact(), PreactAdapter()), (int, PreactAdapter()), (Preact, PreactAdapter), (Preact, None)):
        with pytest.raises(TypeError):
            registered(cls, adapter)


# ---- Libraries ---------------------------------------------------------------------------------------------------


LDM = {"identity": dict(), "1x1 shortcut": dict(out_channels=64),
       "3x3 shortcut": dict(out_channels=64, conv_shortcut=True),
       "time embedding": dict(out_channels=64, temb_channels=24)}
LDM_FILES = ["ldm.modules.diffusionmodules.model", "sgm.modules.diffusionmodules.model", "somebodys.copy"]


@pytest.mark.parametrize("file", LDM_FILES)
@pytest.mark.parametrize("name", LDM)
def test_ldm_block(file, name, load, biases):
    block = load(file).ResnetBlock(in_channels=32, dropout=0.1, **{"temb_channels": 0, **LDM[name]}).double()
    temb = random(2, 24) if hasattr(block, "temb_proj") else None
    patched, run = check(block, (random(2, 32, 6, 8), temb))
    assert patched.replaced[0][2] == ("norm1", "norm2") and run.share == 1


@pytest.mark.parametrize("file", LDM_FILES)
def test_ldm_decoder(file, load):
    patched, run = check(load(file).Decoder().double(), (random(2, 4, 8, 6),))
    assert not patched.skipped and run.share == 1
    assert [row.name for row in run.sites] == [
        "norm_out", "mid.attn_1.norm", *(f"up.{i}.norm{j}" for i in (0, 1) for j in (1, 2))]


def test_ldm_norm_out_is_fused_with_its_activation_in_the_decoders_forward_only(load, monkeypatch):
    decoder = load("ldm.modules.diffusionmodules.model").Decoder()
    ldm_fused.patch(decoder)
    calls, op = [], functional.group_norm_act
    monkeypatch.setattr(functional, "group_norm_act",
                        lambda *a, **o: calls.append(o.get("activation", "silu")) or op(*a, **o))
    x = torch.randn(2, 64, 5, 4)
    h = decoder.norm_out(x)
    assert torch.equal(h, F.group_norm(x, 8, decoder.norm_out.weight, decoder.norm_out.bias, 1e-6)) and not calls
    decoder(torch.randn(2, 4, 5, 4))
    assert calls[-1] == "silu"
    calls.clear()
    torch.compile(decoder, backend="eager", fullgraph=True)(torch.randn(2, 4, 5, 4))
    assert calls == [] or calls[-1] is None


def test_ldm_decoders_that_fail_or_run_side_by_side_or_nested_leave_no_trace(load):
    decoder = load("ldm.modules.diffusionmodules.model").Decoder().double()
    randomize(decoder)
    z = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    expected = decoder(z)
    ldm_fused.patch(decoder)
    x = torch.randn(2, 64, 5, 4, dtype=torch.float64)
    alone = F.group_norm(x, 8, decoder.norm_out.weight, decoder.norm_out.bias, 1e-6)

    entered = []

    def inside(module, args):  # while the decoder's forward runs, it is called by another thread, and by the same
        if entered:
            return
        entered.append(True)
        seen = []
        thread = threading.Thread(target=lambda: seen.extend([decoder.norm_out(x), decoder(z)]))
        thread.start()
        thread.join(60)
        assert torch.equal(seen[0], alone)
        torch.testing.assert_close(seen[1], expected)
        torch.testing.assert_close(decoder(z), expected)

    handle = decoder.conv_out.register_forward_pre_hook(inside)
    torch.testing.assert_close(decoder(z), expected)
    handle.remove()
    with pytest.raises(RuntimeError):
        decoder(torch.randn(2, 5, 5, 4, dtype=torch.float64))
    assert torch.equal(decoder.norm_out(x), alone)


def test_the_source_tells_whether_the_activation_follows_the_norm(load):
    Decoder = load("somebodys.copy").Decoder
    names = {**Decoder.forward.__globals__, "Decoder": Decoder, "super": super}

    def told(body, monkeypatch):
        """What is found behind norm_out in a forward of these lines."""
        source = "def forward(self, z):\n" + "\n".join("    " + line for line in body)
        exec(compile(source, "<made up>", "exec"), names)
        monkeypatch.setattr(pair.inspect, "getsource", lambda f: source)
        return pair.function_behind(names["forward"], "norm_out")

    with pytest.MonkeyPatch.context() as m:
        assert told(["h = self.norm_out(z)", "h = nonlinearity(h)", "return self.conv_out(h)"], m) == "nonlinearity"
        lines = ["if z is not None:", "    h = self.norm_out(z)", "    h = nonlinearity(h)", "return h"]
        assert told(lines, m) == "nonlinearity"
        for body in (
            ["h = self.norm_out(z)", "y = nonlinearity(h)", "return y + h"],
            ["h = self.norm_out(z)", "h = h + 1", "h = nonlinearity(h)", "return h"],
            ["h = self.norm_out(z)", "h = nonlinearity(z)", "return h"],
            ["h = self.norm_out(z)", "h = nonlinearity(h, 2)", "return h"],
            ["h = self.norm_out(z)", "h = nonlinearity(h)", "return self.norm_out(h)"],
            ["h = self.other(z)", "h = nonlinearity(h)", "return h"],
            ["h = self.norm_out(z)", "h = unknown(h)", "return h"],
            ["h = k = self.norm_out(z)", "h = nonlinearity(h)", "return k"],
            ["return self.conv_out(z)"],
        ):
            assert told(body, m) is None, body
        m.setattr(pair.inspect, "getsource", lambda f: "not python")
        assert pair.function_behind(lambda self: None, "norm_out") is None


def test_a_decoder_with_another_function_is_not_fused_with_it(load):
    file = load("somebodys.copy")
    file.nonlinearity = exec("def nonlinearity(x):\n    return x.relu()", vars(file)) or vars(file)["nonlinearity"]
    decoder = randomize(file.Decoder(blocks=False).double())
    z = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    expected = decoder(z)
    found = ldm_fused.patch(decoder)
    assert [name for name, _, _ in found.replaced] == ["mid.attn_1.norm", "norm_out"]
    torch.testing.assert_close(decoder(z), expected)


class Ending(nn.Module):
    """Its forward has changed since somebody wrote an adapter for it."""

    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.GroupNorm(8, 32), nn.SiLU()

    def forward(self, x):
        return torch.relu(self.norm(x))


def test_a_parent_whose_forward_does_not_call_the_activation_falls_back(registered):
    registered(Ending, pair.Parent("norm", "act"))
    model, x = randomize(Ending()), torch.randn(2, 32, 5)
    expected = model(x)
    ldm_fused.patch(model, norms=False)
    for _ in range(2):
        assert torch.equal(model(x), expected)
    assert ldm_fused.report(model).fallbacks == {"act was not called on what norm gave": 2}


OPENAI = {"default": dict(), "scale-shift norm": dict(use_scale_shift_norm=True, out_channels=64), "up": dict(up=True),
          "down": dict(down=True, use_scale_shift_norm=True), "checkpoint": dict(use_checkpoint=True, out_channels=64)}


@pytest.mark.parametrize("name", OPENAI)
@pytest.mark.parametrize("file", ["guided_diffusion.unet", "improved_diffusion.unet",
                                  "ldm.modules.diffusionmodules.openaimodel", "sgm.modules.diffusionmodules.openaimodel"])
def test_openai_unet(file, name, load, biases):
    load(file.replace(".unet", ".nn").replace(".openaimodel", ".util"))
    model = load(file).UNet(**OPENAI[name])
    patched, run = check(model, (random(2, 32, 8, 6, dtype=torch.float32), random(2, 24, dtype=torch.float32)),
                         tolerance=2e-4)
    assert not patched.skipped and run.share == 1
    assert [row.name for row in run.sites] == ["block.in_layers.0", "block.out_layers.0", "norm", "out.0"]


@pytest.mark.parametrize("part", ["in_layers", "in_layers.0", "out_layers.1", "skip_connection"])
def test_openai_block_with_a_hooked_part(part, load):
    load("guided_diffusion.nn")
    block = randomize(load("guided_diffusion.unet").ResBlock(32, 24, 0.0, out_channels=64))
    block.get_submodule(part).register_forward_hook(lambda module, args, output: 2 * output)
    arguments = random(2, 32, 8, 6, dtype=torch.float32), random(2, 24, dtype=torch.float32)
    expected = results(block, arguments)
    ldm_fused.patch(block)
    assert_close(results(block, arguments), expected, 2e-4)
    reasons = {"in_layers": {"its in_layers: it has hooks": 2}, "in_layers.0": {"it has hooks": 1},
               "out_layers.1": {"its activation: it has hooks": 1}, "skip_connection": {}}
    assert ldm_fused.report(block).fallbacks == reasons[part]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_group_norm_32_in_16_bits(dtype, load):
    norm = randomize(load("guided_diffusion.nn").GroupNorm32(8, 32))
    x = torch.randn(2, 32, 9).to(dtype)
    expected = norm(x)
    ldm_fused.patch(norm)
    y = norm(x)
    assert ldm_fused.report(norm).fused == 1 and y.dtype == expected.dtype == dtype
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("where,reason", [("elsewhere", "GroupNorm32.forward is replaced"),
                                          ("in its file", "in a trial")])
def test_another_group_norm_32_is_left(where, reason, load):
    file = load("guided_diffusion.nn")
    names = vars(file) if where == "in its file" else dict(nn=nn)
    exec("def forward(self, x):\n    return 2 * nn.GroupNorm.forward(self, x)", names)
    file.GroupNorm32.forward = names["forward"]
    for model in (file.GroupNorm32(8, 32), nn.Sequential(file.GroupNorm32(8, 32), nn.SiLU())):
        found = ldm_fused.patch(model)
        assert not found.replaced and reason in found.skipped[0][2]


EDM = {"default": dict(out_channels=32), "not adaptive": dict(out_channels=64, adaptive_scale=False),
       "up": dict(out_channels=32, up=True, skip_scale=0.5**0.5), "down": dict(out_channels=64, down=True),
       "attention": dict(out_channels=32, num_heads=4, skip_scale=0.5**0.5),
       "dropout": dict(out_channels=32, dropout=0.1)}


@pytest.mark.parametrize("name", EDM)
def test_edm_block(name, load, biases):
    block = load("training.networks").UNetBlock(in_channels=32, emb_channels=24, **EDM[name]).double()
    patched, run = check(block, (random(2, 32, 8, 6), random(2, 24)))
    assert not patched.skipped and run.share == 1 and len(run.sites) == 2 + bool(block.num_heads)


def test_edm_block_in_training(load):
    block = load("training.networks").UNetBlock(in_channels=32, emb_channels=24, **EDM["dropout"]).double()
    randomize(block).train()
    arguments = random(2, 32, 8, 6), random(2, 24)
    expected = results(block, arguments)
    ldm_fused.patch(block)
    assert_close(results(block, arguments), expected)


@pytest.mark.parametrize("name", ["norm0", "norm2"])
def test_edm_block_with_a_hooked_norm(name, load):
    block = randomize(load("training.networks").UNetBlock(in_channels=32, emb_channels=24, **EDM["attention"])).double()
    hook(getattr(block, name))
    arguments = random(2, 32, 8, 6), random(2, 24)
    expected = results(block, arguments)
    ldm_fused.patch(block)
    assert_close(results(block, arguments), expected)
    assert ldm_fused.report(block).fallbacks == {"it has hooks": 1} and ldm_fused.report(block).fused == 2


@pytest.mark.parametrize("file", ["flux.modules.autoencoder", "somebodys.flux"])
def test_flux_decoder(file, load, biases):
    patched, run = check(load(file).Decoder().double(), (random(2, 4, 8, 6),))
    assert not patched.skipped and run.share == 1
    assert [row.name for row in run.sites] == ["norm_out", *(f"blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2))]


class Relu(TwoNorms):
    def forward(self, x):
        return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


@pytest.mark.parametrize("make", [
    lambda load: FusedResnetBlock(in_channels=32, dropout=0.0), lambda load: compat.ResnetBlock(in_channels=32, dropout=0.0),
    *(lambda load, file=file: load(file).ResnetBlock(in_channels=32, dropout=0.0, temb_channels=0) for file in LDM_FILES),
    *(lambda load, file=file: load(file).ResnetBlock(32, 32) for file in ("flux.modules.autoencoder", "somebodys.flux")),
], ids=["fused", "compat", *LDM_FILES, "flux", "somebodys.flux"])
def test_a_hooked_norm_of_any_block_falls_back(make, load):
    block, x = randomize(make(load)).double(), torch.randn(2, 32, 6, 5, dtype=torch.float64)
    arguments = (x, None) if "temb" in inspect.signature(block.forward).parameters else (x,)
    assert ldm_fused.patch(block).replaced
    block.norm2.register_forward_hook(lambda module, args, output: 2 * output)
    with ldm_fused.disabled():
        expected = block(*arguments)
    assert_close([block(*arguments)], [expected])
    first, second = ldm_fused.report(block).sites
    assert (first.calls, first.fallbacks) == (1, {}) and (second.calls, second.fallbacks) == (0, {"it has hooks": 1})


def test_other_blocks_of_the_same_parts_are_left():
    found = ldm_fused.patch(nn.ModuleList([TwoNorms(), Relu()]))
    assert [name for name, _, _ in found.replaced] == ["0"]
    [(name, cls, reason)] = found.skipped
    assert name == "1" and cls is Relu and "computed another output" in reason


def test_flux_decoder_with_a_hooked_norm(load):
    decoder = randomize(load("flux.modules.autoencoder").Decoder()).double()
    hook(decoder.norm_out)
    hook(decoder.blocks[1].norm1)
    z = random(2, 4, 8, 6)
    expected = results(decoder, (z,))
    ldm_fused.patch(decoder)
    assert_close(results(decoder, (z,)), expected)
    assert ldm_fused.report(decoder).fallbacks == {"it has hooks": 2} and ldm_fused.report(decoder).fused == 3


def test_group_norm_32_calls_what_replaces_group_norms_forward(load, monkeypatch):
    """As A1111's Lora extension does."""
    load("guided_diffusion.nn")
    model = randomize(load("guided_diffusion.unet").UNet())
    arguments = random(2, 32, 8, 6, dtype=torch.float32), random(2, 24, dtype=torch.float32)
    ldm_fused.patch(model)
    forward = nn.GroupNorm.forward
    monkeypatch.setattr(nn.GroupNorm, "forward", lambda self, x: 2 * forward(self, x))
    found = results(model, arguments)
    run = ldm_fused.report(model)
    assert run.fused == 0 and set(run.fallbacks) == {"GroupNorm.forward is replaced"}
    with ldm_fused.disabled():
        assert_close(found, results(model, arguments), 2e-4)


def test_comfy_block(load):
    load("comfy.ops")
    ResnetBlock = load("comfy.ldm.modules.diffusionmodules.model").ResnetBlock
    patched, run = check(ResnetBlock(32, 64).double(), (random(2, 32, 8, 6),))
    assert not patched.skipped and run.share == 1
    block = randomize(ResnetBlock(32, 32, temb_channels=24)).double()
    x, temb = random(2, 32, 8, 6), random(2, 24).detach()
    expected = block(x, temb.clone())
    ldm_fused.patch(block, strict=True)
    assert_close([block(x, temb.clone())], [expected])


@pytest.mark.parametrize("name", ["weight_function", "bias_function", "comfy_cast_weights"])
def test_comfy_norms_with_weight_functions_fall_back(name, load):
    load("comfy.ops")
    block = randomize(load("comfy.ldm.modules.diffusionmodules.model").ResnetBlock(32, 64)).double()
    ldm_fused.patch(block)
    setattr(block.norm1, name, True if name == "comfy_cast_weights" else [lambda t: 2 * t])
    arguments = random(2, 32, 8, 6),
    found = results(block, arguments)
    run = ldm_fused.report(block)
    ldm_fused.unpatch(block)
    assert_close(found, results(block, arguments))
    cast = name == "comfy_cast_weights"
    reason = "its weights are cast in each call" if cast else "its weights go through functions first"
    assert run.fallbacks == {reason: 1} and run.fused == 1


def test_comfy_norm_that_stands_alone(load):
    ops = load("comfy.ops")
    for cls, fused in ((ops.disable_weight_init.GroupNorm, 1), (ops.manual_cast.GroupNorm, 0)):
        norm = randomize(cls(8, 32)).double()
        x = random(2, 32, 7)
        expected = results(norm, (x,))
        ldm_fused.patch(norm)
        assert_close(results(norm, (x,)), expected)
        assert ldm_fused.report(norm).fused == fused
