"""CUDA graphs, streams, devices other than the default and tensors larger than the chip. All of it needs a GPU."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from oracle import assert_within_bound, eager, make_case, oracle

import ldm_fused

if not ldm_fused.build_info()["cuda"]:
    pytest.skip("this build of ldm_fused has no CUDA kernels", allow_module_level=True)
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


# A cluster or a block for each group; a group that takes a grid.
SHAPES = pytest.mark.parametrize("shape,num_groups", [((2, 64, 32, 32), 32), ((3, 16, 320, 320), 1)], ids=str)


def training_step(x, weight, dy, num_groups):
    y = ldm_fused.group_norm_silu(x, num_groups, weight)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]


def arguments(shape=(2, 64, 32, 32), num_groups=32, device="cuda"):
    x = torch.randn(shape, device=device, requires_grad=True)
    weight = torch.randn(shape[1], device=device, requires_grad=True)
    return x, weight, torch.randn_like(x), num_groups


@SHAPES
def test_graph_capture_and_replay(shape, num_groups):
    x, weight, dy, _ = arguments(shape, num_groups)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        training_step(x, weight, dy, num_groups)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = training_step(x, weight, dy, num_groups)
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, training_step(x, weight, dy, num_groups)))


FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# Of one kernel, with different needs of shared memory.
LARGE, SMALL = (8, 64, 128, 128), (8, 64, 64, 64)


def test_a_graph_can_be_replayed_after_smaller_calls():
    large, small = arguments(LARGE), arguments(SMALL)
    expected = training_step(*large)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = training_step(*large)
    for _ in range(3):
        training_step(*small)
        for t in results:
            t.zero_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, expected))


def test_host_threads_do_not_take_shared_memory_from_each_other():
    cases = [arguments(LARGE), arguments(SMALL)]
    expected = [training_step(*case) for case in cases]

    def repeat(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [training_step(*cases[i]) for _ in range(200)][-1]
            torch.cuda.current_stream().synchronize()
        return all(torch.equal(a, b) for a, b in zip(found, expected[i]))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(repeat, range(2))) == [True, True]


@SHAPES
def test_without_gradients_the_bits_are_the_same(shape, num_groups):
    x, weight, dy, _ = arguments(shape, num_groups)
    y, *_ = training_step(x, weight, dy, num_groups)
    with torch.no_grad():
        assert torch.equal(ldm_fused.group_norm_silu(x, num_groups, weight), y)


@SHAPES
@pytest.mark.parametrize("limit", [0, 20])
def test_a_part_of_the_device_gives_the_same(shape, num_groups, limit):
    case = arguments(shape, num_groups)
    expected = training_step(*case)
    before = ldm_fused.limit_multiprocessors(limit)
    try:
        found = training_step(*case)
    finally:
        ldm_fused.limit_multiprocessors(before)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@SHAPES
def test_concurrent_streams_have_workspaces_of_their_own(shape, num_groups):
    cases = [arguments(shape, num_groups) for _ in range(4)]
    expected = [training_step(*case) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for stream, case in zip(streams, cases):
            with torch.cuda.stream(stream):
                found.append(training_step(*case))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for f, e in zip(found, expected) for a, b in zip(f, e))


def test_work_is_ordered_on_the_current_stream():
    x, *_ = arguments()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = x.detach()
        for _ in range(50):  # keeps the stream busy, so that a kernel on another one would be too early
            late = late * 1.01
        found = ldm_fused.group_norm_silu(late, 32)
    stream.synchronize()
    torch.testing.assert_close(found, ldm_fused.group_norm_silu(late, 32), rtol=0, atol=0)


def test_a_device_other_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    x, weight, dy, num_groups = arguments(device="cuda:1")
    found = training_step(x, weight, dy, num_groups)
    with torch.cuda.device(1):
        expected = training_step(x, weight, dy, num_groups)
    assert torch.cuda.current_device() == 0 and all(t.device == x.device for t in found)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_parameters_on_the_cpu_are_refused():
    with pytest.raises(RuntimeError, match="weight must be on x's device cuda:0, got cpu"):
        ldm_fused.group_norm_silu(torch.randn(2, 64, 8, device="cuda"), 32, torch.ones(64))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(4, 128, 256, 256), (1, 128, 512, 512), (1, 128, 1024, 1024)], ids=str)
def test_large_tensors(shape, layout):
    """In a cluster, in a grid, and (channels_last, 67 MB for 8 groups) in part in a grid."""
    case = make_case(shape, 32, torch.bfloat16, layout, options=("weight", "bias"), device="cuda")
    y, mean, rstd = torch.ops.ldm_fused.group_norm_act(*case.arguments())
    dx, dweight, dbias, *_ = torch.ops.ldm_fused.group_norm_act_backward(
        case.dy, case.x, mean, rstd, case.weight, case.bias, True, None, None, None, [True] * 3 + [False] * 3)
    assert_within_bound(case, {"y": y, "x": dx, "weight": dweight, "bias": dbias}, oracle(case), eager(case))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_than_2_to_the_31_elements(layout):
    """The last group, whose offsets do not fit 32 bits."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of the GPU")
    x, dy = (torch.randn(1, 32, 8320, 8320, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x, dy = (t.contiguous(memory_format=FORMATS[layout]) for t in (x, dy))
    assert x.numel() > 2**31
    x.requires_grad_()
    y = ldm_fused.group_norm_silu(x, 32)
    (dx,) = torch.autograd.grad(y, x, dy)
    last = slice(31, 32)
    small = make_case((1, 1, 8320, 8320), 1, torch.bfloat16, options=(), device="cuda", eps=1e-5)
    small = replace(small, x=x.detach()[:, last].contiguous(), dy=dy[:, last].contiguous())
    assert_within_bound(small, {"y": y.detach()[:, last], "x": dx[:, last]})
