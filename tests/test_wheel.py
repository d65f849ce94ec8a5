"""What a wheel promises: an old glibc, one CUDA major version, any processor."""

import platform
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from fresh import run_python

import ldm_fused
from ldm_fused import ops
from tools import build_wheel

ROOT = Path(__file__).parents[1]


# ---- Old systems -------------------------------------------------------------------------------------------------


def compiled(folder, *source, flags=()):
    """The bytes of a shared library."""
    (folder / "source.cpp").write_text("\n".join(source))
    subprocess.run(["g++", "-shared", "-fPIC", "-O1", *flags, "source.cpp", "-o", "library.so", "-lm"], cwd=folder,
                   check=True)
    return (folder / "library.so").read_bytes()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="wheels are for x86-64")
def test_the_binary_runs_with_an_old_glibc():
    assert build_wheel.obstacles(Path(ldm_fused._C.__file__).read_bytes()) == []


def test_what_a_binary_imports_is_found_with_its_library_and_version():
    libraries, symbols = build_wheel.imports(Path(ldm_fused._C.__file__).read_bytes())
    assert {"libtorch_cpu.so", "libc10.so", "libc.so.6"} <= {*libraries}
    assert ("PyModule_Create2", "") in symbols and "memcpy" in dict(symbols)
    assert re.fullmatch(r"GLIBC_2\.\d+(\.\d+)?", dict(symbols)["memcpy"])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="wheels are for x86-64")
def test_a_function_of_a_newer_glibc_is_an_obstacle_which_its_name_is_told_of(tmp_path):
    compiled(tmp_path, 'extern "C" double exp(double);', 'extern "C" double f(double x) { return exp(x); }')
    version = dict(build_wheel.imports((tmp_path / "library.so").read_bytes())[1])["exp"]
    if version == "GLIBC_2.2.5":
        pytest.skip("the glibc here has no newer exp")
    found, = build_wheel.obstacles((tmp_path / "library.so").read_bytes())
    assert found.startswith(f"It needs exp of {version}: ")


def test_a_library_that_not_every_machine_has_is_an_obstacle(tmp_path):
    compiled(tmp_path, "int cudaMalloc(void**, unsigned long) { return 0; }", flags=["-Wl,-soname,libcudart.so.13"])
    (tmp_path / "library.so").rename(tmp_path / "libcudart.so.13")
    needing = compiled(tmp_path, "", flags=["-Wl,--no-as-needed", "-L.", "-l:libcudart.so.13"])
    assert "It needs libcudart.so.13, which not every machine has." in build_wheel.obstacles(needing)


# ---- Another CUDA ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("built,running", [("", None), ("", "12.8"), ("13.0", "13.2"), ("13.1", "13.0")])
def test_kernels_serve_a_torch_of_their_own_cuda_major_version(built, running):
    assert ops.cuda_obstacle(built, running) is None


@pytest.mark.parametrize("built,running,told", [("13.0", "12.8", "with CUDA 12.8"), ("12.9", "13.0", "with CUDA 13.0"),
                                                ("13.0", None, "without CUDA")])
def test_kernels_for_another_cuda_are_told_of_in_one_sentence(built, running, told):
    said = ops.cuda_obstacle(built, running)
    assert said.startswith(f"ldm_fused has kernels for CUDA {built[:2]}, and torch ") and f" is built {told}: " in said
    assert said.endswith(".") and ". " not in said


# A torch of another major version, without one: the binary is loaded before the package, and says that it has CUDA.
ANOTHER_CUDA = f"""
import importlib.util, sys, types, warnings
import torch
spec = importlib.util.spec_from_file_location("ldm_fused._C", {ldm_fused._C.__file__!r})
binary = importlib.util.module_from_spec(spec)
spec.loader.exec_module(binary)
fake = types.ModuleType("ldm_fused._C")
fake.__dict__.update(vars(binary), build_info=lambda: dict(binary.build_info(), cuda="13.0", cuda_archs="9.0"))
sys.modules["ldm_fused._C"] = fake
torch.version.cuda = "12.8"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import ldm_fused
print([str(warning.message) for warning in caught if "ldm_fused" in str(warning.message)])
x = torch.randn(2, 8, 5, 5)
y = ldm_fused.group_norm_silu(x, 2)
torch.testing.assert_close(y, torch.nn.functional.silu(torch.nn.functional.group_norm(x, 2)))
print(ldm_fused.ops.HAS_CUDA, ldm_fused.functional.has_kernels(x), "cuda" in ldm_fused.functional._KERNEL_DEVICES)
"""


def test_under_a_torch_of_another_cuda_the_import_says_so_and_cpu_kernels_serve():
    result = run_python(ANOTHER_CUDA)
    assert result.returncode == 0, result.stderr
    said, served = result.stdout.splitlines()
    assert said == repr([ops.cuda_obstacle("13.0", "12.8")])
    assert served == "False True False"


# ---- Another processor -------------------------------------------------------------------------------------------


CROSS = "aarch64-linux-gnu-g++"


@pytest.mark.skipif(not shutil.which(CROSS), reason=f"needs {CROSS}, a package of the distribution")
def test_the_cpu_sources_compile_and_link_for_aarch64(tmp_path):
    """No header and no flag of x86 outside its file, and no kernel called that is not there."""
    flags = ["-fPIC", "-O0", "-fvisibility=hidden", "-DPy_LIMITED_API=0x030A0000", "-DLDM_FUSED_VERSION=\"\"",
             "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DLDM_FUSED_TORCH=\"\"", "-Icsrc",
             f"-I{Path(torch.__file__).parent / 'include'}", f"-I{sysconfig.get_path('include')}"]
    sources = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]

    def compile(source):
        made = tmp_path / f"{source.stem}.o"
        subprocess.run([CROSS, *flags, "-c", source, "-o", made], cwd=ROOT, check=True)
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile, sources))
    subprocess.run([CROSS, "-shared", *objects, "-o", tmp_path / "_C.so"], check=True)
    binary = (tmp_path / "_C.so").read_bytes()
    assert int.from_bytes(binary[18:20], "little") == 183  # EM_AARCH64
    _, symbols = build_wheel.imports(binary)
    names = {name for name, _ in symbols}
    assert "PyModule_Create2" in names and not [name for name in names if name.startswith("_ZN9ldm_fused")]
