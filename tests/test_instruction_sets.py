"""The CPU's instruction sets: the one asked for is in use, each is right all over float32, and all of them agree.

A process keeps the set that it began with, so this file is a program too, which the tests run once with each set:
`LDM_FUSED_CPU_ISA=avx2 python tests/test_instruction_sets.py FILE` writes what it measured to the file.
"""

import os
import subprocess
import sys
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_within_bound, make_case
from test_dropout import factors
from test_kernels import DTYPES  # of x and of y

import ldm_fused
from tools.small_cases import run

NAMES = ("baseline", "avx2", "avx512", "avx512_bf16")

EPS = torch.finfo(torch.float32).eps
BOUNDS = {
    # Relative, in eps: e^-u is one off at the most, 1 + e^-u and the division round by half each. Of what is subnormal,
    # in 2^-149.
    "silu": 2,
    # s + u s (1 - s), absolute: it is worst at 24 ln 2, where s comes out as 1 and u (1 - s) = 24 ln 2 / 2^24 as 0.
    "derivative": 1e-6,
    # On the other side s is small, and as accurate as silu: in eps s (1 - u).
    "derivative below 0": 3,
}
# Results of two sets, in units in the last place of the largest: the order of additions, then the rounding.
AGREEMENT = {torch.float64: 8, torch.float32: 8, torch.bfloat16: 1, torch.float16: 1}

# Where u comes by: layout, pixels, every how many-th number, and the pixels at which the derivative is looked at. 63
# leaves something for every loop of a row with vectors of 4, 8 and 16: pairs of them, one, and what is no vector.
PATHS = {
    "rows": ("contiguous", 63, 199, (0, 40, 50, 57, 62)),
    "short rows": ("contiguous", 2, 1, (1,)),
    "columns": ("channels_last", 5, 1, (0, 4)),
}
CHANNELS = 2**18 - 5  # in one call; no number of vectors
NOT_FINITE = torch.tensor([float("nan"), float("inf"), -float("inf")])

SHAPES = [((2, 20, 9, 15), 2), ((1, 640, 3, 5), 32), ((2, 64, 8, 8), 32)]


# ---- What the program measures -----------------------------------------------------------------------------------


def float32_numbers():
    """One in a thousand of all there are, more where silu bends, and all where something begins or ends."""
    def magnitudes(first, last, step=1):
        return torch.arange(bits(first), bits(last) + 1, step, dtype=torch.int32)

    def bits(value):
        return torch.tensor(value).view(torch.int32).item()

    def around(value):
        return torch.arange(max(0, bits(value) - 4096), bits(value) + 4096, dtype=torch.int32)

    all_magnitudes = torch.cat([
        torch.arange(0, 2**31, 997).to(torch.int32),
        magnitudes(2.0**-3, 2.0**7, 127),
        magnitudes(16.5, 17.5),  # 1 + e^-u rounds by most, and the other way s gets to 1
        magnitudes(87.0, 90.0),  # e^-u leaves float32's normal numbers, and e^u all of them
        *(around(value) for value in (0.0, 2.0**-126, 104.0, float("inf"))),
    ])
    return torch.cat([all_magnitudes, all_magnitudes | torch.iinfo(torch.int32).min]).view(torch.float32)


def pixels_of(u, layout, pixels):
    """x and a weight of zeros for which the bias u is what the activation gets, at each pixel."""
    x = torch.zeros(1, len(u), pixels, 1)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    return x, torch.zeros(len(u))


def silu(u, layout, pixels):
    x, weight = pixels_of(u, layout, pixels)
    return ldm_fused.group_norm_silu(x, 1, weight, u)[0, :, :, 0]


def derivative(u, layout, pixels, pixel):
    """silu'(u) as the kernels have it at that pixel: the bias' gradient where dy is 1 there and 0 elsewhere."""
    x, weight = pixels_of(u, layout, pixels)
    dy = torch.zeros_like(x)
    dy[:, :, pixel] = 1
    return torch.ops.ldm_fused.group_norm_act_backward(
        dy, x, torch.zeros(1, 1), torch.ones(1, 1), weight, u, True, None, None, None, [i == 2 for i in range(6)])[2]


def largest_error(found, exact, unit, may_be_zero):
    """In units. None where both are NaN or the same infinity, an infinite one where one of them is."""
    none = (found == exact) | (found.isnan() & exact.isnan()) | (may_be_zero & (found == 0))
    return ((found - exact).abs() / unit).masked_fill(none, 0).nan_to_num(float("inf")).amax(0).max().item()


def exponential_of_minus(u):
    """In float64, and where it is too large for float32: there the kernels' is infinite, and the result zero."""
    exponential = (-u.double()).exp()
    return exponential, exponential > torch.finfo(torch.float32).max


def silu_error(u, layout, pixels):
    exponential, may_be_zero = exponential_of_minus(u)
    exact = u.double() / (1 + exponential)
    y = silu(u, layout, pixels)
    extremes = torch.stack([y.amin(1), y.amax(1)]).double()  # of all pixels one of these is furthest from exact
    return largest_error(extremes, exact, (exact.abs() * EPS).clamp(min=2.0**-149), may_be_zero)


