"""The CUDA kernels in the emulator, in several thread orders and on several devices; the plan, a pure function."""

import emulated
import pytest
import torch
from oracle import GRADIENTS, assert_within_bound, laid_out, make_case

from benchmarks import workloads


def all_results(case):
    y, mean, rstd = emulated.group_norm_act(*case.arguments())
    gradients = emulated.group_norm_act_backward(case.dy, case.x, mean, rstd, case.weight, case.bias, case.silu,
                                                 case.pre_bias, case.scale, case.shift, [True] * 6)
    return {"y": y, **dict(zip(GRADIENTS, gradients))}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape,num_groups", [((2, 20, 9, 7), 2), ((1, 8, 40, 48), 2), ((1, 4, 3, 700), 4)], ids=str)
def test_same_bits_in_every_thread_order(shape, num_groups, layout):
    case = make_case(shape, num_groups, layout=layout)
    first = all_results(case)
    for name, seed in (("reverse", 0), ("random", 1), ("random", 2)):
        with emulated.order(name, seed):
            other = all_results(case)
        assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape,num_groups", [((2, 80, 24, 32), 8), ((1, 8, 64, 80), 2), ((8, 64, 4, 4), 32)], ids=str)
@pytest.mark.parametrize("name", emulated.DEVICES)
def test_every_device(name, shape, num_groups, dtype, layout):
    case = make_case(shape, num_groups, dtype, layout)
    with emulated.device(emulated.DEVICES[name]):
        assert_within_bound(case, all_results(case))


# ---- plan --------------------------------------------------------------------------------------------------------


def tensor_of(workload, layout, dtype=torch.bfloat16):
    x = torch.empty(workload.shape, dtype=dtype, device="meta")
    return laid_out(x, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("workload", workloads.load(), ids=lambda w: "x".join(map(str, w.shape)))
def test_plan_covers_every_workload(workload, layout):
    x = tensor_of(workload, layout)
    if x is None:
        pytest.skip("no channels_last")
    limit = x.numel() * x.element_size()
    with emulated.device(emulated.DEVICES["H200"]):
        plans = (emulated.plan_forward(x, workload.groups, parameter_bytes=0),
                 emulated.plan_backward(x, workload.groups, parameter_bytes=0))
    for plan, minimum in zip(plans, (3 * limit, 5 * limit)):
        for tiling in (plan["reduce"], plan["apply"]):
            assert tiling["vector"] == 8, "16-byte accesses"
            spatial = x[0, 0].numel()
            assert tiling["chunks"] * tiling["chunk"] >= spatial > (tiling["chunks"] - 1) * tiling["chunk"]
            threads = tiling["block"][0] * tiling["block"][1]
            assert 128 < threads <= 256 and tiling["grid"][0] < 2**31 and tiling["grid"][1] < 2**16
            if tiling["columns"]:
                assert tiling["block"][0] * tiling["grid"][1] * 8 >= x.shape[1]
            else:
                assert tiling["grid"][0] * (threads // tiling["team"]) >= x.shape[0] * x.shape[1] * tiling["chunks"]
        moved = plan["bytes_read"] + plan["bytes_written"]
        # Two streaming passes; and what is read or written for each chunk, of which small tensors have more so that
        # they fill the chip (parameters not counted).
        assert minimum < moved <= (1.1 if limit > 16 * 2**20 else 2) * minimum


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_batch_1_with_32_groups_fills_the_chip(layout):
    x = laid_out(torch.empty(1, 128, 512, 512, dtype=torch.bfloat16, device="meta"), layout)
    for properties in emulated.DEVICES.values():
        with emulated.device(properties):
            tiling = emulated.plan_forward(x, 32)["reduce"]
        assert tiling["grid"][0] * tiling["grid"][1] >= 7 * properties["multiprocessors"]


@pytest.mark.parametrize("shape,aligned,vector", [
    ((2, 32, 8, 8), True, 8), ((2, 32, 8, 8), False, 1), ((2, 32, 5, 5), True, 1), ((2, 32, 1, 1), True, 8),
    ((2, 20, 1, 1), True, 1), ((2, 20, 2, 4), True, 8),
], ids=str)
def test_vectors_only_where_all_of_them_are_aligned(shape, aligned, vector):
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    assert emulated.plan_forward(x, 2, aligned=aligned)["reduce"]["vector"] == vector


def test_more_than_2_to_the_31_elements_need_no_more_than_64_bits():
    x = torch.empty(2, 64, 2**13, 2**13 + 8, dtype=torch.bfloat16, device="meta")
    with emulated.device(emulated.DEVICES["H200"]):
        plan = emulated.plan_forward(x, 32)
    assert plan["bytes_written"] > x.numel() * 2 > 2**33
    assert plan["reduce"]["chunks"] * plan["reduce"]["chunk"] >= x[0, 0].numel()
