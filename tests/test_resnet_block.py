"""FusedResnetBlock against the reference block: numbers, state dicts, and when a site must not be fused."""

import copy
import inspect
import pickle
import re

import conftest
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import ldm_fused
from ldm_fused import FusedResnetBlock, functional, ops, reference, resnet_block
from ldm_fused.compat import ldm


@pytest.fixture(params=["cpu", "cpu as CUDA", "cuda"])
def device(request, monkeypatch):
    """Where a block lives. "cpu as CUDA" leaves the convolutions' biases to the fused ops, as is done on CUDA."""
    if request.param == "cpu as CUDA":
        monkeypatch.setattr(resnet_block, "_has_separate_bias", lambda x: True)
        return "cpu"
    return conftest.cuda() if request.param == "cuda" else "cpu"


CONFIGURATIONS = {
    "identity": dict(in_channels=32, dropout=0.0),
    "1x1 shortcut": dict(in_channels=32, out_channels=64, dropout=0.0),
    "3x3 shortcut": dict(in_channels=64, out_channels=32, conv_shortcut=True, dropout=0.0),
    "time embedding": dict(in_channels=32, out_channels=64, dropout=0.0, temb_channels=24),
    "other groups": dict(in_channels=20, out_channels=10, dropout=0.0, num_groups=5, eps=1e-3),
}


def pair(device="cpu", dtype=torch.float32, **configuration):
    """A reference block and a fused one with the same weights, norms not at their initial ones and zeros."""
    block = reference.ResnetBlock(**configuration)
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    fused = FusedResnetBlock(**configuration)
    fused.load_state_dict(block.state_dict(), strict=True)
    return block.to(device, dtype), fused.to(device, dtype)


def inputs(block, device="cpu", dtype=torch.float32):
    x = torch.randn(2, block.in_channels, 9, 7, device=device, dtype=dtype, requires_grad=True)
    temb = torch.randn(2, block.temb_proj.in_features, device=device, dtype=dtype, requires_grad=True) \
        if hasattr(block, "temb_proj") else None
    return x, temb


def results(block, x, temb, dy):
    y = block(x, temb)
    leaves = [t for t in (x, temb, *block.parameters()) if t is not None]
    return [y, *torch.autograd.grad(y, leaves, dy)]


@pytest.fixture
def fused_calls(monkeypatch):
    """The arguments that the fused op is called with, the short way or the long one."""
    calls = []
    norms, route, plain = (ops.GROUP_NORM_ACT, ops.GROUP_NORM_ACT_AND_SHORTCUT), functional.route, functional._plain

    def counted(x, num_groups, weight, bias, eps, activation):
        y = plain(x, num_groups, weight, bias, eps, activation)
        if y is not None:
            calls.append(ops.Arguments(x, num_groups, weight, bias, eps, activation is not None, *[None] * 4))
        return y

    monkeypatch.setattr(functional, "_plain", counted)
    monkeypatch.setattr(functional, "route", lambda op, a: op in norms and calls.append(a) or route(op, a))
    return calls


