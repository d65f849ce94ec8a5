"""The devices that tests run on: the CPU, CUDA where there is one, and for the kernels the emulator."""

from types import SimpleNamespace

import emulated
import pytest
import torch

import ldm_fused

collect_ignore = ["integrations"]  # `make test-integrations` has the libraries that they need

# One thread a process would hide races between them.
torch.set_num_threads(max(2, torch.get_num_threads()))


def cuda():
    """"cuda", or the test is skipped."""
    if not ldm_fused.build_info()["cuda"]:
        pytest.skip("this build of ldm_fused has no CUDA kernels")
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
    ops = emulated if request.param == "emulated" else ldm_fused.ops
    return SimpleNamespace(name=request.param, device=cuda() if request.param == "cuda" else "cpu",
                           forward=ops.group_norm_act, backward=ops.group_norm_act_backward,
                           bias_add_residual=ops.bias_add_residual, channel_sums=ops.channel_sums)


@pytest.fixture(autouse=True)
def fresh_random_state():
    torch.manual_seed(1234)
