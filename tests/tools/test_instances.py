"""Every instance of every CUDA kernel, by its template arguments, is one that the small cases reach."""

from pathlib import Path

import emulated
import pytest
import torch

import ldm_fused
from tools import check_sass, instances, small_cases

ROOT = Path(__file__).resolve().parents[2]


def test_the_small_cases_are_right_and_every_kernel_has_a_name():
    assert small_cases.run_all("cpu", small_cases.SHAPES[1:4]) == 40
    assert sum(small_cases.run_all("cpu", small_cases.SHAPES[1:4], share=(i, 2)) for i in (0, 1)) == 40
    small_cases.unwritten("cpu")  # a mistake, but a call that the op takes
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cuh"))
    names = instances.kernel_names()
    assert len(names) == sources.count("__global__") > 0 and all(f" {name}(" in sources for name in names)


@pytest.mark.parametrize("demangled", [
    "void ldm_fused::apply_rows<ldm_fused::Half, float, 8>(ldm_fused::ForwardParams)",
    "void ldm_fused::apply_rows<ldm_fused::Half, float, (int)8>(ldm_fused::ForwardParams)",
    "apply_rows<Half, float, 8>",
])
def test_a_kernel_has_one_name_whoever_says_it(demangled):
    assert instances.plain(demangled) == "apply_rows<Half, float, 8>"
    both = "void ldm_fused::resident_forward<float, float, (int)4, (bool)1, (bool)0>(ldm_fused::ForwardParams)"
    assert instances.plain(both) == "resident_forward<float, float, 4, true, false>"


def library():
    """One that holds the kernels: the emulator's, if the extension has none."""
    return ldm_fused._C.__file__ if ldm_fused.build_info()["cuda"] else emulated._library.__file__


def test_every_instance_in_the_library_is_one_that_check_sass_knows():
    held = instances.compiled(library())
    assert {name.split("<")[0] for name in held} == set(instances.kernel_names())
    assert all(check_sass.role(name) for name in held) and len(held) <= check_sass.MOST_KERNELS


NAMES = {torch.float32: "float", torch.float64: "double", torch.float16: "Half", torch.bfloat16: "BFloat16"}


def planned(case, aligned):
    """The base name and the leading template arguments of each kernel that the plans for a case launch."""
    x, types = case.x, f"{NAMES[case.x.dtype]}, {NAMES[case.dy.dtype]}"
    wide = "double" if x.dtype == torch.float64 else "float"
    bytes_of = {"aligned": aligned, "parameter_bytes": 5 * x.element_size()}

    def way(tiling):
        return "columns" if tiling["columns"] else "rows"

    def of(plan, name, reduce, apply, merge, reduced):
        if plan["resident"]:
            r, grid = plan["residence"], plan["tier"].startswith("grid")
            return [f"resident_{name}<{types}, {r['vector']}, {str(r['columns']).lower()}, {str(grid).lower()}"]
        return [f"{reduce}_{way(plan['reduce'])}<{reduced}, {plan['reduce']['vector']}", f"{merge}<{wide}",
                f"{apply}_{way(plan['apply'])}<{types}, {plan['apply']['vector']}"]

    forward = emulated.plan_forward(x, case.num_groups, out_dtype=case.out_dtype, **bytes_of)
    backward = emulated.plan_backward(x, case.num_groups, dy_dtype=case.out_dtype, sums=3, **bytes_of)
    found = of(forward, "forward", "statistics", "apply", "merge_statistics", NAMES[x.dtype])
    found += of(backward, "backward", "sums", "input_gradient", "merge_sums", types)
    for name, plan in (("residual", emulated.plan_residual(x)), ("channel_sums", emulated.plan_channel_sums(x))):
        vector = plan["tiling"]["vector"] if aligned else 1
        found.append(f"{name}_{way(plan['tiling'])}<{NAMES[x.dtype]}, {vector}")
    return [*found, f"merge_parts<{wide}", f"parameter_gradients<{wide}", f"merge_channel_sums<{wide}"]


@pytest.mark.parametrize("device", emulated.DEVICES)
def test_the_cases_for_every_instance_reach_them_all_by_plan(device):
    held, found, properties = instances.compiled(library()), set(), emulated.DEVICES[device]
    for case in small_cases.cases(small_cases.SHAPES, every_pair=True):
        is_large = case.x.numel() >= small_cases.LARGE[0]
        for aligned, grid_teams in [(True, 0), (True, 1) if is_large else (False, 0)]:
            with emulated.device(dict(properties, grid_teams=grid_teams)):
                found.update(planned(case, aligned))
    assert [name for name in sorted(held) if not any(name.startswith(start) for start in found)] == []
    assert [start for start in sorted(found) if not any(name.startswith(start) for name in held)] == []


def test_an_instance_that_has_not_run_is_named():
    assert small_cases.verdict({"a<1>", "b<2>"}, {"a<1>", "other"}) == "instances run: 1 of 2; not run: b<2>"
    assert small_cases.verdict({"a<1>"}, {"a<1>"}) == "instances run: 1 of 1; not run: none"
