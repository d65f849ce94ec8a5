"""The kernels of every device against the float64 oracle: shapes, layouts, dtypes, parameters, extreme values."""

from dataclasses import replace
from zlib import crc32

import pytest
import torch
from oracle import GRADIENTS, assert_within_bound, eager, laid_out, make_case, oracle, with_shortcut

# (shape, num_groups): 1 to 80 channels a group, one pixel, batch 1 and many, 2-D to 5-D, sizes one off every vector.
SHAPES = [
    ((2, 64, 8, 8), 32),
    ((2, 320, 4, 4), 32),
    ((1, 640, 3, 5), 32),
    ((1, 960, 2, 4), 32),
    ((1, 2560, 2, 2), 32),
    ((3, 30, 7, 5), 3),
    ((1, 320, 1, 1), 32),
    ((2, 10), 2),
    ((2, 32, 9, 15), 32),
    ((4, 6, 17), 3),
    ((2, 33, 31), 1),
    ((1, 8, 3, 10, 11), 2),
    ((1, 8, 2, 64, 64), 4),
    ((40, 4, 3), 2),
    ((1, 4, 65, 129), 2),
    ((1, 2, 16385), 2),
    ((1, 24, 37, 41), 3),
]
DTYPES = [
    (torch.float64, None),
    (torch.float32, None),
    (torch.float16, None),
    (torch.bfloat16, None),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
]


def run(kernels, case, output_mask=(True,) * 6, shortcut=None):
    """Output and gradients of the kernels, named as the oracle's; ``shortcut`` is added to dx."""
    case = case.to(kernels.device)
    y, mean, rstd = kernels.forward(*case.arguments())
    assert y.stride() == case.x.stride()
    gradients = kernels.backward(case.dy, case.x, mean, rstd, case.weight, case.bias, case.silu, case.pre_bias,
                                 case.scale, case.shift, list(output_mask), shortcut)
    named = {name: g for name, g, wanted in zip(GRADIENTS, gradients, output_mask)
             if wanted and getattr(case, name) is not None}
    assert named["x"].stride() == case.x.stride() if "x" in named else True
    return {"y": y, **named}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype,out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape,num_groups", SHAPES, ids=str)
def test_all_parameters(kernels, shape, num_groups, dtype, out_dtype, layout):
    case = make_case(shape, num_groups, dtype, layout, out_dtype=out_dtype, seed=crc32(f"{shape}{dtype}".encode()))
    if case is None:
        pytest.skip(f"{len(shape)}-D tensors have no channels_last")
    assert_within_bound(case, run(kernels, case))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype,out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape,num_groups", [((2, 64, 8, 8), 32), ((3, 30, 7, 5), 3), ((2, 10), 2), ((1, 4, 65, 129), 2),
                                              ((1, 2, 16385), 2)], ids=str)
@pytest.mark.parametrize("silu", [True, False])
def test_the_shortcuts_gradient_is_added(kernels, silu, shape, num_groups, dtype, out_dtype, layout):
    case = make_case(shape, num_groups, dtype, layout, out_dtype=out_dtype, silu=silu)
    if case is None:
        pytest.skip(f"{len(shape)}-D tensors have no channels_last")
    shortcut = laid_out(torch.randn(shape, dtype=torch.float64).to(dtype), layout)
    results = run(kernels, case, shortcut=shortcut.to(kernels.device))
    assert_within_bound(case, results, *with_shortcut(case, shortcut))


def test_a_shortcut_of_another_layout_or_alone_or_unfit(kernels):
    case = make_case((2, 12, 5, 6), 3).to(kernels.device)
    shortcut = torch.randn(2, 12, 5, 6, device=kernels.device)
    expected = run(kernels, case, shortcut=shortcut)
    other = run(kernels, case, shortcut=shortcut.contiguous(memory_format=torch.channels_last))
    assert all(torch.equal(expected[name], other[name]) for name in expected)
    without_dx = run(kernels, case, [False] + [True] * 5, shortcut)
    assert all(torch.equal(expected[name], without_dx[name]) for name in without_dx)
    for wrong in (shortcut.double(), shortcut[:1], shortcut[:, :, :, :5]):
        with pytest.raises(RuntimeError, match="dx_shortcut must have x's shape and dtype"):
            run(kernels, case, shortcut=wrong)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("options", [(), ("weight",), ("bias",), ("weight", "bias"), ("scale",), ("shift",),
                                     ("pre_bias",), ("weight", "bias", "scale", "shift")], ids="+".join)
