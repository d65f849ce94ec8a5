"""CUDA graphs, streams and devices other than the default. All of it needs a GPU."""

import pytest
import torch

import ldm_fused

if not ldm_fused.build_info()["cuda"]:
    pytest.skip("this build of ldm_fused has no CUDA kernels", allow_module_level=True)
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


def training_step(x, weight, dy):
    y = ldm_fused.group_norm_silu(x, 32, weight)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]


def arguments(device="cuda"):
    x = torch.randn(2, 64, 32, 32, device=device, requires_grad=True)
    weight = torch.randn(64, device=device, requires_grad=True)
    return x, weight, torch.randn_like(x)


def test_graph_capture_and_replay():
    x, weight, dy = arguments()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        training_step(x, weight, dy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = training_step(x, weight, dy)
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, training_step(x, weight, dy)))


def test_concurrent_streams_have_workspaces_of_their_own():
    cases = [arguments() for _ in range(4)]
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
    x, weight, dy = arguments()
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
    x, weight, dy = arguments("cuda:1")
    found = training_step(x, weight, dy)
    with torch.cuda.device(1):
        expected = training_step(x, weight, dy)
    assert torch.cuda.current_device() == 0 and all(t.device == x.device for t in found)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_parameters_on_the_cpu_are_refused():
    with pytest.raises(RuntimeError, match="weight must be on x's device cuda:0, got cpu"):
        ldm_fused.group_norm_silu(torch.randn(2, 64, 8, device="cuda"), 32, torch.ones(64))
