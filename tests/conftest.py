"""Fixtures: the devices that tests run on (CPU, CUDA where there is one, for kernels the emulator), and what patch needs."""

import gc
import sys
from pathlib import Path
from types import SimpleNamespace

import emulated
import libraries
import pytest
import torch

import ldm_fused
from ldm_fused import resnet_block
from ldm_fused.patching import adapter

sys.path.append(str(Path(__file__).parents[1]))  # tests of tools and benchmarks import these

collect_ignore = ["integrations"]  # `make test-integrations` has the libraries that they need

# With one thread no race between threads would show.
torch.set_num_threads(max(2, torch.get_num_threads()))


def pytest_collection_finish():
    """Torch and the tests have half a million objects, which live as long as the process: the collector need not look
    at them each time."""
    if emulated.is_compiled():
        raise pytest.UsageError("a file of tests compiles the emulator, for minutes, before any test asks for it")
    gc.collect()
    gc.freeze()


def cuda():
    """"cuda", or the test is skipped."""
    if not ldm_fused.ops.HAS_CUDA:
        pytest.skip("this build of ldm_fused has no CUDA kernels for this torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Where tensors live in tests of what users call."""
    return cuda() if request.param == "cuda" else "cpu"


@pytest.fixture(params=["cpu", "cuda", "emulated"])
def kernels(request):
    """The registered ops, and the device of their tensors.

    "emulated" are those of CUDA, launchers and kernels, run on the CPU.
    """
    ops, halves = (emulated, emulated) if request.param == "emulated" else (ldm_fused.ops, ldm_fused.halves)
    return SimpleNamespace(name=request.param, device=cuda() if request.param == "cuda" else "cpu",
                           forward=ops.group_norm_act, backward=ops.group_norm_act_backward,
                           bias_add_residual=ops.bias_add_residual, channel_sums=ops.channel_sums,
                           **{name: getattr(halves, f"group_norm_{name}") for name in
                              ("statistics", "apply", "backward_sums", "backward_apply")})


@pytest.fixture(autouse=True)
def fresh_random_state():
    torch.manual_seed(1234)


# ---- Of patch ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_thread():
    """Tensors are small here, and kernels have their own tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def load(monkeypatch):
    return lambda name: libraries.load(name, monkeypatch)


@pytest.fixture(params=["added", "left"])
def biases(request, monkeypatch):
    """"left" to the fused ops, as on CUDA, or added by the convolutions, as on a CPU."""
    if request.param == "left":
        monkeypatch.setattr(resnet_block, "_has_separate_bias", lambda x: True)
    return request.param


@pytest.fixture
def registered():
    """register_block; what it registers is forgotten after the test."""
    before = dict(adapter.registered)
    yield ldm_fused.register_block
    adapter.registered.clear()
    adapter.registered.update(before)
