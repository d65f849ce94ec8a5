"""The binary: what it says of itself, instruction sets, threads, large tensors, and a tree without it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import make_case

import ldm_fused

ROOT = Path(ldm_fused.__file__).parents[1]


def run_python(code, **environment):
    """What a program prints in a Python of its own."""
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path, **environment},
                          capture_output=True, text=True)


def test_build_info():
    info = ldm_fused.build_info()
    assert info["version"] == ldm_fused.__version__ and info["torch"] == torch.__version__
    assert (info["cuda"] is None) == (info["cuda_archs"] == [])
    assert info["cpu_isa"] in ("baseline", "avx2")


def test_a_tree_without_its_binary_says_how_to_build_it(tmp_path):
    shutil.copytree(ROOT / "ldm_fused", tmp_path / "ldm_fused", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    result = subprocess.run([sys.executable, "-c", "import ldm_fused"], cwd=tmp_path, capture_output=True, text=True,
                            env={**os.environ, "PYTHONPATH": str(tmp_path)})
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ldm_fused is not built yet: run `make build`"), result.stderr


OP = """
import torch, oracle
for layout in ("contiguous", "channels_last"):
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        case = oracle.make_case((2, 20, 19, 23), 2, dtype, layout)
        y, mean, rstd = torch.ops.ldm_fused.group_norm_act(*case.arguments())
        gradients = torch.ops.ldm_fused.group_norm_act_backward(
            case.dy, case.x, mean, rstd, case.weight, case.bias, True, case.pre_bias, case.scale, case.shift,
            [True] * 6)
        oracle.assert_within_bound(case, {"y": y, **dict(zip(oracle.GRADIENTS, gradients))})
"""


@pytest.mark.parametrize("isa", ["baseline", ""])
def test_every_instruction_set_is_right(isa):
    result = run_python(OP + "import ldm_fused; print(ldm_fused.build_info()['cpu_isa'])", LDM_FUSED_CPU_ISA=isa)
    assert result.returncode == 0, result.stderr
    assert isa in result.stdout


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape,num_groups", [((1, 6, 120, 130), 2), ((3, 64, 33, 30), 32), ((1, 2, 99999), 1)],
                         ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(shape, num_groups, layout):
    case = make_case(shape, num_groups, layout=layout)
    if case is None:
        pytest.skip("3-D tensors have no channels_last")
    results, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            y, mean, rstd = torch.ops.ldm_fused.group_norm_act(*case.arguments())
            results.append([y, mean, rstd, *torch.ops.ldm_fused.group_norm_act_backward(
                case.dy, case.x, mean, rstd, case.weight, case.bias, True, case.pre_bias, case.scale, case.shift,
                [True] * 6)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_than_2_to_the_31_elements(device, layout):
    """The last group lies behind the 2^31st element: it must come out as it does alone."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    if free < 14 * 2**30:
        pytest.skip(f"needs 14 GiB of free memory on {device}")
    pixels = 2**28 + 8
    shape = (1, pixels, 1, 8) if layout == "channels_last" else (1, 8, pixels, 1)
    memory = torch.empty(shape, dtype=torch.bfloat16, device=device)
    flat = memory.view(-1)
    block = torch.randn(2**20, dtype=torch.bfloat16, device=device)
    for begin in range(0, flat.numel(), block.numel()):
        flat[begin:begin + block.numel()].copy_(block[:flat.numel() - begin])
    x = memory.permute(0, 3, 1, 2) if layout == "channels_last" else memory
    y = ldm_fused.group_norm_silu(x, 2)
    assert y.shape == x.shape and y.stride() == x.stride() and x.numel() > 2**31
    # The block of random numbers repeats, so its statistics are the groups' but for the ragged end.
    mean, variance = block.float().mean(), block.float().var(correction=0)
    for part in (slice(0, 4096), slice(-4096, None)):
        expected = torch.nn.functional.silu((x[:, :, part].float() - mean) * (variance + 1e-5).rsqrt())
        torch.testing.assert_close(y[:, :, part].float(), expected, rtol=2e-2, atol=2e-2)
