"""bias_add_residual: kernels of every device against float64, gradients, what users may pass, and what it moves."""

from zlib import crc32

import emulated
import pytest
import torch
from oracle import laid_out

import ldm_fused
from ldm_fused import functional, reference

SHAPES = [(2, 64, 8, 8), (1, 640, 3, 5), (3, 30, 7, 5), (2, 10), (4, 6, 17), (1, 8, 3, 10, 11), (40, 4, 3), (1, 2, 16385),
          (1, 24, 37, 41), (1, 320, 1, 1), (1, 4, 65, 129), (2, 2560, 2, 3)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
OPTIONS = [(False, False), (True, False), (False, True), (True, True)]


def random(shape, dtype, layout="contiguous", seed=0):
    """Fresh normal data; None where the layout does not exist."""
    generator = torch.Generator().manual_seed(seed)
    return laid_out(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype), layout)


def make(shape, dtype, layout="contiguous", biases=(True, True), bias_dtype=None, seed=0):
    """x, residual, bias and residual_bias."""
    x = random(shape, dtype, layout, seed)
    if x is None:
        pytest.skip(f"{len(shape)}-D tensors have no channels_last")
    parameters = [random(shape[1:2], bias_dtype or dtype, seed=seed + 2 + i) if there else None
                  for i, there in enumerate(biases)]
    return x, random(shape, dtype, layout, seed + 1), *parameters


def oracle(x, residual, bias, residual_bias, scale):
    doubles = (t if t is None else t.double() for t in (x, residual, bias, residual_bias))
    return reference.bias_add_residual(*doubles, scale)


def on(device, *tensors):
    return [t if t is None else t.to(device) for t in tensors]


def assert_rounded_once(found, exact, magnitude):
    """Within one unit in the last place of the largest term: additions in float32 or better, rounded once."""
    unit = torch.finfo(found.dtype).eps * magnitude
    assert (found.cpu().double() - exact).abs().max() <= unit


def axes(x):
    return [axis for axis in range(x.dim()) if axis != 1]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sum(kernels, shape, dtype, layout):
    arguments = make(shape, dtype, layout, seed=crc32(f"{shape}{dtype}".encode()))
    y = kernels.bias_add_residual(*on(kernels.device, *arguments), 0.7)
    assert y.dtype == dtype and y.stride() == arguments[0].stride()
    assert_rounded_once(y, oracle(*arguments, 0.7), sum(t.abs().max().item() for t in arguments))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("biases", OPTIONS, ids=str)