# ---- Numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_computes_what_the_reference_computes(device, name, recompute, layout, fused_calls):
    block, fused = pair(device, torch.float64, **CONFIGURATIONS[name])
    fused.recompute = recompute
    x, temb = inputs(block, device, torch.float64)
    x = x.detach().contiguous(memory_format=layout).requires_grad_()
    dy = torch.randn_like(block(x, temb))
    for ours, theirs in zip(results(fused, x, temb, dy), results(block, x, temb, dy)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert len(fused_calls) == (4 if recompute else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_no_less_accurate_than_the_reference(device, dtype):
    block, fused = pair(device, dtype, **CONFIGURATIONS["time embedding"])
    x, temb = inputs(block, device, dtype)
    exact = copy.deepcopy(block).double()(x.double(), temb.double())
    ours, theirs = ((b(x, temb).double() - exact).square().mean().sqrt() for b in (fused, block))
    assert ours <= 2 * theirs + torch.finfo(dtype).eps * exact.square().mean().sqrt()


def kept_and_gradients(block, x):
    """How many tensors of x's size autograd keeps, and all gradients, of a pass with fixed random numbers."""
    saved = {}
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        y = block(x)
    gradients = torch.autograd.grad(y.square().sum(), (x, *block.parameters()))
    return sum(t.shape == x.shape for t in saved.values()), gradients


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_keeps_four_tensors_and_two_with_recompute(device, dropout):
    block, fused = pair(device, in_channels=32, dropout=dropout)
    x, _ = inputs(block, device)
    kept = [kept_and_gradients(b, x)[0] for b in (block, fused, FusedResnetBlock.from_module(fused, recompute=True))]
    assert kept == [9 if dropout else 8, 4, 2]  # PyTorch keeps dropout's mask


class Calls(TorchDispatchMode):
    """Notes the ops that are called on tensors of more than one dimension."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor) and args[0].dim() == 4:
            self.names.append(op.name())
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["identity", "1x1 shortcut"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_shortcuts_gradient_takes_no_pass_of_its_own(device, recompute, name):
    _, fused = pair(device, **CONFIGURATIONS[name])
    fused.recompute = recompute
    x, _ = inputs(fused, device)
    y = fused(x)
    with Calls() as calls:
        torch.autograd.grad(y, (x, *fused.parameters()), torch.ones_like(y))
    assert not [name for name in calls.names if name.startswith("aten::add")]
    assert sum("group_norm_act" in name and "backward" in name for name in calls.names) == 2


def test_second_derivatives_reach_the_shortcut(device):
    _, fused = pair(device, torch.float64, in_channels=4, num_groups=2, dropout=0.0)
    x = torch.randn(1, 4, 3, 2, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradgradcheck(fused, x)


def test_recompute_gives_the_same_bits(device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    _, fused = pair(device, in_channels=32, dropout=0.3)
    x, _ = inputs(fused, device)
    (_, plain), (kept, again) = (kept_and_gradients(b, x)
                                 for b in (fused, FusedResnetBlock.from_module(fused, recompute=True)))
    assert kept == 2 and all(torch.equal(a, b) for a, b in zip(plain, again))


def test_dropout_follows_its_module(device):
    _, fused = pair(device, in_channels=32, dropout=0.5)
    x = torch.randn(2, 32, 8, 8, device=device)
    assert not torch.equal(fused(x), fused(x))
    fused.dropout.p = 0.0
    assert torch.equal(fused(x), fused(x))
    fused.dropout.p = 0.5
    fused.eval()
    assert torch.equal(fused(x), fused(x))
    torch.manual_seed(3)
    fused.train()
    first = fused(x)
    torch.manual_seed(3)
    assert torch.equal(first, fused(x))


class Factors(nn.Module):
    """What a call of the op has multiplied its output by, in place of dropout."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, h):
        return h * ops.dropout_factors(self.call)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_dropout_is_part_of_the_second_norm(device, name, recompute, fused_calls):
    block, fused = pair(device, torch.float64, **{**CONFIGURATIONS[name], "dropout": 0.4})
    fused.recompute = recompute
    x, temb = inputs(block, device, torch.float64)
    dy = torch.randn_like(block(x, temb))
    ours = results(fused, x, temb, dy)
    assert [call.dropout_p for call in fused_calls] == [0.0, 0.4, *[0.4, 0.0] * recompute]
    assert all(torch.equal(call.dropout_seed, fused_calls[1].dropout_seed) for call in fused_calls if call.dropout_p)
    block.dropout = Factors(fused_calls[1])
    for a, b in zip(ours, results(block, x, temb, dy)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("odd", ["hooked norm", "hooked dropout", "subclassed dropout", "tiny probability"])
def test_dropout_beside_what_must_be_called(odd, fused_calls):
    block, fused = pair(dtype=torch.float64, in_channels=32, dropout=0.5)
    for b in (block, fused):
        if odd == "hooked norm":
            b.norm2.register_forward_hook(lambda *_: None)
        elif odd == "hooked dropout":
            b.dropout.register_forward_hook(lambda module, args, output: output * 2)
        elif odd == "subclassed dropout":
            b.dropout = type("Dropout", (nn.Dropout,), {})(0.5)
        else:
            b.dropout.p = 1e-3
    x, _ = inputs(block, dtype=torch.float64)
    found = []
    for b in (block, fused):
        torch.manual_seed(0)
        found.append(b(x))
    torch.testing.assert_close(*found)
    assert all(call.dropout_seed is None for call in fused_calls) and fused_calls


def test_output_never_aliases_the_input(device):
    _, fused = pair(device, in_channels=32, dropout=0.0)
    x = torch.randn(2, 32, 8, 8, device=device)
    before = x.clone()
    fused(x).zero_()
    assert torch.equal(x, before)


def test_fullgraph_compile_with_dropout(device):
    _, fused = pair(device, in_channels=32, dropout=0.4)
    x, _ = inputs(fused, device)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True)
    y = compiled(x)
    y.square().sum().backward()
    assert not torch.equal(compiled(x), y) and x.grad.isfinite().all()
    fused.eval()
    torch.testing.assert_close(compiled(x), fused(x), rtol=1e-3, atol=1e-4)


def test_fullgraph_compile_with_backward(device):
    block, fused = pair(device, **CONFIGURATIONS["time embedding"])
    x, temb = inputs(block, device)
    dy = torch.randn_like(block(x, temb))
    torch._dynamo.reset()
    for ours, theirs in zip(results(torch.compile(fused, fullgraph=True), x, temb, dy), results(block, x, temb, dy)):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(device, dtype, dropout, fused_calls):
    block, fused = pair(device, **{**CONFIGURATIONS["time embedding"], "dropout": dropout})
    x, temb = (t.detach() for t in inputs(block, device))
    with torch.autocast(device, torch.bfloat16):
        ours = fused(x.to(dtype), temb)
        if dropout:
            block.dropout = Factors(fused_calls[1])
        theirs = block(x.to(dtype), temb)
    assert ours.dtype == theirs.dtype and len(fused_calls) == 2
    exact = block(x, temb).double()
    errors = [(y.double() - exact).square().mean().sqrt() for y in (ours, theirs)]
    assert errors[0] <= 1.2 * errors[1]
    # The convolution takes the op's output as it is, with no cast between.
    assert all(a.out_dtype == torch.bfloat16 for a in fused_calls)


@pytest.mark.parametrize("batches", [(4, 1), (1, 4)])
def test_time_embeddings_broadcast(batches):
    block, fused = pair(**CONFIGURATIONS["time embedding"])
    x, temb = torch.randn(batches[0], 32, 5, 4), torch.randn(batches[1], 24)
    torch.testing.assert_close(fused(x, temb), block(x, temb), rtol=1e-4, atol=1e-5)


def test_block_on_meta():
    fused = FusedResnetBlock(in_channels=32, out_channels=64, dropout=0.0).to("meta")
    assert fused(torch.empty(2, 32, 8, 8, device="meta")).shape == (2, 64, 8, 8)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("strict", [True, False])
def test_export_keeps_the_op(strict, recompute):
    fused = FusedResnetBlock(in_channels=32, dropout=0.0, recompute=recompute)
    x = torch.randn(2, 32, 8, 8)
    exported = torch.export.export(fused, (x,), strict=strict)
    assert sum(n.target is torch.ops.ldm_fused.group_norm_act.default for n in exported.graph.nodes) == 2
    torch.testing.assert_close(exported.module()(x), fused(x))


def test_func_grad_of_a_recomputing_block():
    fused = FusedResnetBlock(in_channels=32, dropout=0.0, recompute=True)
    x = torch.randn(2, 32, 4, 4)
    found = torch.func.grad(lambda x: fused(x).square().sum())(x)
    x.requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(fused(x).square().sum(), x)[0], rtol=1e-4, atol=1e-4)


def test_trace_keeps_gradients():
    block = FusedResnetBlock(in_channels=32, dropout=0.0)
    x = torch.randn(2, 32, 5, 5)
    traced = torch.jit.trace(block, (x,))
    found, expected = (torch.autograd.grad(b(x).square().sum(), list(block.parameters())) for b in (traced, block))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ---- Drop-in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_same_seed_same_weights_same_names(name):
    torch.manual_seed(7)
    block = reference.ResnetBlock(**CONFIGURATIONS[name])
    torch.manual_seed(7)
    fused = FusedResnetBlock(**CONFIGURATIONS[name])
    assert list(block.state_dict()) == list(fused.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(block.state_dict().values(), fused.state_dict().values()))
    assert [n for n, _ in block.named_modules()] == [n for n, _ in fused.named_modules()]
    assert [type(m) for m in block.children()] == [type(m) for m in fused.children()]
    for attribute in ("in_channels", "out_channels", "use_conv_shortcut"):
        assert getattr(block, attribute) == getattr(fused, attribute)
    block.load_state_dict(fused.state_dict(), strict=True)


def test_compat_ldm_signature():
    block = ldm.ResnetBlock(in_channels=32, out_channels=64, dropout=0.0)
    assert block.temb_proj.in_features == 512 and block.norm1.eps == 1e-6 and block.norm1.num_groups == 32
    x = torch.randn(1, 32, 4, 4)
    assert block(x, None).shape == block(x, torch.randn(1, 512)).shape == (1, 64, 4, 4)
    with pytest.raises(TypeError):
        block(x)
    assert not hasattr(ldm.ResnetBlock(in_channels=32, dropout=0.0, temb_channels=0), "temb_proj")


def test_temb_without_a_projection_is_a_value_error():
    x, temb = torch.randn(1, 32, 4, 4), torch.randn(1, 8)
    for cls in (FusedResnetBlock, reference.ResnetBlock):
        block = cls(in_channels=32, dropout=0.0)
        with pytest.raises(ValueError, match="temb_proj"):
            block(x, temb)


@pytest.mark.parametrize("cls", [FusedResnetBlock, ldm.ResnetBlock, ldm_fused.GroupNormSiLU])
def test_copies_and_pickles(cls):
    module = cls(2, 32) if cls is ldm_fused.GroupNormSiLU else cls(in_channels=32, dropout=0.0)
    x = torch.randn(1, 32, 4, 4)
    arguments = (x, None) if cls is ldm.ResnetBlock else (x,)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is cls and torch.equal(other(*arguments), module(*arguments))


def test_group_norm_silu_module_takes_group_norms_arguments():
    module = ldm_fused.GroupNormSiLU(4, 16, eps=1e-3, affine=False, dtype=torch.float64)
    x = torch.randn(2, 16, 3, dtype=torch.float64)
    torch.testing.assert_close(module(x), nn.functional.silu(nn.functional.group_norm(x, 4, eps=1e-3)))
    assert isinstance(module, nn.GroupNorm) and not module.state_dict()
    assert inspect.signature(ldm_fused.GroupNormSiLU) == inspect.signature(nn.GroupNorm)  # bias=False from torch 2.12
    if "bias" in inspect.signature(nn.GroupNorm).parameters:
        assert ldm_fused.GroupNormSiLU(4, 16, bias=False).bias is None


# ---- Pristine or not ---------------------------------------------------------------------------------------------


def replace_forward(block):
    forward = block.norm1.forward
    block.norm1.forward = lambda x: forward(x) * 2


def hook(block):
    block.norm1.register_forward_hook(lambda module, args, output: output * 2)


def hook_before(block):
    block.norm1.register_forward_pre_hook(lambda module, args: (args[0] * 2 + 1,))


def hook_backward(block):
    block.norm1.register_full_backward_hook(lambda module, grad_input, grad_output: (grad_input[0] * 2,))


def parametrize(block):
    parametrizations.weight_norm(block.norm1)


def subclass(block):
    class Doubled(nn.GroupNorm):
        def forward(self, x):
            return super().forward(x) * 2

    norm = Doubled(32, 32, eps=1e-6)
    norm.load_state_dict(block.norm1.state_dict())
    block.norm1 = norm.double()


def other_norm(block):
    block.norm1 = nn.InstanceNorm2d(32, affine=True).double()


DISTURBANCES = [replace_forward, hook, hook_before, hook_backward, parametrize, subclass, other_norm]


@pytest.mark.parametrize("disturb", DISTURBANCES, ids=lambda f: f.__name__)
def test_a_disturbed_norm_is_called_as_it_is(disturb, fused_calls):
    block, fused = pair(dtype=torch.float64, in_channels=32, dropout=0.0)
    torch.manual_seed(0)
    disturb(block)
    torch.manual_seed(0)
    disturb(fused)
    x, _ = inputs(block, dtype=torch.float64)
    dy = torch.randn_like(x)
    for ours, theirs in zip(results(fused, x, None, dy), results(block, x, None, dy)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert len(fused_calls) == 1  # norm2's


def test_global_hooks_are_called(fused_calls):
    _, fused = pair(in_channels=32, dropout=0.0)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        fused(torch.randn(1, 32, 4, 4))
    finally:
        handle.remove()
    assert fused.norm1 in seen and fused.norm2 in seen and not fused_calls


def test_a_replaced_class_forward_is_called(monkeypatch, fused_calls):
    _, fused = pair(in_channels=32, dropout=0.0)
    forward = nn.GroupNorm.forward
    monkeypatch.setattr(nn.GroupNorm, "forward", lambda self, x: forward(self, x) * 2)
    fused(torch.randn(1, 32, 4, 4))
    assert not fused_calls


def test_parameters_elsewhere_leave_the_norm_to_its_own_devices(fused_calls):
    _, fused = pair(in_channels=32, dropout=0.0)
    weight, bias = fused.norm1.weight, fused.norm1.bias
    fused.norm1.to("meta")

    def bring(module, args):  # what an offloading library does
        module.weight, module.bias = weight, bias

    fused.norm1.register_forward_pre_hook(bring)
    fused(torch.randn(1, 32, 4, 4))
    assert len(fused_calls) == 1


def test_wrapped_convolutions_and_replaced_dropout_are_called():
    block, fused = pair(dtype=torch.float64, in_channels=32, dropout=0.0)

    class Adapter(nn.Module):  # as LoRA does
        def __init__(self, conv):
            super().__init__()
            self.conv = conv
            self.down, self.up = nn.Conv2d(32, 2, 1).double(), nn.Conv2d(2, 32, 1).double()

        def forward(self, x):
            return self.conv(x) + self.up(self.down(x))

    class Half(nn.Module):
        training, p = True, 0.5

        def forward(self, x):
            return x * 0.5

    adapter = Adapter(block.conv1)
    for b in (block, fused):
        b.conv1, b.dropout = adapter, Half()
    x = torch.randn(2, 32, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(fused(x), block(x))


@pytest.mark.parametrize("name", ["conv1", "conv2", "nin_shortcut", "norm2"])
def test_hooked_parts_are_called_whoever_adds_the_biases(device, name):
    block, fused = pair(device, torch.float64, **CONFIGURATIONS["time embedding"])
    seen = []
    for b in (block, fused):
        getattr(b, name).register_forward_hook(lambda module, args, output: seen.append(output) or 2 * output)
    x, temb = inputs(block, device, torch.float64)
    dy = torch.randn_like(block(x, temb))
    for ours, theirs in zip(results(fused, x, temb, dy), results(block, x, temb, dy)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert len(seen) == 3
    torch.testing.assert_close(seen[1], seen[2])


@pytest.mark.parametrize("left", [True, False])
def test_biases_are_left_to_the_fused_ops_only_where_a_convolution_adds_them_apart(left, monkeypatch):
    """On a CPU oneDNN adds them on the way, and the block ends in an ordinary sum."""
    if left:
        monkeypatch.setattr(resnet_block, "_has_separate_bias", lambda x: True)
    calls, add = [], functional.bias_add_residual
    monkeypatch.setattr(functional, "bias_add_residual", lambda *a: calls.append(a) or add(*a))
    _, fused = pair(**CONFIGURATIONS["1x1 shortcut"])
    fused(torch.randn(2, 32, 5, 5))
    assert [biases for _, _, *biases, _ in calls] == ([[fused.conv2.bias, fused.nin_shortcut.bias]] if left else [])


@pytest.mark.parametrize("name", ["scale", "shift", "pre_bias"])
def test_float32_beside_a_float64_input_is_promoted_as_pytorch_does(name):
    norm, x, counts = nn.GroupNorm(2, 4).double(), torch.randn(2, 4, 5, 5).double(), []
    t = torch.randint(-64, 64, (2, 4)) / 64  # 1 + t is exact in float32
    y, _ = resnet_block.norm_swish(norm, x, **{name: t}, count=lambda x, reason: counts.append(reason))
    assert y.dtype == torch.float64 and [reason is None for reason in counts] == [name == "pre_bias"]
    expected = reference.group_norm_act(x, 2, eps=norm.eps, **{name: t.double()})
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_a_float32_norm_beside_a_float64_input_raises_what_pytorch_raises():
    norm, x = nn.GroupNorm(2, 4), torch.randn(2, 4, 5, 5).double()
    with pytest.raises(RuntimeError) as expected:
        norm(x)
    with pytest.raises(RuntimeError, match=re.escape(str(expected.value))):
        resnet_block.norm_swish(norm, x)
