"""What reads a model instead of running it, or runs it on tensors of its own, beside the plain model: fx, scripts,
traces, subclasses of Tensor, counters, and the switch that turns the ops off."""

import warnings

import pytest
import torch
from read_models import MODELS, X, inputs, models, plain_norm
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_fx
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from watched import Calls

import ldm_fused
from ldm_fused import functional

pytestmark = pytest.mark.usefixtures("one_thread")
OF_ONE = [name for name in MODELS if len(MODELS[name][2]) == 1]
CALLS = ("group_norm_act", "bias_add_residual")
BLOCKS = ("FusedResnetBlock", "patched block")


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ---- torch.fx ----------------------------------------------------------------------------------------------------


def fixed(name):
    """A block's forward asks whether there is an embedding: fx must be told."""
    return {"temb": None} if name in BLOCKS else None


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_symbolic_trace(name):
    """An op that is called by itself is a node of the graph. Blocks and patched models are PyTorch's functions."""
    ours, plain = models(name)
    traced = torch.fx.symbolic_trace(ours, fixed(name))
    ops = {functional.group_norm_act, functional.bias_add_residual}
    assert any(node.target in ops for node in traced.graph.nodes) == (name in ("GroupNormSiLU", *CALLS))
    x = inputs(name, 3)
    close(traced(*x), plain(*x))


@pytest.mark.parametrize("name", OF_ONE)
@torch.no_grad()
def test_prepare_fx_observes_what_it_does_in_the_plain_model(name):
    if name in BLOCKS:
        pytest.skip("prepare_fx gives a block an embedding")
    ours, plain = models(name)
    x, modules = inputs(name), []
    for model in (ours, plain):
        prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), x)
        modules.append(sum("observer" in type(m).__name__.lower() for m in prepared.modules()))
        close(prepared(*x), plain(*x))
    assert name == "GroupNormSiLU" or modules[0] == modules[1]  # which is one module where the plain model has two


# ---- torch.jit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switched", ["on", "off"])
@pytest.mark.parametrize("name", ["GroupNormSiLU", "patched GroupNorm", "patched Sequential"])
@torch.no_grad()
def test_script(name, switched):
    ours, plain = models(name)
    if switched == "off":
        with ldm_fused.disabled():
            scripted = torch.jit.script(ours)
    else:
        scripted = torch.jit.script(ours)
    for batch in (1, 3):
        x = inputs(name, batch)
        close(scripted(*x), plain(*x))


class Named(nn.Module):
    """Its forward uses names of this file that the patched class's forward has for itself."""

    def __init__(self):
        super().__init__()
        self.norm = plain_norm()

    def forward(self, x):
        return before(method(self.norm(x)))


def method(x):
    return x + 1.0


def before(x):
    return x * 2.0


@torch.no_grad()
def test_script_of_a_model_with_patched_parts():
    plain, ours = Named().eval(), Named().eval()
    ldm_fused.patch(ours)
    x = torch.randn(2, *X)
    assert ldm_fused.is_patched(ours)
    close(torch.jit.script(ours)(x), plain(x))
    assert ldm_fused.is_patched(ours)


def warned(function, *args):
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        result = function(*args)
    return result, [w for w in record if issubclass(w.category, torch.jit.TracerWarning)]


@pytest.mark.parametrize("name", MODELS)
def test_a_trace_warns_no_more_than_of_the_plain_model(name):
    ours, plain = models(name)
    x = inputs(name)
    traced, ours_warned = warned(torch.jit.trace, ours, x)
    assert len(ours_warned) <= len(warned(torch.jit.trace, plain, x)[1])
    x = inputs(name, 3)
    close(traced(*x), plain(*x))


def test_what_is_refused_is_refused_in_a_trace():
    with pytest.raises(RuntimeError, match="num_groups must divide"):
        torch.jit.trace(lambda x: ldm_fused.group_norm_silu(x, 3), (torch.randn(2, *X),))


# ---- Subclasses of Tensor ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OF_ONE)
def test_gradients_of_each_sample(name):
    """Parameters are ExpandedWeights there, which know PyTorch's functions only."""
    found = []
    for model in models(name):
        torch.manual_seed(0)
        x = inputs(name)
        if name == "bias_add_residual":
            pytest.skip("the plain formula is refused")
        call_for_per_sample_grads(model, batch_size=2)(*x).square().sum().backward()
        found.append([p.grad_sample for p in model.parameters()])
    close(*found)


