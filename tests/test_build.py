"""The binary: what it says of itself, instruction sets, threads, large tensors, and a tree without it."""

import os
import platform
import shutil
import subprocess

import pytest
import torch
from fresh import ROOT, run_python
from oracle import make_case

import ldm_fused


def test_build_info():
    info = ldm_fused.build_info()
    assert info["version"] == ldm_fused.__version__ and info["torch"] == torch.__version__
    assert (info["cuda"] is None) == (info["cuda_archs"] == [])
    assert info["cpu_isa"] in info["cpu_isas"] and info["cpu_isas"][0] == "baseline"


def test_a_tree_without_its_binary_says_how_to_build_it(tmp_path):
    shutil.copytree(ROOT / "ldm_fused", tmp_path / "ldm_fused", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    result = run_python("import ldm_fused", cwd=tmp_path, path=[tmp_path])
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ldm_fused is not built yet: run `make build`"), result.stderr


@pytest.mark.parametrize("name", ["AVX2", "avx", "baseline,avx2"])
def test_an_instruction_set_that_there_is_not_is_refused_with_those_there_are(name):
    result = run_python("import ldm_fused", LDM_FUSED_CPU_ISA=name)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode != 0 and last.startswith("ImportError: ") and last.endswith("."), result.stderr
    for said in ("LDM_FUSED_CPU_ISA", f"'{name}'", ", ".join(ldm_fused.build_info()["cpu_isas"])):
        assert said in last


def test_no_instruction_set_named_is_the_best():
    result = run_python("import ldm_fused; print(ldm_fused.build_info()['cpu_isa'])", LDM_FUSED_CPU_ISA="")
    assert result.stdout.strip() == ldm_fused.build_info()["cpu_isas"][-1], result.stderr


def functions_with_avx():
    """The names of all functions in the binary that have an instruction of AVX or later, such as vaddps."""
    listing = subprocess.run(["objdump", "-dC", "--no-show-raw-insn", ldm_fused.ops._C.__file__],
                             capture_output=True, text=True, check=True).stdout
    found, name = set(), None
    for line in listing.splitlines():
        if line.endswith(">:"):
            name = line.split(" <", 1)[1]
        elif "\tv" in line:
            found.add(name)
    return found


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have the baseline alone")
@pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump, of the binutils")
def test_what_every_processor_runs_has_no_newer_instructions():
    """An inline function compiled in the source of a newer set, and linked in for all, would end a process."""
    functions = functions_with_avx()
    if any("cpu::baseline::" in name for name in functions):
        pytest.skip("the compiler's default target has AVX")
    sets = [f"cpu::{isa}::" for isa in ("avx2", "avx512", "avx512_bf16")]
    assert all(any(part in name for name in functions) for part in sets), "the kernels themselves were not seen"
    assert [name for name in functions if not any(part in name for part in sets)] == []


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
