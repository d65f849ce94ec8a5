"""Compiles the emulated kernels into a Python module, with nothing but a C++ compiler and pybind11."""

import functools
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("tests/emulator", "csrc")  # the emulator first: its cuda_runtime.h stands in for the toolkit's
FLAGS = (
    "-O2 -g -std=c++17 -fPIC -shared "
    "-fvisibility=hidden "  # each module has an emulator of its own
    "-fno-strict-aliasing "  # kernels read memory through vector types, as nvcc lets them
    "-ffp-contract=off "  # the same bits whatever machine compiles
    "-U_FORTIFY_SOURCE"  # fibers.h says why
)


@functools.cache
def load(name):
    """The module built from tests/emulator/<name>.cpp; it is built again when a source or a flag has changed.

    CXX names the compiler (default g++), LDM_FUSED_EMULATOR_FLAGS adds flags. With -fsanitize=address the interpreter
    must be started with LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" and
    ASAN_OPTIONS=detect_leaks=0. Raises RuntimeError with the compiler's messages.
    """
    command = [*shlex.split(os.environ.get("CXX", "g++")), *shlex.split(FLAGS)]
    command += shlex.split(os.environ.get("LDM_FUSED_EMULATOR_FLAGS", ""))
    command += [f"-I{folder}" for folder in SOURCES]
    command += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", f"tests/emulator/{name}.cpp"]

    library = ROOT / "build" / "emulator" / f"{name}-{_digest(command)}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        _compile(command, library)
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _digest(command):
    digest = hashlib.sha256(repr((command, sys.version, pybind11.__version__)).encode())
    for path in sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*")):
        if path.suffix in {".h", ".cuh", ".cpp", ".cu"}:
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(command, library):
    library.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place: of test processes that build at the same time, none sees half a file.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        result = subprocess.run([*command, "-o", str(built)], cwd=ROOT, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"{shlex.join(command)} failed:\n{result.stderr}")
        os.replace(built, library)
