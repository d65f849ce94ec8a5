"""The CUDA kernels in the emulator, in every tier, thread order and on several devices; the plan, a pure function."""

from itertools import product

import emulated
import pytest
import torch
from emulator import build
from oracle import GRADIENTS, LAYOUTS, assert_within_bound, laid_out, make_case, with_shortcut

from benchmarks import workloads

DTYPES = [(torch.float32, None), (torch.bfloat16, None), (torch.float16, torch.float32),
          (torch.float32, torch.bfloat16)]
# Small enough for tests' tensors to fill: whole groups in a block, a cluster, a grid, in a part of a grid.
SMALL_DEVICES = {
    "clusters": emulated.small_device(64, 12, clusters=True),
    "two teams": emulated.small_device(8, 12, clusters=False, grid_teams=2),
    "blocks": emulated.small_device(4, 60, clusters=False),
    "four multiprocessors": emulated.small_device(4, 32, clusters=False, grid_teams=1),
    "two multiprocessors": emulated.small_device(2, 60, clusters=False, grid_teams=1),
    "no shared memory": emulated.small_device(4, 0, clusters=False),
}
# Groups of 4 to 20 channels, one to five items a team, chunks that are no multiple of anything.
SHAPES = [((2, 20, 24, 32), 2), ((1, 32, 32, 64), 4), ((5, 16, 40, 40), 4), ((3, 24, 8, 11), 2), ((3, 40, 16, 16), 2)]


def all_results(case, shortcut=None):
    y, mean, rstd = emulated.group_norm_act(*case.arguments())
    gradients = emulated.group_norm_act_backward(case.dy, case.x, mean, rstd, case.weight, case.bias, case.silu,
                                                 case.pre_bias, case.scale, case.shift, [True] * 6, shortcut)
    return {"y": y, **dict(zip(GRADIENTS, gradients))}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype,out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape,num_groups", SHAPES, ids=str)
@pytest.mark.parametrize("name", SMALL_DEVICES)
def test_every_tier(name, shape, num_groups, dtype, out_dtype, layout):
    case = make_case(shape, num_groups, dtype, layout, out_dtype=out_dtype)
    with emulated.device(SMALL_DEVICES[name]):
        assert_within_bound(case, all_results(case))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype,out_dtype", [(torch.float32, torch.bfloat16), (torch.bfloat16, None)], ids=str)
@pytest.mark.parametrize("shape,num_groups", SHAPES, ids=str)
@pytest.mark.parametrize("name", SMALL_DEVICES)
def test_every_tier_adds_the_shortcuts_gradient(name, shape, num_groups, dtype, out_dtype, layout):
    case = make_case(shape, num_groups, dtype, layout, out_dtype=out_dtype)
    shortcut = laid_out(torch.randn(shape).to(dtype), layout)
    with emulated.device(SMALL_DEVICES[name]):
        assert_within_bound(case, all_results(case, shortcut), *with_shortcut(case, shortcut))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("plan_of,shape", [(emulated.plan_forward, (1, 4, 128, 128)),
                                           (emulated.plan_backward, (1, 4, 64, 128))])
def test_a_thread_waits_for_each_quarter_of_its_item(plan_of, shape, layout):
    case = make_case(shape, 1, layout=layout)
    with emulated.device(emulated.small_device(2, 200, clusters=False, grid_teams=1)):
        r = plan_of(case.x, 1)["residence"]
        assert r["kept"] == r["steps"] == 4 * r["segment"]
        assert_within_bound(case, all_results(case))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("plan_of", [emulated.plan_forward, emulated.plan_backward])
