"""The devices that tests run on: the CPU, CUDA where there is one, and for the kernels the emulator."""

from types import SimpleNamespace

import emulated
import pytest
import torch

import ldm_fused

# One thread a process would hide races between them.
torch.set_num_threads(max(2, torch.get_num_threads()))


def _cuda():
    if not ldm_fused.build_info()["cuda"]:
        pytest.skip("this build of ldm_fused has no CUDA kernels")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Where tensors live in tests of what users call."""
    return _cuda() if request.param == "cuda" else "cpu"


@pytest.fixture(params=["cpu", "cuda", "emulated"])
def kernels(request):
    """An implementation of the registered ops: forward, backward and the device of their tensors.

    "emulated" are the CUDA kernels, run on the CPU.
    """
    if request.param == "emulated":
        return SimpleNamespace(name="emulated", device="cpu", forward=emulated.group_norm_act,
                               backward=emulated.group_norm_act_backward)
    return SimpleNamespace(name=request.param, device=_cuda() if request.param == "cuda" else "cpu",
                           forward=torch.ops.ldm_fused.group_norm_act.default,
                           backward=torch.ops.ldm_fused.group_norm_act_backward.default)


@pytest.fixture(autouse=True)
def fresh_random_state():
    torch.manual_seed(1234)