def derivative_errors(u, layout, pixels, pixel):
    """All over float32, and below 0."""
    u = u[~u.isinf()]  # eager too has NaN there
    exponential, may_be_zero = exponential_of_minus(u)
    sigmoid = 1 / (1 + exponential)
    exact = sigmoid * (1 + u.double() * (1 - sigmoid))
    found = derivative(u, layout, pixels, pixel).double()
    unit = sigmoid.clamp(min=2.0**-126) * (1 + u.double().abs()) * EPS
    return (largest_error(found[None], exact, torch.ones_like(exact), may_be_zero),
            largest_error(found[None], exact, unit.masked_fill(u >= 0, float("inf")), may_be_zero))


def measured_errors():
    """The largest: {"silu": {path: error, ...}, ...}."""
    numbers = float32_numbers()
    errors = {name: dict.fromkeys(PATHS, 0.0) for name in BOUNDS}
    for path, (layout, pixels, step, looked_at) in PATHS.items():
        for u in numbers[::step].split(CHANNELS if step == 1 else CHANNELS // 8):
            found = [("silu", silu_error(u, layout, pixels))]
            for pixel in looked_at:
                found += zip(("derivative", "derivative below 0"), derivative_errors(u, layout, pixels, pixel))
            for name, error in found:
                errors[name][path] = max(errors[name][path], error)
    return errors


def all_results():
    """Those of every case, named, and what is wrong with them by the oracle."""
    results, wrong = {}, []
    for shape, num_groups in SHAPES:
        for dtype, out_dtype in DTYPES:
            for layout in ("contiguous", "channels_last"):
                case = make_case(shape, num_groups, dtype, layout, out_dtype=out_dtype)
                name = f"{shape} {dtype} to {out_dtype or dtype} {layout}"
                results[name] = run(case)
                try:
                    assert_within_bound(case, results[name])
                except AssertionError as error:
                    wrong.append(f"{name}: {error}")
    return results, wrong


DROPOUT = 0x0123456789ABCDEF, 0.3  # seed and probability


def kept_by_dropout():
    """Which elements each case's output keeps."""
    kept = {}
    for shape, num_groups in SHAPES:
        for dtype, layout in product((torch.float64, torch.float32, torch.bfloat16), ("contiguous", "channels_last")):
            case = make_case(shape, num_groups, dtype, layout, options=(), silu=False)
            seed, p = DROPOUT
            y, _, _ = torch.ops.ldm_fused.group_norm_act(*case.arguments(), torch.tensor([seed]), p)
            kept[shape, num_groups, dtype, layout] = y != 0
    return kept


def main(path):
    torch.set_num_threads(1)  # of several small steps each would wait for the slower thread, long on a busy machine
    results, wrong = all_results()
    found = {"isa": ldm_fused.build_info()["cpu_isa"], "errors": measured_errors(), "results": results, "wrong": wrong,
             "not finite": {path: silu(NOT_FINITE, *PATHS[path][:2]) for path in PATHS}, "kept": kept_by_dropout()}
    print(found["isa"], found["errors"])
    torch.save(found, path)


# ---- Tests -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=NAMES)
def isa(request):
    if request.param not in ldm_fused.build_info()["cpu_isas"]:
        pytest.skip(f"this processor has no {request.param}")
    return request.param


@pytest.fixture(scope="module")
def found_with(tmp_path_factory):
    """What the program found with an instruction set."""
    folder = tmp_path_factory.mktemp("instruction_sets")
    root = Path(ldm_fused.__file__).parents[1]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])

    @cache
    def found(isa):
        result = subprocess.run([sys.executable, __file__, str(folder / isa)], capture_output=True, text=True,
                                env={**os.environ, "PYTHONPATH": path, "LDM_FUSED_CPU_ISA": isa})
        assert result.returncode == 0, result.stderr
        return torch.load(folder / isa)

    return found


def test_the_set_asked_for_is_in_use(found_with, isa):
    assert found_with(isa)["isa"] == isa


@pytest.mark.parametrize("name", BOUNDS)
def test_the_activation_is_accurate_all_over_float32(found_with, isa, name):
    errors = found_with(isa)["errors"][name]
    assert max(errors.values()) <= BOUNDS[name], errors


@pytest.mark.parametrize("path", PATHS)
def test_silu_of_what_is_not_finite_is_as_in_eager(found_with, isa, path):
    y = found_with(isa)["not finite"][path]
    torch.testing.assert_close(y, F.silu(NOT_FINITE)[:, None].expand_as(y), equal_nan=True)


def test_results_are_right(found_with, isa):
    assert found_with(isa)["wrong"] == []


def test_dropout_keeps_the_same_with_every_set(found_with, isa):
    for (shape, num_groups, dtype, layout), kept in found_with(isa)["kept"].items():
        x = make_case(shape, num_groups, dtype, layout, options=()).x
        assert torch.equal(kept, factors(x, *DROPOUT) != 0), (shape, dtype, layout)


def test_results_agree_with_the_baseline(found_with, isa):
    baseline = found_with("baseline")["results"]
    for case, results in found_with(isa)["results"].items():
        for name, result in results.items():
            expected = baseline[case][name].double()
            unit = torch.finfo(result.dtype).eps * expected.abs().max()
            error = ((result.double() - expected).abs().max() / unit).item()
            assert error <= AGREEMENT[result.dtype], f"{case}, {name}: {error:.3g} units apart"


if __name__ == "__main__":
    main(*sys.argv[1:])