def test_optional_biases(kernels, biases, layout):
    arguments = make((2, 12, 5, 6), torch.float32, layout, biases)
    y = kernels.bias_add_residual(*on(kernels.device, *arguments), 1.0)
    assert_rounded_once(y, oracle(*arguments, 1.0), 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_biases_beside_16_bits(kernels, dtype):
    arguments = make((2, 20, 9, 4), dtype, bias_dtype=torch.float32)
    y = kernels.bias_add_residual(*on(kernels.device, *arguments), 1.0)
    assert_rounded_once(y, oracle(*arguments, 1.0), 8)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_channel_sums(kernels, shape, dtype, layout):
    x, *_ = make(shape, dtype, layout, seed=crc32(f"{shape}{dtype}".encode()))
    sums = kernels.channel_sums(x.to(kernels.device))
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    assert sums.dtype == accumulate and sums.shape == (shape[1],)
    magnitude = x.double().abs().sum(axes(x)).max().item()
    assert_rounded_once(sums, x.double().sum(axes(x)), 4 * magnitude)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_long_sum_loses_no_digits(kernels, layout):
    # 2^18 equal terms: a single float32 accumulator would be off by hundreds of units.
    x = laid_out(torch.full((1, 2, 512, 512), 0.1), layout)
    sums = kernels.channel_sums(x.to(kernels.device)).cpu()
    torch.testing.assert_close(sums.double(), x.double().sum(axes(x)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [1, 3])
def test_misaligned_views(kernels, dtype, offset, layout):
    x, residual, *biases = make((2, 16, 8, 8), dtype, layout)

    def misaligned(t):
        room = torch.full((t.numel() + 2 * offset,), 7.0, dtype=dtype, device=kernels.device)
        return room[offset:offset + t.numel()].as_strided(t.shape, t.stride()).copy_(t)

    y = kernels.bias_add_residual(misaligned(x), misaligned(residual), *on(kernels.device, *biases), 1.0)
    assert_rounded_once(y, oracle(x, residual, *biases, 1.0), 8)
    torch.testing.assert_close(kernels.channel_sums(misaligned(x)), kernels.channel_sums(x.to(kernels.device)))


@pytest.mark.parametrize("layouts", [("contiguous", "channels_last"), ("channels_last", "contiguous")])
def test_the_result_has_the_first_layout(device, layouts):
    x, residual = (random((2, 8, 4, 6), torch.float32, layout, i).to(device) for i, layout in enumerate(layouts))
    y = ldm_fused.bias_add_residual(x, residual)
    assert y.stride() == x.stride()
    torch.testing.assert_close(y, x + residual, rtol=0, atol=0)


def test_channel_sums_have_the_same_bits_for_any_number_of_threads():
    threads = torch.get_num_threads()
    try:
        for layout in ("contiguous", "channels_last"):
            x = random((3, 40, 61, 67), torch.float32, layout)
            found = []
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                found.append(ldm_fused.ops.channel_sums(x))
            assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(threads)


def test_empty(kernels):
    x = torch.empty(0, 4, 3, 3, device=kernels.device)
    assert kernels.bias_add_residual(x, x, None, None, 1.0).shape == x.shape
    assert kernels.channel_sums(x).tolist() == [0.0] * 4


# ---- What users call


def test_gradients(device):
    arguments = make((2, 6, 3, 5), torch.float64)
    leaves = [t.to(device).requires_grad_() for t in arguments]
    call = lambda *t: ldm_fused.bias_add_residual(*t, 0.5)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("dtype,bias_dtype", [(torch.float32, None), (torch.bfloat16, None),
                                              (torch.bfloat16, torch.float32)])
def test_gradients_are_the_references(device, dtype, bias_dtype, scale):
    tensors = on(device, *make((2, 6, 9, 5), dtype, bias_dtype=bias_dtype))
    dy = random((2, 6, 9, 5), dtype, seed=9).to(device)

    def gradients(call, dtype=None):
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
        return torch.autograd.grad(call(*leaves, scale), leaves, dy.to(dtype or dy.dtype))

    found = gradients(ldm_fused.bias_add_residual)
    for g, exact, leaf in zip(found, gradients(reference.bias_add_residual, torch.float64), tensors):
        assert g.dtype == leaf.dtype
        torch.testing.assert_close(g.double(), exact, rtol=4 * torch.finfo(g.dtype).eps, atol=1e-5)


def test_nothing_is_kept_for_the_backward_pass(device):
    kept = []
    x, residual, bias, residual_bias = (t.to(device).requires_grad_() for t in make((2, 6, 9, 5), torch.float32))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t), lambda t: t):
        ldm_fused.bias_add_residual(x, residual, bias, residual_bias)
    assert kept == []


def test_opcheck():
    arguments = [t.requires_grad_() for t in make((2, 6, 3, 5), torch.float32, "channels_last")]
    torch.library.opcheck(ldm_fused.ops.bias_add_residual, (*arguments, 0.5))
    torch.library.opcheck(ldm_fused.ops.channel_sums, (arguments[0].detach(),))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_with_its_backward_pass(device, dynamic):
    leaves = [t.to(device).requires_grad_() for t in make((2, 6, 8, 8), torch.float32)]
    compiled = torch.compile(ldm_fused.bias_add_residual, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    y, expected = compiled(*leaves, 0.5), ldm_fused.bias_add_residual(*leaves, 0.5)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    for found, want in zip(*(torch.autograd.grad(out.square().sum(), leaves) for out in (y, expected))):
        torch.testing.assert_close(found, want)


def test_func_transforms(device):
    x, residual, bias, residual_bias = on(device, *make((3, 6, 4, 5), torch.float64))
    call = lambda x: ldm_fused.bias_add_residual(x, residual[:1], bias, residual_bias, 0.5)  # noqa: E731
    found = torch.func.vmap(lambda x: call(x[None])[0])(x)
    torch.testing.assert_close(found, torch.cat([call(row[None]) for row in x]))
    torch.testing.assert_close(torch.func.jvp(call, (x[:1],), (residual[1:2],))[1], 0.5 * residual[1:2])


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32),
                                    (torch.float16, torch.bfloat16)])
