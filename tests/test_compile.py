"""opcheck, ``torch.compile(fullgraph=True)``, ``torch.export`` and autocast."""

import pytest
import torch
import torch.nn.functional as F
from oracle import GRADIENTS, assert_within_bound, laid_out, make_case

import ldm_fused
from ldm_fused import reference

FORWARD = torch.ops.ldm_fused.group_norm_act.default
BACKWARD = torch.ops.ldm_fused.group_norm_act_backward.default


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


# ---- opcheck -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("options", [(), GRADIENTS[1:]], ids=["no parameters", "all parameters"])
def test_opcheck_forward(device, options, layout):
    case = make_case((2, 6, 4, 5), 3, layout=layout, options=options).to(device)
    arguments = [t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in case.arguments()]
    torch.library.opcheck(FORWARD, arguments)


@pytest.mark.parametrize("dtype,out_dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_opcheck_forward_out_dtype(device, dtype, out_dtype):
    torch.library.opcheck(FORWARD, make_case((2, 6, 4, 5), 3, dtype, out_dtype=out_dtype).to(device).arguments())


def test_opcheck_forward_of_strided_input(device):
    x = torch.randn(4, 2, 6, 5, device=device)[:, :, ::2].transpose(0, 1)
    torch.library.opcheck(FORWARD, (x, 2, None, None, 1e-5, True, None, None, None, None))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mask", [[True] * 6, [True, False, True, False, False, True], [False] * 6], ids=str)
def test_opcheck_backward(device, mask, layout):
    case = make_case((2, 6, 4, 5), 3, layout=layout).to(device)
    _, mean, rstd = FORWARD(*case.arguments())
    torch.library.opcheck(BACKWARD, (case.dy, case.x, mean, rstd, case.weight, case.bias, True, case.pre_bias,
                                     case.scale, case.shift, mask))


# ---- torch.compile -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fullgraph_with_backward(device, dtype, layout):
    case = make_case((2, 12, 6, 5), 3, dtype, layout)
    moved = case.to(device)
    leaves = [getattr(moved, name).requires_grad_() for name in GRADIENTS]

    @torch.compile(fullgraph=True)
    def f(x, weight, bias, pre_bias, scale, shift):
        y = ldm_fused.group_norm_act(x, 3, weight, bias, pre_bias=pre_bias, scale=scale, shift=shift)
        return y * 1.0  # something of Inductor's own behind the op

    y = f(*leaves)
    y.backward(moved.dy)
    assert_within_bound(case, {"y": y, **{name: leaf.grad for name, leaf in zip(GRADIENTS, leaves)}})
    assert y.stride() == moved.x.stride()


def test_dynamic_shapes_compile_once(device):
    compilations = 0

    def count(graph, inputs):
        nonlocal compilations
        compilations += 1
        return graph

    module = ldm_fused.GroupNormSiLU(4, 16).to(device)
    compiled = torch.compile(module, backend=count, fullgraph=True, dynamic=True)
    for batch, size in ((2, 8), (3, 9), (5, 17)):
        x = torch.randn(batch, 16, size, size + 1, device=device)
        torch.testing.assert_close(compiled(x), module(x))
    assert compilations == 1


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_fullgraph_with_dropout(device, dropout_p):
    x = torch.randn(2, 8, 16, 16, device=device)
    f = torch.compile(lambda x: ldm_fused.group_norm_act(x, 2, dropout_p=dropout_p), fullgraph=True)
    assert ((f(x) == 0).float().mean().item() > 0.3) == (dropout_p > 0)


def test_fullgraph_of_func_grad(device):
    f = lambda x: ldm_fused.group_norm_silu(x, 2).square().sum()  # noqa: E731
    x = torch.randn(2, 8, 5, device=device)
    torch.testing.assert_close(torch.compile(torch.func.grad(f), fullgraph=True)(x), torch.func.grad(f)(x))


@pytest.mark.parametrize("strict", [True, False])
def test_export(device, strict):
    module = ldm_fused.GroupNormSiLU(4, 16).to(device)
    x = torch.randn(2, 16, 8, 8, device=device)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: batch},), strict=strict)
    assert any(node.target is FORWARD for node in exported.graph.nodes)
    other = torch.randn(5, 16, 8, 8, device=device)
    torch.testing.assert_close(exported.module()(other), module(other))


def test_meta_tensors_have_the_right_shape_and_layout():
    for layout in ("contiguous", "channels_last"):
        x = laid_out(torch.randn(2, 8, 4, 6, dtype=torch.bfloat16), layout).to("meta")
        y = ldm_fused.group_norm_silu(x, 2)
        assert (y.shape, y.stride(), y.dtype, y.device) == (x.shape, x.stride(), x.dtype, x.device)


# ---- Autocast ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_autocast_has_the_dtype_of_group_norm(device, dtype, parameter_dtype, compiled):
    parameter_dtype = torch.float64 if dtype == torch.float64 else parameter_dtype
    x = torch.randn(2, 8, 6, 6).to(device, dtype)
    weight, bias = torch.randn(2, 8).to(device, parameter_dtype)
    f = torch.compile(ldm_fused.group_norm_silu, fullgraph=True) if compiled else ldm_fused.group_norm_silu
    with torch.autocast(device, torch.bfloat16):
        try:
            expected = F.group_norm(x, 2, weight, bias)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                ldm_fused.group_norm_silu(x, 2, weight, bias)
            return
        result = f(x, 2, weight, bias)
    assert result.dtype == expected.dtype
    exact = F.silu(F.group_norm(x.double(), 2, weight.double(), bias.double()))
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if result.dtype.itemsize == 2 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(result.double(), exact, **tolerance)


def test_autocast_takes_16_bit_scale_and_shift_beside_float32():
    x, scale, shift = torch.randn(2, 8, 6, 6), torch.randn(2, 8).bfloat16(), torch.randn(2, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = ldm_fused.group_norm_act(x, 2, scale=scale, shift=shift)
        expected = reference.group_norm_act(x, 2, scale=scale, shift=shift)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert found.dtype == expected.dtype


def test_autocast_gradients_have_their_leaves_dtypes(device):
    x = torch.randn(2, 8, 6, 6, device=device, dtype=torch.bfloat16, requires_grad=True)
    module = ldm_fused.GroupNormSiLU(2, 8).to(device)
    with torch.autocast(device, torch.bfloat16):
        module(x).float().square().sum().backward()
    assert x.grad.dtype == torch.bfloat16 and module.weight.grad.dtype == torch.float32


# ---- Devices without kernels -------------------------------------------------------------------------------------


def test_a_device_without_kernels_composes_with_one_warning(monkeypatch):
    monkeypatch.setattr(ldm_fused.functional, "_KERNEL_DEVICES", frozenset({"meta"}))
    monkeypatch.setattr(ldm_fused.functional, "_plain", lambda *a: None)  # which knows that a CPU has kernels
    monkeypatch.setattr(ldm_fused.functional, "_warned", set())
    x = torch.randn(2, 8, 5, requires_grad=True)
    with pytest.warns(UserWarning, match="no kernels for 'cpu' tensors") as record:
        first, second = ldm_fused.group_norm_silu(x, 2), ldm_fused.group_norm_silu(x, 2)
    assert len(record) == 1 and torch.equal(first, second)
    torch.testing.assert_close(first, reference.group_norm_act(x, 2))
