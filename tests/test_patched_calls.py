"""A patched model at run time: what is disturbed is called, everything else is fused, and the report says which."""

import copy

import pytest
import torch
from fresh import run_python
from patched import Model, assert_close, check, hook, inputs, randomize, results
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import ldm_fused
from ldm_fused import bypass, reference

pytestmark = pytest.mark.usefixtures("one_thread")  # tensors are small here, and kernels have their own tests


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
    run = run_python(program, LDM_FUSED_DISABLE=value)
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
