"""The CUDA kernels under the emulator, in several thread orders; the plan, as the pure function that it is."""

import emulated
import pytest
import torch
from oracle import laid_out, make_case

from benchmarks import workloads

H200, T4 = 132, 40  # multiprocessors


@pytest.fixture
def in_order():
    yield emulated.set_order
    emulated.set_order("forward")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape,num_groups", [((2, 20, 9, 7), 2), ((1, 8, 40, 48), 2), ((1, 4, 3, 700), 4)], ids=str)
def test_same_bits_in_every_thread_order(in_order, shape, num_groups, layout):
    case = make_case(shape, num_groups, layout=layout)
    results = []
    for order, seed in (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        in_order(order, seed)
        y, mean, rstd = emulated.group_norm_act(*case.arguments())
        results.append([y, mean, rstd, *emulated.group_norm_act_backward(
            case.dy, case.x, mean, rstd, case.weight, case.bias, True, case.pre_bias, case.scale, case.shift,
            [True] * 6)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_cutting_the_work_differently_changes_only_roundings(layout):
    case = make_case((1, 8, 40, 48), 2, layout=layout)
    few, many = (emulated.group_norm_act(*case.arguments(), multiprocessors=n)[0] for n in (1, 200))
    torch.testing.assert_close(few, many, rtol=1e-5, atol=1e-5)


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
    for plan, minimum in ((emulated.plan_forward(x, workload.groups, multiprocessors=H200), 3 * limit),
                          (emulated.plan_backward(x, workload.groups, multiprocessors=H200), 5 * limit)):
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
        # Two streaming passes, and the partial results, of which small tensors have more so that they fill the chip.
        assert minimum < moved <= (1.1 if limit > 16 * 2**20 else 1.75) * minimum


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_batch_1_with_32_groups_fills_the_chip(layout):
    x = laid_out(torch.empty(1, 128, 512, 512, dtype=torch.bfloat16, device="meta"), layout)
    for multiprocessors in (T4, H200):
        tiling = emulated.plan_forward(x, 32, multiprocessors=multiprocessors)["reduce"]
        assert tiling["grid"][0] * tiling["grid"][1] >= 7 * multiprocessors


@pytest.mark.parametrize("shape,aligned,vector", [
    ((2, 32, 8, 8), True, 8), ((2, 32, 8, 8), False, 1), ((2, 32, 5, 5), True, 1), ((2, 32, 1, 1), True, 8),
    ((2, 20, 1, 1), True, 1), ((2, 20, 2, 4), True, 8),
], ids=str)
def test_vectors_only_where_all_of_them_are_aligned(shape, aligned, vector):
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    assert emulated.plan_forward(x, 2, aligned=aligned)["reduce"]["vector"] == vector


def test_more_than_2_to_the_31_elements_need_no_more_than_64_bits():
    x = torch.empty(2, 64, 2**13, 2**13 + 8, dtype=torch.bfloat16, device="meta")
    plan = emulated.plan_forward(x, 32, multiprocessors=H200)
    assert plan["bytes_written"] > x.numel() * 2 > 2**33
    assert plan["reduce"]["chunks"] * plan["reduce"]["chunk"] >= x[0, 0].numel()
