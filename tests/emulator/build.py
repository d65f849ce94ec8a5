"""Compiles emulated kernels into a Python module, with nothing but a C++ compiler, pybind11 and torch's headers."""

import functools
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import torch

ROOT = Path(__file__).resolve().parents[2]
MACHINE = ("tests/emulator/**/*",)
MACHINE_SOURCES = tuple(f"tests/emulator/{name}.cpp" for name in ("machine", "observer", "callbacks"))
KERNELS = (*MACHINE, "csrc/*", "csrc/cuda/**/*")  # not csrc/cpu: nothing of it is emulated
INCLUDES = ("tests/emulator", "csrc")  # the emulator first: its cuda_runtime.h stands in for the toolkit's
FLAGS = (
    "-O2 -g1 -std=c++17 -fPIC "  # reports name lines, and no variables
    "-fvisibility=hidden "  # each module has an emulator of its own
    "-fno-strict-aliasing "  # kernels read memory through vector types, as nvcc lets them
    "-ffp-contract=off "  # the same bits whatever machine compiles
    "-U_FORTIFY_SOURCE "  # fibers.h says why
    "-DUSE_CUDA -DTORCH_TARGET_VERSION=0x020b000000000000"
)
WATCHED = (  # of kernels: the compiler calls callbacks.cpp at each access of memory
    "-fsanitize=thread --param=tsan-instrument-func-entry-exit=0 "
    "-fno-tree-sra"  # a 16-byte vector stays one access
)


@functools.cache
def load(name, *folders):
    """The module built from tests/emulator/<name>.cpp; it is built again when a source or a flag has changed.

    ``folders`` are looked into for headers last.

    CXX names the compiler (default g++), LDM_FUSED_EMULATOR_ROOT another tree with the sources;
    LDM_FUSED_EMULATOR_FLAGS adds flags. With -fsanitize=address the emulator does not watch memory itself, and the
    interpreter must be started with LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++
    -print-file-name=libstdc++.so)" and ASAN_OPTIONS=detect_leaks=0. Raises RuntimeError with the compiler's messages.
    """
    library = build(name, folders, Path(os.environ.get("LDM_FUSED_EMULATOR_ROOT", ROOT)))
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def watches():
    """Whether the emulator watches accesses of memory itself: AddressSanitizer does not, nor -fno-sanitize=thread."""
    return not any(flag in _added_flags() for flag in ("address", "-fno-sanitize=thread"))


def _added_flags():
    return os.environ.get("LDM_FUSED_EMULATOR_FLAGS", "")


def build(name, folders, root):
    """The library built from the sources under ``root``."""
    compiler = [*shlex.split(os.environ.get("CXX", "g++")), *shlex.split(FLAGS), *shlex.split(_added_flags())]
    torch_folder = Path(torch.__file__).parent
    includes = [*INCLUDES, pybind11.get_include(), sysconfig.get_path("include"), torch_folder / "include", *folders]
    kernel_compiler = [*compiler, *(f"-I{folder}" for folder in includes)]
    if watches():
        kernel_compiler += shlex.split(WATCHED)
    with ThreadPoolExecutor() as pool:
        kernels = pool.submit(_make, [*kernel_compiler, "-c", f"tests/emulator/{name}.cpp"], KERNELS, ".o", root)
        machine = [pool.submit(_make, [*compiler, "-c", source], MACHINE, ".o", root) for source in MACHINE_SOURCES]
        objects = [str(future.result()) for future in (kernels, *machine)]
    libraries = [f"-L{torch_folder / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-ldl"]
    return _make([*compiler, "-shared", *objects, *libraries], (), sysconfig.get_config_var("EXT_SUFFIX"), root)


def _make(command, sources, suffix, root):
    """The file that the command writes: the one of an earlier run, if no source has changed since."""
    digest = hashlib.sha256(repr((command, sys.version, torch.__version__, pybind11.__version__)).encode())
    for path in sorted(path for pattern in sources for path in root.glob(pattern)):
        if path.is_file() and path.suffix != ".pyc":
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    made = root / "build" / "emulator" / f"{digest.hexdigest()[:16]}{suffix}"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: of test processes that build at the same time, none sees half a file.
        with tempfile.TemporaryDirectory(dir=made.parent) as folder:
            new = Path(folder) / made.name
            result = subprocess.run([*command, "-o", str(new)], cwd=root, capture_output=True, text=True)
            if result.returncode != 0:
                raise RuntimeError(f"{shlex.join(command)} failed:\n{result.stderr}")
            os.replace(new, made)
    return made
