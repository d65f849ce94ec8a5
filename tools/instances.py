"""The instances of the CUDA kernels, by name and template arguments: those in a library, and those that have run."""

import re
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"


def kernel_names():
    """Every kernel in csrc/cuda: the last name followed by a parenthesis in front of its body."""
    text = "".join(path.read_text() for path in sorted(SOURCES.glob("*.cu*")))
    return [re.findall(r"(\w+)\s*\(", head)[-1] for head in re.findall(r"__global__([^{;]*)", text)]


def plain(name):
    """One spelling of a demangled name, as tools/check_sass.py has it: apply_rows<float, Half, 4>."""
    name = re.sub(r"^void |ldm_fused::|\([^()]*Params\)$|\((?:unsigned )?int\)", "", name)
    return name.replace("(bool)1", "true").replace("(bool)0", "false")


def compiled(library):
    """The instances in a shared library: their mangled names stand in it as text, where nvcc registers them."""
    found = re.findall(rb"(?<!\w)_ZN9ldm_fused\w+", Path(library).read_bytes())
    mangled = sorted({name.decode() for name in found if name.endswith(b"ParamsE")})
    demangled = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    names = set(kernel_names())
    return {name for name in map(plain, demangled.splitlines()) if name.split("<")[0] in names}