def test_cases_above_reach_every_tier(plan_of, layout):
    plans = []
    for properties, (shape, num_groups), (dtype, out_dtype) in product(SMALL_DEVICES.values(), SHAPES, DTYPES):
        x = laid_out(torch.empty(shape, dtype=dtype), layout)
        with emulated.device(properties):
            plans.append(plan_of(x, num_groups, **({"out_dtype": out_dtype} if plan_of is emulated.plan_forward else
                                                   {"dy_dtype": out_dtype, "sums": 3})))
    assert {plan["tier"] for plan in plans} == {"block", "cluster", "grid", "grid, in part", "two passes"}
    resident = [plan["residence"] for plan in plans if plan["resident"]]
    grids = [plan["residence"] for plan in plans if plan["tier"].startswith("grid")]
    assert any(r["team"] > 4 for r in resident)
    assert any(r["items"] > 2 * r["teams"] and r["slots"] > r["kept"] for r in grids), "the next item's loads in flight"
    assert any(r["items"] > r["teams"] and r["slots"] % r["kept"] for r in grids), "slots in turn"
    if layout == "channels_last":
        assert any(r["bundle"] > 1 for r in resident)
    else:
        assert any(r["rounds"] > 1 for r in resident) and any(r["parts"] > 1 for r in resident)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["default", *SMALL_DEVICES])
@pytest.mark.parametrize("shape,num_groups", [((2, 20, 9, 7), 2), ((1, 8, 40, 48), 2), ((3, 4, 3, 700), 4)], ids=str)
def test_same_bits_in_every_thread_order(shape, num_groups, name, layout):
    case = make_case(shape, num_groups, layout=layout)
    with emulated.device({**SMALL_DEVICES, "default": emulated.SMALL}[name]):
        first = all_results(case)
        for order, seed in (("reverse", 0), ("random", 1), ("random", 2)):
            with emulated.order(order, seed):
                other = all_results(case)
            assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape,num_groups", [((2, 80, 24, 32), 8), ((1, 8, 64, 80), 2), ((8, 64, 4, 4), 32)], ids=str)
@pytest.mark.parametrize("name", emulated.DEVICES)
def test_every_device(name, shape, num_groups, dtype, layout):
    case = make_case(shape, num_groups, dtype, layout)
    with emulated.device(emulated.DEVICES[name]):
        assert_within_bound(case, all_results(case))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SMALL_DEVICES)
def test_a_large_mean_cancels_no_digits_in_any_tier(name, layout):
    case = make_case((2, 20, 24, 32), 2, layout=layout, mean=1.5e5, options=("weight", "bias"))
    with emulated.device(SMALL_DEVICES[name]):
        results = all_results(case)
    assert_within_bound(case, {name: results[name] for name in ("y", "x")})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38, 1e25])
@pytest.mark.parametrize("name", SMALL_DEVICES)
def test_extreme_values_stay_in_their_group(name, value, layout):
    case = make_case((2, 20, 24, 32), 2, layout=layout, options=("weight", "bias"))
    case.x[1, 13, 20, 4] = value
    with emulated.device(emulated.SMALL):
        expected = all_results(case)
    with emulated.device(SMALL_DEVICES[name]):
        results = all_results(case)
    for key in ("y", "x"):
        assert torch.equal(results[key].isnan(), expected[key].isnan())
        assert results[key][0].isfinite().all() and results[key][1, :10].isfinite().all()


@pytest.mark.parametrize("wanted", range(6), ids=GRADIENTS)
@pytest.mark.parametrize("name", ["clusters", "two teams"])
def test_one_gradient_alone_in_any_tier(name, wanted):
    case = make_case((3, 20, 24, 32), 2, layout="channels_last")
    mask = [i == wanted for i in range(6)]
    with emulated.device(SMALL_DEVICES[name]):
        _, mean, rstd = emulated.group_norm_act(*case.arguments())
        gradients = emulated.group_norm_act_backward(case.dy, case.x, mean, rstd, case.weight, case.bias, case.silu,
                                                     case.pre_bias, case.scale, case.shift, mask)
    assert_within_bound(case, {GRADIENTS[wanted]: gradients[wanted]})


@pytest.mark.parametrize("shape,num_groups,multiprocessors,kilobytes,steps", [((3, 40, 16, 16), 2, 1, 13, 3),
                                                                              ((1, 48, 10, 10), 1, 2, 5, 1)])
