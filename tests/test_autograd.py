"""First and second derivatives, ``torch.func``, forward mode, checkpointing: all give the reference's results."""

import pytest
import torch
from oracle import GRADIENTS, assert_within_bound, laid_out, make_case
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import ldm_fused
from ldm_fused import reference

OPTIONS = GRADIENTS[1:]


def op_of(case, activation="silu", function=ldm_fused.group_norm_act):
    """The op as a function of its tensors alone."""

    def op(x, weight=None, bias=None, pre_bias=None, scale=None, shift=None):
        return function(x, case.num_groups, weight, bias, case.eps, activation=activation, pre_bias=pre_bias,
                        scale=scale, shift=shift)

    return op


def tensors_of(case, requires_grad=False):
    return tuple(getattr(case, name).clone().requires_grad_(requires_grad) for name in GRADIENTS)


@pytest.fixture
def small():
    return make_case((2, 6, 3), 3, torch.float64)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ["silu", None])
def test_gradcheck(device, layout, activation):
    case = make_case((2, 6, 2, 2), 3, torch.float64, layout).to(device)
    assert gradcheck(op_of(case, activation), tensors_of(case, requires_grad=True))


@pytest.mark.parametrize("activation", ["silu", None])
def test_gradgradcheck(device, small, activation):
    case = small.to(device)
    assert gradgradcheck(op_of(case, activation), tensors_of(case, requires_grad=True))


def test_gradcheck_of_a_bias_alone(device, small):
    x, bias = (t.to(device).requires_grad_() for t in (small.x, small.bias))
    function = lambda x, bias: ldm_fused.group_norm_silu(x, 3, None, bias)  # noqa: E731
    assert gradcheck(function, (x, bias)) and gradgradcheck(function, (x, bias))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_through_autograd(device, dtype, layout):
    case = make_case((2, 20, 9, 7), 2, dtype, layout)
    moved = case.to(device)
    leaves = tensors_of(moved, requires_grad=True)
    y = op_of(moved)(*leaves)
    y.backward(moved.dy)
    assert_within_bound(case, {"y": y, **{name: leaf.grad for name, leaf in zip(GRADIENTS, leaves)}})
    assert leaves[0].grad.stride() == leaves[0].stride()


@pytest.mark.parametrize("frozen", range(6), ids=GRADIENTS)
def test_what_needs_no_gradient_gets_none(small, frozen):
    leaves = [t.requires_grad_(i != frozen) for i, t in enumerate(tensors_of(small))]
    op_of(small)(*leaves).sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [i == frozen for i in range(6)]


@pytest.mark.parametrize("dy", ["expanded", "transposed", "other layout"])
def test_output_gradients_of_any_strides(device, dy):
    case = make_case((4, 8, 4, 4), 2, options=("weight", "bias"))
    if dy == "expanded":
        gradient = torch.randn(1, 1, 1, 4).expand(4, 8, 4, 4)
    elif dy == "transposed":
        gradient = case.dy.transpose(2, 3)
    else:
        gradient = laid_out(case.dy, "channels_last")
    x, weight, bias = (t.to(device).requires_grad_() for t in (case.x, case.weight, case.bias))
    y = ldm_fused.group_norm_silu(x, 2, weight, bias)
    found = torch.autograd.grad(y, (x, weight, bias), gradient.to(device))
    case = type(case)(**{**vars(case), "dy": gradient})
    assert_within_bound(case, {"y": y, **dict(zip(("x", "weight", "bias"), found))})


def test_only_the_input_of_its_size_is_saved(device):
    x = torch.randn(2, 8, 16, 16, device=device, requires_grad=True)
    weight = torch.ones(8, device=device, requires_grad=True)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        y = ldm_fused.group_norm_silu(x, 2, weight)
    large = [t for t in saved.values() if t.numel() >= x.numel()]
    assert [t.data_ptr() for t in large] == [x.data_ptr()] and y.data_ptr() not in saved


def test_output_may_be_changed_in_place(device):
    x = torch.randn(2, 8, 4, 4, device=device, requires_grad=True)
    y = ldm_fused.group_norm_silu(x, 2)
    expected = torch.autograd.grad(y.sum() * 2, x, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(y.mul_(2).sum(), x)[0], expected)


