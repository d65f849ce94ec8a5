"""Builds ldm_fused._C: one abi3 binary for every Python from 3.10 and every torch from 2.11 on.

FORCE_CUDA=1 or 0 asks for CUDA kernels or for none (default: where torch and the machine both have CUDA);
CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS mean what they mean to torch.utils.cpp_extension. LDM_FUSED_CXXFLAGS is
added to the C++ compiler's flags, after all others, and to the linker's. LDM_FUSED_MODULE names the module in the place
of _C, and the library that it registers the ops in. With LDM_FUSED_WHEEL=cpu, cu13 or cu12, as tools/build_wheel.py
sets it, that is in the wheel's version, and its number is the CUDA that is wanted, whatever torch has.
"""
import glob
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig

SOURCES = ["csrc/ops.cpp", "csrc/glibc.cpp", "csrc/cpu/isa.cpp",
           *(f"csrc/cpu/{op}.cpp" for op in ("group_norm_act", "group_norm_act_backward", "bias_add_residual",
                                             "channel_sums")),
           *(f"csrc/cpu/kernels_{isa}.cpp" for isa in ("baseline", "avx2", "avx512", "avx512_bf16"))]
CUDA_SOURCES = ["csrc/cuda/group_norm_act.cu", "csrc/cuda/bias_add_residual.cu"]  # those with kernels
CUDA_HOST_SOURCES = ["csrc/cuda/device.cpp"]
CUDA_ARCHS = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "11.0", "12.0"]  # those that nvcc knows; the last one as PTX too

WHEEL = os.environ.get("LDM_FUSED_WHEEL", "")
PLATFORM = "manylinux_2_28_" + platform.machine()  # of such a wheel; tools/build_wheel.py sees whether it is true

os.chdir(os.path.dirname(os.path.abspath(__file__)))
if sys.prefix != sys.base_prefix:  # a virtual environment's ninja counts, activated or not
    os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", "")
try:
    import torch
except ImportError:
    sys.exit("ldm_fused is built against an installed PyTorch: install torch (2.11 or later), then build again, with "
             "`pip install --no-build-isolation .` or `make build PYTHON=...`.")
if torch.__version__ < (2, 11):
    sys.exit(f"ldm_fused needs torch 2.11 or later, and this Python has torch {torch.__version__}.")


def output(*command):
    """What a command prints on stdout and stderr; nothing where it cannot run."""
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    except OSError:
        return ""


def toolkits():
    """The folders in which a CUDA toolkit may be. One that the user names is the only one."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        return [named]
    found = []
    nvcc = shutil.which("nvcc")
    if nvcc:  # may be a link, or a script that starts the real one: only nvcc itself knows where its toolkit is
        top = re.search(r"TOP=(.+)", output(nvcc, "--dryrun", "none.cu"))
        found.append(top[1].strip() if top else os.path.dirname(os.path.dirname(os.path.realpath(nvcc))))
    found.append("/usr/local/cuda")
    nvidia = importlib.util.find_spec("nvidia")  # where pip puts cuda-toolkit[nvcc,cccl]
    for folder in nvidia.submodule_search_locations if nvidia else []:
        found += sorted(glob.glob(os.path.join(folder, "cu[0-9]*")))
    return [os.path.realpath(folder) for folder in found]


def find_cuda():
    """(CUDA_HOME, nvcc's version, None), or (None, None, the reason for building CPU kernels only)."""
    force = os.environ.get("FORCE_CUDA", "")
    if force not in ("", "0", "1"):
        sys.exit(f"FORCE_CUDA is 0 or 1, not '{force}'.")
    wanted, wanted_by = torch.version.cuda, "torch is built with"
    if WHEEL.startswith("cu"):
        wanted, wanted_by = WHEEL[2:], "LDM_FUSED_WHEEL asks for"
    if force == "0":
        return None, None, "FORCE_CUDA=0 asks for it"
    if not wanted and not force:
        return None, None, "this torch is built without CUDA"
    folders = toolkits()
    reason = f"there is no nvcc in {' or '.join(folders)} (CUDA_HOME may name another folder)"
    for home in folders:
        version = re.search(r"release (\d+\.\d+)", output(os.path.join(home, "bin", "nvcc"), "--version"))
        if version and (not wanted or version[1].split(".")[0] == wanted.split(".")[0]):
            return home, version[1], None
        if version:
            reason = f"{wanted_by} CUDA {wanted} and the toolkit in {home} is CUDA {version[1]}"
    if force:
        sys.exit(f"FORCE_CUDA=1 asks for CUDA kernels, but {reason}.")
    return None, None, reason


cuda_home, cuda_version, no_cuda = find_cuda()
if cuda_home:
    os.environ["CUDA_HOME"] = cuda_home  # before cpp_extension looks for itself, which no wrapper of nvcc survives
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):  # else torch asks the GPUs, and fails where there is none
        known = output(os.path.join(cuda_home, "bin", "nvcc"), "--list-gpu-arch").split()
        archs = [arch for arch in CUDA_ARCHS if "compute_" + arch.replace(".", "") in known]
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(archs) + "+PTX"