def test_nothing_is_kept_of_a_unit_in_any_tier(shape, num_groups, multiprocessors, kilobytes, steps):
    case = make_case(shape, num_groups)
    with emulated.device(emulated.small_device(multiprocessors, kilobytes, clusters=False, grid_teams=1)):
        plan = emulated.plan_forward(case.x, num_groups)
        r = plan["residence"]
        assert plan["tier"] == "grid, in part" and r["kept"] == r["steps"] == steps and r["rounds"] > 1
        assert_within_bound(case, all_results(case))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("plan_of", [emulated.plan_forward, emulated.plan_backward])
def test_a_cluster_of_two_in_any_tier(plan_of, layout):
    case = make_case((2, 20, 24, 32), 2, layout=layout)
    with emulated.device(dict(emulated.small_device(2, 80, clusters=True), team=2, threads=256)):
        plan = plan_of(case.x, 2)
        assert plan["tier"] == "cluster" and plan["residence"]["team"] == 2
        assert_within_bound(case, all_results(case))


def test_columns_that_no_number_of_blocks_divides_in_any_tier():
    case = make_case((1, 2560, 2, 2), 32, layout="channels_last")
    with emulated.device(SMALL_DEVICES["no shared memory"]):
        tiling = emulated.plan_forward(case.x, case.num_groups)["reduce"]
        assert tiling["block"][0] * tiling["grid"][1] * tiling["vector"] > 2560, "some threads have no channel"
        assert_within_bound(case, all_results(case))


@pytest.mark.skipif(not build.watches(), reason="AddressSanitizer takes the place of the emulator's own watch")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape,num_groups", SHAPES, ids=str)
@pytest.mark.parametrize("name", [name for name in SMALL_DEVICES if name != "clusters"])
def test_no_vector_moves_more_often_than_planned_in_any_tier(name, shape, num_groups, layout):
    case = make_case(shape, num_groups, layout=layout, options=("weight", "bias"))
    mask = [True, True, True, False, False, False]
    with emulated.device(SMALL_DEVICES[name]):
        plans = plans_of(case.x, num_groups, parameter_bytes=8)
        with emulated.traffic() as forward:
            _, mean, rstd = emulated.group_norm_act(*case.arguments())
        with emulated.traffic() as backward:
            emulated.group_norm_act_backward(case.dy, case.x, mean, rstd, case.weight, case.bias, case.silu, None, None,
                                             None, mask)
    for plan, launches, tensors in zip(plans, (forward, backward), (1, 2)):
        r = plan["residence"]
        for key, vectors in (("bytes_read", tensors), ("bytes_written", 1)):
            one_of_each_thread = vectors * r["items"] * r["team"] * r["threads"] * 16
            allowed = one_of_each_thread / 2 if plan["resident"] else 0.03 * plan[key]
            assert abs(sum(launch[key] for launch in launches) - plan[key]) < allowed


def test_a_device_without_room_for_a_large_cluster_gets_a_smaller_one(monkeypatch):
    monkeypatch.delenv("LDM_FUSED_STRICT_PLAN", raising=False)
    case = make_case((2, 20, 24, 32), 2)
    few = emulated.small_device(1, 12, clusters=True)
    with emulated.device(few):
        for plan in plans_of(case.x, case.num_groups):
            abreast = few["shared_per_multiprocessor"] // (plan["residence"]["shared_bytes"] + 1024)
            assert plan["tier"] == "cluster" and plan["residence"]["team"] > abreast
        assert_within_bound(case, all_results(case))


# ---- plan --------------------------------------------------------------------------------------------------------


def tensor_of(workload, layout, dtype=torch.bfloat16):
    x = torch.empty(workload.shape, dtype=dtype, device="meta")
    return laid_out(x, layout)