def test_changing_the_input_in_place_is_noticed(device):
    x = torch.randn(2, 8, 4, 4, device=device, requires_grad=True)
    h = x * 1
    y = ldm_fused.group_norm_silu(h, 2)
    h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_checkpointing_repeats_the_bits(device):
    x = torch.randn(2, 8, 6, 6, device=device, requires_grad=True)
    plain = torch.autograd.grad(ldm_fused.group_norm_silu(x, 2).square().sum(), x)[0]
    for use_reentrant in (False, True):
        y = checkpoint(ldm_fused.group_norm_silu, x, 2, use_reentrant=use_reentrant)
        y.square().sum().backward()
        assert torch.equal(x.grad, plain)
        x.grad = None


@pytest.mark.parametrize("function", [ldm_fused.group_norm_act, reference.group_norm_act], ids=["ours", "reference"])
def test_create_graph_where_arguments_depend_on_each_other(function):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    calls = []

    def f(create_graph):
        h = x * 1.5
        h.register_hook(lambda g: calls.append(1) or g * 2)
        scale = h.mean(2)
        y = function(h, 3, scale=scale, shift=scale)
        return torch.autograd.grad(y.square().sum(), x, create_graph=create_graph)[0]

    torch.testing.assert_close(f(True), f(False))
    assert len(calls) == 2


@pytest.mark.parametrize("std", [1e15, 1e-13])
def test_input_gradient_far_from_one(std):
    case = make_case((2, 8, 16, 16), 2, eps=0.0, silu=False, options=("weight", "bias"))
    case = type(case)(**{**vars(case), "x": case.x * std})
    x = case.x.clone().requires_grad_()
    y = ldm_fused.group_norm_act(x, 2, case.weight, case.bias, 0.0, activation=None)
    assert_within_bound(case, {"x": torch.autograd.grad(y, x, case.dy)[0]})


@pytest.mark.parametrize("function", [ldm_fused.group_norm_act, reference.group_norm_act], ids=["ours", "reference"])
def test_forward_mode_through_the_backward_pass_is_refused(small, function):
    """Not a silent zero: PyTorch's own op has no forward mode for its backward either."""
    x = small.x.clone().requires_grad_()
    y = function(x, 3)
    backward = lambda dy: torch.autograd.grad(y, x, dy, retain_graph=True)[0]  # noqa: E731
    with pytest.raises(RuntimeError):  # NotImplementedError is one
        torch.func.jvp(backward, (small.dy,), (torch.randn_like(small.dy),))


# ---- torch.func and forward mode ---------------------------------------------------------------------------------


def ours(case):
    return op_of(case)


def theirs(case):
    return op_of(case, function=reference.group_norm_act)


def assert_same(transform, case):
    torch.testing.assert_close(transform(ours(case)), transform(theirs(case)))


def test_func_grad(device, small):
    case, arguments = small.to(device), tensors_of(small.to(device))
    assert_same(lambda f: torch.func.grad(lambda *a: f(*a).square().sum(), argnums=tuple(range(6)))(*arguments), case)


def test_func_grad_of_grad(device, small):
    case, (x, *rest) = small.to(device), tensors_of(small.to(device))

    def twice(f):
        inner = torch.func.grad(lambda x: f(x, *rest).square().sum())
        return torch.func.grad(lambda x: inner(x).square().sum())(x)

    assert_same(twice, case)


def test_func_jvp(device, small):
    case, arguments = small.to(device), tensors_of(small.to(device))
    tangents = tuple(torch.randn_like(t) for t in arguments)
    assert_same(lambda f: torch.func.jvp(f, arguments, tangents), case)
    assert torch.func.jvp(ours(case), arguments, tangents)[1].abs().max() > 0.01


def test_func_vmap(device, small):
    case = small.to(device)
    xs = torch.randn(5, *case.x.shape, dtype=torch.float64, device=device)
    assert_same(lambda f: torch.func.vmap(f)(xs), case)
    assert_same(lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x).square().sum()))(xs), case)


def test_func_hessian(device, small):
    case = small.to(device)
    assert_same(lambda f: torch.func.hessian(lambda x: f(x).square().sum())(case.x), case)


def test_dual_numbers(device, small):
    case = small.to(device)
    tangent = torch.randn_like(case.x)

    def directional(f):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(case.x, tangent))).tangent

    assert_same(directional, case)


def test_functional_call(device):
    module = ldm_fused.GroupNormSiLU(2, 8).to(device)
    parameters = {name: torch.randn(8, device=device) for name, _ in module.named_parameters()}
    x = torch.randn(2, 8, 5, device=device)
    expected = reference.group_norm_act(x, 2, parameters["weight"], parameters["bias"])
    torch.testing.assert_close(torch.func.functional_call(module, parameters, (x,)), expected)