def test_different_dtypes_are_promoted(device, dtypes):
    x, residual = (random((2, 4, 3), dtype, seed=i).to(device) for i, dtype in enumerate(dtypes))
    y = ldm_fused.bias_add_residual(x, residual)
    assert y.dtype == torch.promote_types(*dtypes)
    torch.testing.assert_close(y, x + residual)


@pytest.mark.parametrize("wrong,error,message", [
    (dict(residual=torch.ones(2, 4, 3, 1)), RuntimeError, "residual must have x's shape"),
    (dict(residual=None), AttributeError, "residual must be a Tensor"),
    (dict(residual=torch.ones(2, 4, 3, 3, dtype=torch.int32)), NotImplementedError, "residual must be float32"),
    (dict(residual=torch.ones(2, 4, 3, 3, device="meta")), RuntimeError, "residual must be on x's device"),
    (dict(x=torch.ones(4), residual=torch.ones(4)), RuntimeError, "at least 2 dimensions"),
    (dict(bias=torch.ones(3)), RuntimeError, r"bias must have shape \[4\]"),
    (dict(bias=torch.ones(4, dtype=torch.float64)), RuntimeError, "bias must have x's dtype"),
    (dict(residual_bias=torch.ones(2, 4)), RuntimeError, r"residual_bias must have shape \[4\]"),
    (dict(residual_bias=1.0), TypeError, "residual_bias must be a Tensor or None"),
    (dict(scale="1"), TypeError, "scale must be a float"),
], ids=lambda value: "" if isinstance(value, type) or isinstance(value, str) else "+".join(value))
def test_refusals(wrong, error, message):
    arguments = dict(x=torch.ones(2, 4, 3, 3), residual=torch.ones(2, 4, 3, 3))
    with pytest.raises(error, match=message):
        ldm_fused.bias_add_residual(**{**arguments, **wrong})


def test_the_op_itself_refuses_what_is_not_safe(kernels):
    x = torch.ones(2, 4, 3, 3, device=kernels.device)
    for arguments in ((x, x[:1, :3], None, None), (x, x.double(), None, None), (x, x, x[0, 0, 0], None)):
        with pytest.raises(RuntimeError):
            kernels.bias_add_residual(*arguments, 1.0)


def test_devices_without_kernels_compose_it(monkeypatch):
    monkeypatch.setattr(functional, "_KERNEL_DEVICES", frozenset())
    monkeypatch.setattr(functional, "_warned", set())
    x = torch.randn(2, 4, 3)
    with pytest.warns(UserWarning, match="no kernels for 'cpu'"):
        torch.testing.assert_close(ldm_fused.bias_add_residual(x, x, scale=0.5), x)


# ---- Memory passes


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 320, 16, 16), (1, 128, 64, 64), (2, 30, 8, 8)], ids=str)
def test_bytes_are_as_planned_and_near_the_limit(shape, layout):
    x, residual, bias, residual_bias = make(shape, torch.bfloat16, layout)
    size = x.numel() * x.itemsize
    for plan, limit, call in [
        (emulated.plan_residual(x), 3, lambda: emulated.bias_add_residual(x, residual, bias, residual_bias, 1.0)),
        (emulated.plan_channel_sums(x), 1, lambda: emulated.channel_sums(x)),
    ]:
        with emulated.traffic() as launches:
            call()
        moved = sum(launch["bytes_read"] + launch["bytes_written"] for launch in launches)
        planned = plan["bytes_read"] + plan["bytes_written"]
        assert moved == pytest.approx(planned, rel=0.03)
        assert planned <= 1.2 * limit * size
