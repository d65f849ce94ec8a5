"""make wheel: a wheel for many machines, built from the source distribution.

    python tools/build_wheel.py cpu                 # or cu13, cu12: with CUDA kernels for that major version
    python tools/build_wheel.py cpu --source .      # of a source tree as it is, with what is compiled there

Its tag says that it runs with glibc 2.28, and its version which variant it is: 0.2.0+cu13. A binary of which the tag
would not be true is refused.
"""

import argparse
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TAG = "manylinux_2_28_x86_64"
# Of PEP 600's manylinux_2_28, as auditwheel has it. Torch's own libraries come with torch.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
LIBRARIES = {"libc10.so", "libtorch.so", "libtorch_cpu.so", "libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6",
             "ld-linux-x86-64.so.2"}
TOOLKIT = "cuda-toolkit[nvcc,cccl,cudart]==13.0.*"  # the oldest of its major: its kernels run with every driver for it

DYNSYM, DYNAMIC, VERNEED, VERSYM = 11, 6, 0x6FFFFFFE, 0x6FFFFFFF  # types of sections
NEEDED = 1  # a tag in DYNAMIC


def imports(binary: bytes):
    """(libraries, symbols) that a 64-bit ELF file needs of others. A symbol is its name and its version, or ""."""
    start, size, count = struct.unpack_from("<40xQ10xHH", binary)
    # Of each section: name, type, flags, address, offset, size, link, info, alignment, entry size.
    sections = [struct.unpack_from("<IIQQQQIIQQ", binary, start + i * size) for i in range(count)]
    by_type = {section[1]: section for section in sections}

    def entries(kind, layout):
        section = by_type[kind]
        return struct.iter_unpack(layout, binary[section[4]:section[4] + section[5]])

    def text(kind, at):
        """The string that an entry of a section names."""
        at += sections[by_type[kind][6]][4]
        return binary[at:binary.index(b"\0", at)].decode()

    versions = {}
    at = by_type[VERNEED][4] if VERNEED in by_type else 0
    while at:
        _, _, _, to_version, to_next = struct.unpack_from("<HHIII", binary, at)
        version = at + to_version
        while version:
            _, _, index, name, to_other = struct.unpack_from("<IHHII", binary, version)
            versions[index] = text(VERNEED, name)
            version = to_other and version + to_other
        at = to_next and at + to_next
    libraries = [text(DYNAMIC, value) for tag, value in entries(DYNAMIC, "<qQ") if tag == NEEDED]
    indices = [index & 0x7FFF for index, in entries(VERSYM, "<H")] if VERSYM in by_type else None
    symbols = [(text(DYNSYM, name), versions.get(indices[i], "") if indices else "")
               for i, (name, _, _, section, _, _) in enumerate(entries(DYNSYM, "<IBBHQQ")) if name and not section]
    return libraries, symbols


def obstacles(binary: bytes):
    """Why a binary does not run wherever its tag says, one sentence each."""
    libraries, symbols = imports(binary)
    found = [f"It needs {library}, which not every machine has." for library in libraries if library not in LIBRARIES]
    for name, version in symbols:
        family, _, number = version.partition("_")
        if family in NEWEST and tuple(int(part) for part in number.split(".")) > NEWEST[family]:
            found.append(f"It needs {name} of {version}: csrc/glibc.cpp says what to do.")
    return found


def checked(wheel: Path, version: str, variant: str):
    """The wheel, if its name and its binary are what they should be."""
    name = f"ldm_fused-{version}+{variant}-cp310-abi3-{TAG}.whl"
    with zipfile.ZipFile(wheel) as archive:
        found = obstacles(archive.read("ldm_fused/_C.abi3.so"))
    if wheel.name != name:
        found.insert(0, f"Its name should be {name}.")
    if found:
        wheel.unlink()
        sys.exit("\n".join([f"{wheel.name} is refused.", *found]))
    return wheel


def unpacked(folder: Path):
    """A source tree in the folder, from the source distribution of this one."""
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "--dist-dir", folder], cwd=ROOT, check=True,
                   env={**os.environ, "FORCE_CUDA": "0"})
    archive, = folder.glob("ldm_fused-*.tar.gz")
    shutil.unpack_archive(archive, folder)
    return folder / archive.name.removesuffix(".tar.gz")


def with_toolkit(environment, source: Path):
    """The environment, with the toolkit of CUDA 13 from the package index where none is installed."""
    probe = [sys.executable, "setup.py", "--name"]
    result = subprocess.run(probe, cwd=source, env=environment, capture_output=True, text=True)
    if result.returncode == 0:
        return environment
    if environment["LDM_FUSED_WHEEL"] != "cu13" or environment.get("CUDA_HOME"):
        sys.exit(f"{result.stderr.strip()} The package index has a compiler of CUDA 13 alone.")
    folder = ROOT / "build" / "cuda-13"
    if not folder.exists():
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", folder, TOOLKIT], check=True)
    return {**environment, "CUDA_HOME": str(folder / "nvidia" / "cu13")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", choices=("cpu", "cu13", "cu12"))
    parser.add_argument("--source", type=Path, help="a source tree (default: from a new source distribution)")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = args.source or unpacked(Path(folder))
        version = re.search(r'^version = "(.+)"', (source / "pyproject.toml").read_text(), re.M)[1]
        environment = {**os.environ, "LDM_FUSED_WHEEL": args.variant, "FORCE_CUDA": str(int(args.variant != "cpu"))}
        if args.variant != "cpu":
            environment = with_toolkit(environment, source)
        made = Path(folder) / "wheel"
        subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--wheel-dir",
                        made, source.resolve()], env=environment, check=True)
        wheel = checked(next(made.iterdir()), version, args.variant)
        args.out.mkdir(parents=True, exist_ok=True)
        shutil.move(wheel, args.out / wheel.name)
    print(f"{args.out / wheel.name}, {(args.out / wheel.name).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