from setuptools import setup  # noqa: E402
from setuptools.command.egg_info import egg_info  # noqa: E402
from torch.utils import cpp_extension  # noqa: E402

version = re.search(r'^version = "(.+)"', open("pyproject.toml").read(), re.M)[1]
what = f"CPU kernels only, because {no_cuda}"
flags = ["-O3", "-DPy_LIMITED_API=0x030A0000", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
module = os.environ.get("LDM_FUSED_MODULE", "_C")
if module != "_C":
    flags.append("-DLDM_FUSED_LIBRARY=TORCH_EXTENSION_NAME")  # which torch defines as the module's name
built = {"VERSION": version, "TORCH": torch.__version__}
cxx, nvcc, link, include_dirs = flags + ["-fvisibility=hidden", "-g0"], [], [], [os.path.abspath("csrc")]
if cuda_home:
    archs = os.environ["TORCH_CUDA_ARCH_LIST"].replace(" ", ";")
    built["CUDA_ARCHS"] = archs
    what = f"CPU kernels, and CUDA kernels for {archs} by the nvcc {cuda_version} in {cuda_home}"
    cpp_extension.CUDA_HOME = cuda_home  # a CPU-only torch leaves it empty, FORCE_CUDA=1 or not
    SOURCES += CUDA_SOURCES + CUDA_HOST_SOURCES
    include_dirs.append(os.path.join(cuda_home, "include"))
    cxx.append("-DUSE_CUDA")
    threads = os.environ.get("MAX_JOBS") or str(os.cpu_count())  # nvcc compiles the architectures side by side
    nvcc = flags + ["-DUSE_CUDA", "-Xcompiler", "-fvisibility=hidden,-g0", "--threads", threads]
    # CUDAExtension would link torch's shared cudart; with the static one a binary serves its whole CUDA major. libtorch
    # is kept though no symbol is its own: it brings in libtorch_cuda, where there is one.
    target = {"aarch64": "sbsa"}.get(platform.machine(), platform.machine())
    libs = [os.path.join(cuda_home, folder) for folder in ("lib64", "lib", f"targets/{target}-linux/lib")]
    if WHEEL and torch.version.cuda:
        torch.version.cuda = cuda_version  # else cpp_extension refuses another major, whose binary would be the same
    link = [f"-L{lib}" for lib in libs if os.path.exists(os.path.join(lib, "libcudart_static.a"))]
    link += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    link += ["-Wl,--push-state,--no-as-needed", "-ltorch", "-Wl,--pop-state"]
cxx += [f'-DLDM_FUSED_{name}="{value}"' for name, value in built.items()]
added = shlex.split(os.environ.get("LDM_FUSED_CXXFLAGS", ""))
cxx, link = cxx + added, link + added


class Build(cpp_extension.BuildExtension):
    def run(self):
        if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
            sys.exit("Python's headers are not installed: there is no Python.h (Debian has it in python3-dev).")
        super().run()
        print(f"ldm_fused {version}, built with torch {torch.__version__}: {what}.")


class Version(egg_info):
    def finalize_options(self):
        self.tag_build = f"+{WHEEL}" if WHEEL else ""
        super().finalize_options()


setup(
    ext_modules=[cpp_extension.CppExtension(
        f"ldm_fused.{module}", SOURCES, py_limited_api=True, include_dirs=include_dirs, extra_link_args=link,
        depends=glob.glob("csrc/**/*.*", recursive=True),
        extra_compile_args={"cxx": cxx, "nvcc": nvcc})],
    cmdclass={"build_ext": Build, "egg_info": Version},
    options={"bdist_wheel": {"py_limited_api": "cp310", **({"plat_name": PLATFORM} if WHEEL else {})}},
)
