"""Tests under AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize` runs this file as a program.

It builds the extension with both sanitizers into build/sanitize, apart from the one in use, and the emulator likewise.
Then the tests of the kernels run with these: on the CPU with each instruction set, and on the emulated CUDA kernels.
Sets that the processor lacks run too, with stand-ins for their instructions (tests/avx512).
All but the newest set that the processor has run only the tests of what they have of their own, and of the emulated
kernels 16-bit types and all combinations of parameters are left out, and the emulator's own tests. The checks that
multiply the time of compilation are left out too. With --all nothing is left out. With --cpu the emulated kernels are,
and of the other sets all but the newest.
PyTorch is not instrumented, but AddressSanitizer sees to its allocations: what our code reads or writes just beyond a
tensor's memory is seen.

Each run ends with tests/sanitized.py: the sanitizers are in force in that process, in those kernels.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = (
    "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1 "
    "-fno-wrapv"  # many a Python hands its -fwrapv on to extensions: then overflow is defined, and passes
)
# Without these checks, and without the tests' float16, the kernels compile in a fraction of the time. Beside the two
# sanitizers' other checks they see a pointer to a variable whose scope has ended, and pointer arithmetic that wraps.
QUICK = (
    " -fno-sanitize=null,vptr,object-size,pointer-overflow -fno-sanitize-address-use-after-scope "
    "--param=asan-instrumentation-with-call-threshold=0 -DLDM_FUSED_EMULATOR_WITHOUT_FLOAT16"
)
# The kernels for AVX-512 become code for AVX2. The extension takes the processor to have every set: it asks
# bool("avx512f"), which is true.
STAND_INS = f" '-I{ROOT / 'tests' / 'avx512'}' -D__builtin_cpu_supports=bool -Wno-psabi"
# The files of a run, and which of their tests: not what needs 14 GiB, nor what looks at the machine code, which is
# another one here, nor what the emulator has to watch, nor what PyTorch compiles.
CPU = (["test_kernels", "test_residual", "test_dropout", "test_parts", "test_errors", "test_build"],
       "not [emulated and not [cuda and not every_tier and not 2_to_the_31 and not newer_instructions and not as_planned "
       "and not thread_order and not fullgraph and not opcheck and not export")
KERNELS = (["test_kernels"], CPU[1])
EMULATED = (["test_kernels", "test_residual", "test_dropout", "test_parts", "test_cuda_kernels"],
            "not [cpu and not [cuda and not workload and not thread_order and not as_planned and not float16 "
            "and not all_parameters")
ALL_EMULATED = ([*EMULATED[0], "test_emulator"], EMULATED[1].partition(" and not float16")[0])


def build(flags):
    """Compiles the extension into build/sanitize/ldm_fused."""
    shutil.rmtree(BUILD / "ldm_fused", ignore_errors=True)
    shutil.copytree(ROOT / "ldm_fused", BUILD / "ldm_fused", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    return subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--force", f"--build-lib={BUILD}",
                           f"--build-temp={BUILD / 'objects'}"], cwd=ROOT,
                          env={**os.environ, "CXX": COMPILER, "FORCE_CUDA": "0", "LDM_FUSED_CXXFLAGS": flags})


def lacks_avx512():
    """Whether this processor needs stand-ins, and can run them."""
    words = set(Path("/proc/cpuinfo").read_text().split())
    return {"avx2", "fma", "f16c"} <= words and "avx512f" not in words


def library(name):
    path = subprocess.check_output([*shlex.split(COMPILER), f"-print-file-name={name}"], text=True).strip()
    if not os.path.isabs(path):
        sys.exit(f"{COMPILER} has no {name}: the sanitizers are those of GCC, with its libasan and libubsan.")
    return path


def python(flags, *arguments, isa=""):
    """A finished Python, in which kernels are those built here: it looks for ldm_fused first where it starts."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(BUILD), str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        "LDM_FUSED_CPU_ISA": isa,
        "LDM_FUSED_EMULATOR_FLAGS": flags,
        "CXX": f"env -u LD_PRELOAD {COMPILER}",  # the compiler of the emulator works unwatched
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch leave much behind when they exit
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "OMP_WAIT_POLICY": "passive",  # the runs share the processor
    }
    return subprocess.run([sys.executable, *arguments], cwd=BUILD, env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)


def run(name, tests, isa, flags):
    """The run's words in the last line; none where it failed."""
    files, expression = tests
    # The sanitizers write to file descriptor 2 and end the process: pytest must not keep that from being seen.
    result = python(flags, "-m", "pytest", "-v", "--capture=sys", "-p", "no:cacheprovider", "-k", expression,
                    *(str(ROOT / "tests" / f"{file}.py") for file in [*files, "sanitized"]), isa=isa)
    passed = re.search(r"=+ (\d+) passed.* in .*=+\n$", result.stdout)
    good = result.returncode == 0 and passed
    print(f"{name}: {passed[0] if good else result.stdout}", flush=True)
    return f"{name} {passed[1]} passed" if good else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="leave nothing out")
    parser.add_argument("--cpu", action="store_true",
                        help="leave out the emulated kernels, which compile for minutes, and old instruction sets")
    options = parser.parse_args()
    flags = FLAGS if options.all else FLAGS + QUICK
    stand_ins = lacks_avx512()
    BUILD.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:
        load = "" if options.cpu else "from emulator import build; build.load('library')"
        emulator = pool.submit(python, flags, "-c", load)
        extension = build(flags + STAND_INS if stand_ins else flags)
    isas = python(flags, "-c", "import emulated, ldm_fused; print(*ldm_fused.build_info()['cpu_isas'])")
    for finished in (extension, emulator.result(), isas):
        if finished.returncode != 0:
            sys.exit(f"{finished.stdout or ''}sanitize: FAILED to build")

    others = isas.stdout.split()
    own = "avx2" if stand_ins else others[-1]  # the newest that the processor has
    others.remove(own)
    runs = {} if options.cpu else {"emulated": (ALL_EMULATED if options.all else EMULATED, own)}  # the longest begins
    runs[f"cpu {own}"] = CPU, own
    for isa in others[-1:] if options.cpu else others:
        runs[f"cpu {isa}"] = CPU if options.all else KERNELS, isa
    with ThreadPoolExecutor(2) as pool:  # as many as small machines have cores, and the memory for
        results = list(pool.map(lambda name: run(name, *runs[name], flags), runs))
    if not all(results):
        sys.exit("sanitize: FAILED")
    print(f"sanitize: {', '.join(sorted(results))}, 0 errors")


if __name__ == "__main__":
    main()
