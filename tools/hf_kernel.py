"""The kernel that Hugging Face's ``kernels`` package loads: `make hf-kernel` runs this file as a program.

It puts the project that Hugging Face's kernel-builder builds into build/hf-kernel: hf_kernel, csrc, and the files of
ldm_fused that the layers need. Nothing of these is in the repository twice. Beside them, in build/hf-kernel/build, it
makes the one build for this machine and this torch's backend, as ``kernels.get_local_kernel`` takes it.
docs/hf_kernel.md says what only kernel-builder does.
"""

import ast
import base64
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "hf-kernel"
PACKAGE = "torch-ext/ldm_fused/"
OPS = '''import torch

from . import {name}

ops = torch.ops.{name}


def add_op_namespace_prefix(op_name):
    return f"{name}::{{op_name}}"
'''


def project():
    """The project's files, {path: bytes}."""
    own, sources = ROOT / "hf_kernel", ROOT / "csrc"
    files = {str(path.relative_to(own)): path.read_bytes() for path in _files(own)}
    files.update((str(path.relative_to(ROOT)), path.read_bytes()) for path in _files(sources))
    _add_imported(files, [name for name in files if name.startswith(PACKAGE)])
    files["LICENSE"] = (ROOT / "LICENSE").read_bytes()
    files["build.toml"] = re.sub(rb'"(csrc/[^"]*)"', lambda pattern: _expanded(pattern[1].decode(), files),
                                 files["build.toml"])
    return files


def _add_imported(files, importing):
    """Adds the files of ldm_fused that the package's files import, and those that these import."""
    for name in importing:
        for node in ast.walk(ast.parse(files[name])):
            if not isinstance(node, ast.ImportFrom) or node.level != 1:
                continue
            for module in [node.module] if node.module else [alias.name for alias in node.names]:
                path, added = ROOT / "ldm_fused" / f"{module}.py", f"{PACKAGE}{module}.py"
                if added not in files and module != "_ops" and path.exists():  # the build writes _ops.py
                    files[added] = path.read_bytes()
                    _add_imported(files, [added])


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def _expanded(pattern, files):
    """The files that lie where a pattern says, as build.toml lists them."""
    folder = pattern.removesuffix("*")
    names = sorted(name for name in files if name.startswith(folder) and "/" not in name[len(folder):])
    return ", ".join(f'"{name}"' for name in names).encode()


def identifier(files):
    """Ten digits that differ wherever what is built does."""
    digest = hashlib.sha256()
    for name, data in sorted(files.items()):
        if name.startswith(("csrc/", PACKAGE)):
            digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()[:10]


def write(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def setting(files, key):
    """A number or string of build.toml."""
    return re.search(rf'^{key} = "?([^"\s]+)', files["build.toml"].decode(), re.M)[1]


def build_variant(files, out):
    """Builds the variant for this machine and torch in ``out``/build, unless it is there; gives its folder."""
    backend = "cuda" if torch.version.cuda and os.environ.get("FORCE_CUDA") != "0" else "cpu"
    name = f"_ldm_fused_{backend}_{identifier(files)}"
    platform_name = "cu" + torch.version.cuda.replace(".", "") if backend == "cuda" else backend
    abi = setting(files, "stable-abi").replace(".", "")
    variant = out / "build" / f"torch-stable-abi{abi}-{platform_name}-{platform.machine()}-linux"
    if (variant / f"{name}.abi3.so").exists() and (variant / "metadata.json").exists():
        return variant
    shutil.rmtree(variant, ignore_errors=True)
    binary = compile_binary(name, backend)
    package = {path[len(PACKAGE):]: data for path, data in files.items() if path.startswith(PACKAGE)}
    package["_ops.py"] = OPS.format(name=name).encode()
    package[binary.name] = binary.read_bytes()
    write(variant, package)
    metadata = {"id": name, "name": setting(files, "name"), "version": int(setting(files, "version")),
                "license": setting(files, "license"), "python-depends": [],
                "backend": backend_info(backend, name, variant / binary.name),
                "digest": {"algorithm": "sha256", "files": {path: _hash(data) for path, data in package.items()}}}
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return variant


def compile_binary(name, backend):
    """The binary of a module ``name`` that registers the ops in ``torch.ops.<name>``."""
    made = OUT.with_name("hf-kernel-objects")
    shutil.rmtree(made / "ldm_fused", ignore_errors=True)
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--force", f"--build-lib={made}",
                    f"--build-temp={made}"], cwd=ROOT, check=True, stdout=sys.stderr,
                   env={**os.environ, "LDM_FUSED_MODULE": name, "FORCE_CUDA": str(int(backend == "cuda"))})
    return next((made / "ldm_fused").glob(f"{name}*.so"))


def backend_info(backend, name, path):
    """What ``kernels`` must know of a binary's backend: the binary is asked."""
    spec = importlib.util.spec_from_file_location(name, path)
    archs = importlib.util.module_from_spec(spec).build_info()["cuda_archs"]
    return {"type": backend, **({"archs": archs.split(";")} if archs else {})}


def _hash(data):
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def main():
    files = project()
    for path in (OUT / "csrc", OUT / "torch-ext"):
        shutil.rmtree(path, ignore_errors=True)
    write(OUT, files)
    print(build_variant(files, OUT).relative_to(ROOT))


if __name__ == "__main__":
    main()