def plans_of(x, groups, **options):
    return emulated.plan_forward(x, groups, **options), emulated.plan_backward(x, groups, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", emulated.DEVICES)
@pytest.mark.parametrize("workload", workloads.load(), ids=lambda w: "x".join(map(str, w.shape)))
def test_plan_covers_every_workload(workload, name, layout):
    x = tensor_of(workload, layout)
    if x is None:
        pytest.skip("no channels_last")
    device, limit = emulated.DEVICES[name], x.numel() * x.element_size()
    with emulated.device(device):
        plans = plans_of(x, workload.groups, parameter_bytes=0)
    for plan, passes in zip(plans, (2, 3)):
        moved = plan["bytes_read"] + plan["bytes_written"]
        assert moved > passes * limit
        if plan["resident"]:
            assert_covers(plan["residence"], x, workload.groups, device, passes - 1)
            assert moved < (2 * passes - 0.9) * limit, "two passes would do as well"
        else:
            for tiling in (plan["reduce"], plan["apply"]):
                assert_tiles(tiling, x)


def assert_covers(r, x, groups, device, tensors):
    """Every element belongs to one thread, which has room for what it keeps."""
    batch, channels, spatial = x.shape[0], x.shape[1], x[0, 0].numel()
    assert r["vector"] == 8, "16-byte accesses"
    assert r["items"] * r["width"] == batch * channels and r["width"] % (channels // groups) == 0
    assert 32 <= r["threads"] <= 512 and r["threads"] % 32 == 0
    assert r["team"] * r["teams"] < 2**31
    if r["columns"]:
        assert r["lanes"] * 8 == r["width"] and r["width"] * 2 % 32 == 0 and r["width"] * 2 >= 64
        assert r["team"] * r["chunk"] >= spatial > 0
        assert r["steps"] * (r["threads"] // 32) * (32 // r["lanes"]) >= r["chunk"]
    else:
        assert r["team"] * r["chunk"] * 8 >= spatial and r["parts"] * r["length"] >= r["chunk"]
        assert r["steps"] * r["lanes"] >= r["length"]
        assert r["rounds"] * (r["threads"] // r["lanes"]) >= r["width"] * r["parts"]
    assert 0 < r["kept"] <= r["rounds"] * r["steps"] and r["kept"] <= r["slots"]
    assert r["slots"] * r["threads"] * 16 * tensors < r["shared_bytes"] <= device["shared_per_block"]


def assert_tiles(tiling, x):
    spatial = x[0, 0].numel()
    assert tiling["vector"] == 8, "16-byte accesses"
    assert tiling["chunks"] * tiling["chunk"] >= spatial > (tiling["chunks"] - 1) * tiling["chunk"]
    threads = tiling["block"][0] * tiling["block"][1]
    assert 128 < threads <= 256 and tiling["grid"][0] < 2**31 and tiling["grid"][1] < 2**16
    if tiling["columns"]:
        assert tiling["block"][0] * tiling["grid"][1] * 8 >= x.shape[1]
    else:
        assert tiling["grid"][0] * (threads // tiling["team"]) >= x.shape[0] * x.shape[1] * tiling["chunks"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_H200_reads_workloads_of_less_than_32_MB_once(layout):
    """Larger ones some of it twice, or all of it in two passes, where that has been measured to be faster."""
    for workload in workloads.load():
        x = tensor_of(workload, layout)
        if x is None:
            continue
        bytes = x.numel() * x.element_size()
        with emulated.device(emulated.DEVICES["H200"]):
            plans = plans_of(x, workload.groups)
        for plan, passes in zip(plans, (2, 3)):
            if bytes < 32 << 20:
                assert plan["resident"], workload
            if plan["tier"] in ("block", "cluster", "grid"):
                assert plan["bytes_read"] + plan["bytes_written"] < 1.12 * passes * bytes, workload


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_1_with_32_groups_fills_the_chip(layout):
    x = laid_out(torch.empty(1, 128, 512, 512, dtype=torch.bfloat16, device="meta"), layout)
    for properties in emulated.DEVICES.values():
        with emulated.device(properties):
            plan = emulated.plan_forward(x, 32)
        if plan["resident"]:
            assert plan["residence"]["team"] * plan["residence"]["teams"] >= 0.9 * properties["multiprocessors"]
        else:
            grid = plan["reduce"]["grid"]
            assert grid[0] * grid[1] >= 7 * properties["multiprocessors"]


def test_small_groups_share_a_block():
    x = torch.empty(80, 256, 8, 8, dtype=torch.bfloat16, device="meta")
    with emulated.device(emulated.DEVICES["H200"]):
        plan = emulated.plan_forward(x, 32)
    assert plan["tier"] == "block" and plan["residence"]["bundle"] >= 4


@pytest.mark.parametrize("channels,bundle", [(128, 8), (256, 4), (320, 8), (640, 4), (960, 8), (1280, 2), (2560, 1)])
def test_channels_last_rows_are_whole_sectors(channels, bundle):
    x = laid_out(torch.empty(1, channels, 64, 64, dtype=torch.bfloat16, device="meta"), "channels_last")
    with emulated.device(emulated.DEVICES["H200"]):
        r = emulated.plan_forward(x, 32)["residence"]
    assert r["bundle"] == bundle and r["width"] * 2 % 32 == 0 and r["width"] * 2 >= 64


@pytest.mark.parametrize("shape,bundle", [((1, 256, 17, 256, 256), 4), ((1, 128, 17, 256, 256), 8),
                                          ((1, 512, 16, 180, 320), 2)], ids=str)
def test_rows_of_videos_hold_groups_enough_for_whole_sectors(shape, bundle):
    x = laid_out(torch.empty(shape, dtype=torch.bfloat16, device="meta"), "channels_last")
    for properties in emulated.DEVICES.values():
        with emulated.device(properties):
            for plan in plans_of(x, 32):
                if plan["resident"]:
                    assert plan["residence"]["bundle"] == bundle
                    assert plan["residence"]["width"] * 2 >= 64


@pytest.mark.parametrize("shape,aligned,vector", [
    ((2, 32, 8, 8), True, 8), ((2, 32, 8, 8), False, 1), ((2, 32, 5, 5), True, 1), ((2, 32, 1, 1), True, 8),
    ((2, 20, 1, 1), True, 1), ((2, 20, 2, 4), True, 8),
], ids=str)
def test_vectors_only_where_all_of_them_are_aligned(shape, aligned, vector):
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    for properties in (emulated.SMALL, SMALL_DEVICES["no shared memory"]):
        with emulated.device(properties):
            plan = emulated.plan_forward(x, 2, aligned=aligned)
        assert plan["resident"] == (vector > 1 and properties is emulated.SMALL)
        assert plan["residence" if plan["resident"] else "reduce"]["vector"] == vector


def test_double_is_for_two_passes():
    assert not emulated.plan_forward(torch.empty(2, 32, 8, 8, dtype=torch.float64), 2)["resident"]


@pytest.mark.parametrize("channels", [10_000, 2**29])
def test_more_channels_than_tables_have_room_for_are_for_two_passes(channels):
    with emulated.device(emulated.DEVICES["H200"]):
        for plan in plans_of(torch.empty(1, channels, 8, dtype=torch.bfloat16, device="meta"), 1):
            assert not plan["resident"] and plan["bytes_read"] > channels * 16


def test_rows_too_wide_for_a_warp_are_for_two_passes():
    x = laid_out(torch.empty(2, 640, 8, 8, dtype=torch.bfloat16), "channels_last")
    with emulated.device(emulated.DEVICES["H200"]):
        assert not emulated.plan_forward(x, 2)["resident"] and emulated.plan_forward(x, 4)["resident"]


@pytest.mark.parametrize("properties", [emulated.DEVICES["H200"], SMALL_DEVICES["no shared memory"]],
                         ids=["H200", "none"])
def test_more_than_2_to_the_31_elements_need_no_more_than_64_bits(properties):
    x = torch.empty(2, 64, 2**13, 2**13 + 8, dtype=torch.bfloat16, device="meta")
    with emulated.device(properties):
        plan = emulated.plan_forward(x, 32)
    assert plan["bytes_written"] > x.numel() * 2 > 2**33
    if plan["resident"]:
        assert_covers(plan["residence"], x, 32, properties, 1)
    else:
        assert plan["reduce"]["chunks"] * plan["reduce"]["chunk"] >= x[0, 0].numel()