def test_optional_parameters(kernels, options, silu, layout):
    case = make_case((2, 12, 5, 6), 3, layout=layout, options=options, silu=silu)
    assert_within_bound(case, run(kernels, case))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_pre_bias_of_one_sample_for_all(kernels, layout):
    case = make_case((3, 12, 5, 6), 3, layout=layout)
    shared = make_case((3, 12, 5, 6), 3, layout=layout).pre_bias[0].clone()
    case = replace(case, pre_bias=shared)
    assert_within_bound(case, run(kernels, case))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_parameters_beside_a_16_bit_input(kernels, dtype):
    case = make_case((2, 20, 9, 4), 2, dtype, parameter_dtype=torch.float32)
    assert_within_bound(case, run(kernels, case))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_thousand_samples(kernels, layout):
    case = make_case((1024, 4, 2, 2), 2, torch.bfloat16, layout)
    assert_within_bound(case, run(kernels, case))


@pytest.mark.parametrize("wanted", range(6), ids=GRADIENTS)
def test_one_gradient_alone(kernels, wanted):
    case = make_case((2, 12, 5, 6), 3)
    assert_within_bound(case, run(kernels, case, [i == wanted for i in range(6)]))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e5])
def test_a_large_mean_cancels_no_digits(kernels, ratio, dtype, layout):
    case = make_case((2, 8, 33, 40), 2, dtype, layout, mean=1.5 * ratio, options=("weight", "bias"))
    results = run(kernels, case)
    del results["weight"]  # a sum over (x - mean), whose error is the mean's own rounding, in eager as here
    assert_within_bound(case, results)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.75, 1e4])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_constant_groups(kernels, value, layout):
    case = make_case((2, 8, 6, 5), 2, layout=layout, options=("weight", "bias"))
    case = replace(case, x=torch.full_like(case.x, value))
    results = run(kernels, case)
    torch.testing.assert_close(results["y"].cpu().double(), oracle(case)["y"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, 1e25])
def test_extreme_values_spread_as_in_eager(kernels, value, layout):
    case = make_case((2, 8, 6, 5), 2, layout=layout, options=("weight", "bias"))
    case.x[1, 2, 3, 4] = value
    # In channels_last PyTorch's CPU kernel computes E[x^2] - E[x]^2, which turns large values into NaN.
    results, expected = run(kernels, case), eager(replace(case, x=case.x.contiguous()))
    for name in ("y", "x"):
        found, want = results[name].cpu(), expected[name]
        assert torch.equal(found.isnan(), want.isnan()), name
        assert torch.equal(found.isinf(), want.isinf()), name
        torch.testing.assert_close(found, want, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eps", [0.0, -0.05, 1e-12, 10.0])
def test_any_eps(kernels, eps):
    case = make_case((2, 8, 6, 5), 2, eps=eps)
    assert_within_bound(case, run(kernels, case))


def test_variance_below_a_negative_eps_is_nan(kernels):
    case = make_case((2, 8, 6, 5), 2, eps=-100.0)
    assert run(kernels, case)["y"].isnan().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [1, 3])
def test_misaligned_views_between_sentinels(kernels, dtype, offset, layout):
    case = make_case((2, 16, 8, 8), 2, dtype, layout)

    def misaligned(t):
        room = torch.full((t.numel() + 2 * offset,), 7.0, dtype=dtype)
        view = room[offset:offset + t.numel()].as_strided(t.shape, t.stride())
        return view.copy_(t), room

    x, x_room = misaligned(case.x)
    dy, dy_room = misaligned(case.dy)
    moved = replace(case, x=x, dy=dy)
    before = x_room.clone(), dy_room.clone()
    assert_within_bound(case, run(kernels, moved))
    assert torch.equal(before[0], x_room) and torch.equal(before[1], dy_room)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_each_time(kernels, layout):
    case = make_case((2, 20, 17, 30), 2, layout=layout)
    first, second = run(kernels, case), run(kernels, case)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_statistics_are_returned(kernels):
    case = make_case((2, 12, 5, 6), 3).to(kernels.device)
    _, mean, rstd = kernels.forward(*case.arguments())
    shifted = (case.x + case.pre_bias[:, :, None, None]).double().reshape(2, 3, -1)
    torch.testing.assert_close(mean.double(), shifted.mean(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (shifted.var(-1, correction=0) + case.eps).rsqrt(), rtol=1e-6, atol=1e-6)


def test_channels_last_needs_axes_behind_the_channels():
    assert laid_out(torch.ones(2, 3), "channels_last") is None
    assert laid_out(torch.ones(2, 3, 4), "channels_last").stride() == (12, 1, 3)
    assert laid_out(torch.ones(2, 3, 4, 5, 6, 7), "channels_last").stride(1) == 1