class Doubled(torch.Tensor):
    """Its group_norm and its sum are twice PyTorch's; it refuses functions that it has never heard of."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if not getattr(function, "__module__", "torch").startswith(("torch", "_")) and function is not None:
            raise RuntimeError(f"{function} is not known")
        result = super().__torch_function__(function, types, args, kwargs or {})
        return result * 2 if function is nn.functional.group_norm else result


@pytest.mark.parametrize("name", OF_ONE)
@torch.no_grad()
def test_a_subclass_with_functions_of_its_own_gets_pytorchs(name):
    ours, plain = models(name)
    x = [t.as_subclass(Doubled) for t in inputs(name)]
    y, expected = ours(*x), plain(*x)
    assert type(y) is type(expected) is Doubled
    close(y.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))


class Labelled(torch.Tensor):
    """It changes nothing."""


@torch.no_grad()
def test_a_subclass_without_functions_of_its_own_is_fused():
    x = torch.randn(2, *X).as_subclass(Labelled)
    with Calls() as calls:
        y = ldm_fused.group_norm_silu(x, 4)
    assert type(y) is Labelled and len(calls.names) == 1


@torch.no_grad()
def test_a_mode_that_watches_functions_leaves_the_op_fused():
    with torch.device("cpu"), Calls() as calls:
        ldm_fused.group_norm_silu(torch.randn(2, *X), 4)
    assert len(calls.names) == 1


# ---- disabled ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_disabled_computes_pytorchs_formula(name, grad):
    ours, plain = models(name)
    x = inputs(name)
    with ldm_fused.disabled(), torch.set_grad_enabled(grad), Calls() as calls:
        assert torch.equal(ours(*x), plain(*x)) or name == "group_norm_act"  # whose formula has swish in two steps
        close(ours(*x), plain(*x))
    assert calls.names == []
    with torch.set_grad_enabled(grad), Calls() as calls:
        ours(*x)
    assert calls.names != []


@pytest.mark.parametrize("name", ["GroupNormSiLU", "FusedResnetBlock", "patched block"])
@pytest.mark.parametrize("then", [False, True])
def test_a_checkpoint_repeats_what_its_forward_did_under_the_switch(name, then):
    ours, plain = models(name)
    [x] = inputs(name)
    x.requires_grad_()

    def run(model, off):
        if off:
            with ldm_fused.disabled():
                return checkpoint(model, x, use_reentrant=False)
        return checkpoint(model, x, use_reentrant=False)

    y = run(ours, not then)
    if then:
        with ldm_fused.disabled():
            y.square().sum().backward()
    else:
        y.square().sum().backward()
    found = [x.grad, *(p.grad for p in ours.parameters())]
    x.grad = None
    plain(x).square().sum().backward()
    torch.testing.assert_close(found, [x.grad, *(p.grad for p in plain.parameters())], rtol=1e-3, atol=1e-4)


def test_disabled_takes_parameters_in_float32_beside_16_bits():
    x, weight = torch.randn(2, *X).bfloat16(), torch.randn(8)
    with ldm_fused.disabled():
        found = ldm_fused.group_norm_silu(x, 4, weight, weight)
    torch.testing.assert_close(found, ldm_fused.group_norm_silu(x, 4, weight, weight), rtol=2e-2, atol=2e-2)


def test_disabled_refuses_what_the_op_refuses():
    with ldm_fused.disabled(), pytest.raises(ValueError, match="activation must be"):
        ldm_fused.group_norm_act(torch.randn(2, *X), 4, activation="relu")


@torch.no_grad()
def test_disabled_reaches_compiled_code():
    torch._dynamo.reset()
    ours, _ = models("FusedResnetBlock")
    targets, [x] = [], inputs("FusedResnetBlock")

    def told(graph, inputs):
        targets.append({node.target for node in graph.graph.nodes})
        return graph

    run = torch.compile(ours, backend=told, fullgraph=True)
    run(x)
    with ldm_fused.disabled():
        run(x)
    op = torch.ops.ldm_fused.group_norm_act.default
    assert [op in t for t in targets] == [True, False]


# ---- Counters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_of_the_plain_model(name):
    counts = []
    for model in models(name):
        with FlopCounterMode(display=False) as counter:
            model(*inputs(name)).sum().backward()
        counts.append(counter.get_flop_counts().get("Global", {}))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("grad", [False, True])
def test_the_profiler_knows_the_ops_shapes(grad):
    x, residual = torch.randn(2, 2, *X)
    with torch.profiler.profile(record_shapes=True) as profile, torch.set_grad_enabled(grad):
        y = ldm_fused.group_norm_silu(x.requires_grad_(grad), 4)
        ldm_fused.bias_add_residual(y, residual)
    shapes = {e.key.removesuffix("_training" if grad else "_inference"): e.input_shapes[0]
              for e in profile.key_averages(True) if e.key.startswith("ldm_fused::")}
    assert shapes == {f"ldm_fused::{name}": [2, *X] for name in ("group_norm_act", "bias_add_residual")}


@pytest.mark.parametrize("name", OF_ONE)
@torch.no_grad()
def test_hooks_see_the_modules_of_the_plain_model(name):
    """As those that sum a model up: each module's class and the shape of its output."""
    if name == "GroupNormSiLU":
        pytest.skip("one module where the plain model has two")
    seen = []
    for model in models(name):
        rows = []
        for path, module in model.named_modules():
            module.register_forward_hook(lambda m, args, y, path=path: rows.append((path, y.shape)))
        model(*inputs(name))
        seen.append(sorted(rows))
    assert seen[0] == seen[1]
