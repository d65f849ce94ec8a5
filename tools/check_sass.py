"""What nvcc makes of the CUDA kernels: registers, spills, stack, and the width of their global loads and stores.

`make sass` compiles every kernel for every architecture of setup.py, which takes a CUDA toolkit and no GPU, and reads
what ptxas says of it and its disassembly. It fails (status 1) on
  - a spill or a stack frame, in any kernel: local memory is traffic that no plan predicts;
  - a global access of less than 16 bytes in a streaming loop: instructions are then the limit, where memory should be;
  - more instructions an element than issue_slots.py allows, which says how it counts them;
  - a kernel that the table below does not know, or a streaming one without a loop to judge: it would go unjudged;
  - too many kernels: each adds to the compile time and to the binary.
What it read is left in build/sass.
"""
import argparse
import concurrent.futures
import contextlib
import glob
import importlib.util
import io
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools import issue_slots  # noqa: E402
from tools.disassembly import Flow, parse_sass  # noqa: E402

# ---- The kernels: a new one is entered here -------------------------------------------------------------------------

# These go over a whole tensor. Their last template argument is V, the elements of a vector. V = 1 is for tensors that
# are not aligned, or whose rows are no multiple of 16 bytes, and its accesses are narrow for that reason. V > 1 is
# planned only where every vector is whole: no loop has a reason for a narrow access. The loop that takes what an
# unrolled loop leaves over is judged like it.
STREAMING = r"(statistics|sums|channel_sums|(?P<writes>apply|input_gradient|residual))_(rows|columns)"
# These do all steps in one kernel: vectors stream in some of their loops; others run once an item and are narrow. The
# numbers (judge_resident() has the words) mean: at least so many places load 16 bytes, at least so many store them, and
# at most so many asides are narrow. The first pattern that matches counts; the arguments end in V (never 1), columns
# and grid. Count again when you change what a kernel does. Do not raise a number for an access that nvcc has split.
RESIDENT = {
    # Copies; stores y. Aside: dropout's seed; parameters; the team's groups.
    r"resident_forward<.+, \d+, (true|false), false>": (1, 1, 3),
    # Copies first, while waiting, and while storing. Loads what does not fit: for statistics, and again for y. Stores y of
    # that and of what was copied. Aside: dropout's seed; parameters; publishing groups, and channels (it has none to
    # publish); the team's groups; the counter's reset; the element that a unit's statistics are relative to, if none of
    # the unit is kept.
    r"resident_forward<.+, \d+, (true|false), true>": (5, 2, 7),
    # Copies; stores dx. Aside: parameters; the team's groups; totals, and two more loops that write zeros for a team
    # without blocks: nvcc does not know that there is no such team.
    r"resident_backward<.+, \d+, (true|false), false>": (1, 1, 5),
    # Copies as above, and where dx is not wanted. Loads what does not fit, for the sums and again for dx. Stores dx of
    # that and of what was copied. Aside: as above, and totals.
    r"resident_backward<.+, \d+, (true|false), true>": (6, 2, 7),
}
# These see only partial results and parameters.
SMALL = r"merge_statistics|merge_parts|merge_sums|merge_channel_sums|parameter_gradients"

WIDE = 16  # bytes
MOST_KERNELS = 220  # each costs a third of a second of nvcc and 50 KB, for every architecture


def known_places(name):
    """What RESIDENT says of a kernel; None for others."""
    return next((numbers for pattern, numbers in RESIDENT.items() if re.fullmatch(pattern, name)), None)


def role(name):
    """"streaming", "resident", "misaligned" (V = 1) or "small"; None for a kernel that is not in the table."""
    base, _, arguments = name.partition("<")
    if known_places(name):
        return "resident"
    if re.fullmatch(STREAMING, base):
        return "misaligned" if re.fullmatch(r"(.*, )?1>", arguments) else "streaming"
    return "small" if re.fullmatch(SMALL, base) else None


# ---- What ptxas -v says ---------------------------------------------------------------------------------------------


@dataclass
class Function:
    mangled: str
    kernel: bool = False  # else a function that kernels call
    registers: int = 0
    spilled: int = 0  # bytes of spill stores and loads
    stack: int = 0  # bytes
    shared: int = 0  # bytes, static
    name: str = ""  # demangled
    accesses: list = field(default_factory=list)  # Instructions: the streaming ones
    places: list = field(default_factory=list)  # a resident kernel's: the wide accesses of each place that has some
    asides: list = field(default_factory=list)  # a resident kernel's: the accesses of each
    unread: str = ""  # why the disassembly could not be followed
    cost: issue_slots.Cost = None  # of a kernel that issue_slots judges


def parse_ptxas(log):
    """{mangled name: Function} of all that was compiled."""
    functions, kernel, function = {}, None, None
    for line in log.splitlines():
        if m := re.search(r"Compiling entry function '(.+?)'", line):
            kernel = functions.setdefault(m[1], Function(m[1]))
            kernel.kernel = True
        elif m := re.search(r"Function properties for (\S+)", line):
            function = functions.setdefault(m[1], Function(m[1]))
        elif m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            function.stack, function.spilled = int(m[1]), int(m[2]) + int(m[3])
        elif m := re.search(r"Used (\d+) registers", line):
            kernel.registers = int(m[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernel.shared = int(shared[1]) if shared else 0
    return functions


# ---- The disassembly ------------------------------------------------------------------------------------------------


def streaming_loops(code):
    """The global accesses of each loop that has some and encloses no other loop with some.

    Only an innermost loop runs once a vector. What an outer loop does runs once a unit of work, and may be narrow: the
    load of a channel's parameters is. A loop that puts parameters into shared memory may be narrow too: it stores
    there, and none of its accesses is wide. A subroutine that a loop calls is part of it.
    """
    flow = Flow(code)

    def innermost(loops):
        for loop in loops:
            inner = list(innermost(loop.inner))
            own, shares = flow.accesses(loop.body)
            if shares and all(access.width < WIDE for access in own):
                own = []
            yield from inner or ([own] if own else [])

    return list(innermost(flow.loops()))


def judge_resident(code):
    """A resident kernel's streaming accesses, the wide ones of each place that has some, and its asides.

    A place is a loop without the loops in it, or all that is in no loop. Vectors go through a loop with a wide access,
    of its own or of a loop in it. Whatever else such a loop needs it reads from shared memory. So a narrow access of
    its own is a piece of a vector that nvcc has split. This holds for the loop over the items too, and so for vectors
    in registers, which have no loop of their own. An aside is a loop with narrow accesses only, together with the loops
    in it; or a narrow access in no loop; or a narrow load that is the only one of its place, since splitting a vector
    takes two. An asynchronous copy is of a vector, narrow or not. A STRONG access, by which blocks wait for each other,
    never is.
    """
    flow = Flow(code)
    streaming, places, asides = [], [], []

    def accesses_of(instructions):
        return [access for access in flow.accesses(instructions)[0] if "STRONG" not in access.opcode]

    def streams(access):
        return access.width >= WIDE or access.kind == "LDGSTS"

    def enter(accesses):
        streaming.extend(accesses)
        wide = [access for access in accesses if access.width >= WIDE]
        places.extend([wide] if wide else [])

    def walk(loops):
        for loop in loops:
            accesses = accesses_of(loop.body)
            if any(map(streams, accesses)):
                own = accesses_of(loop.own)
                narrow = [access for access in own if access.kind in ("LDG", "LD") and access.width < WIDE]
                if len(narrow) == 1:
                    asides.append(narrow)
                    own.remove(*narrow)
                enter(own)
                walk(loop.inner)
            elif accesses:
                asides.append(accesses)

    outermost = flow.loops()
    walk(outermost)
    outside = accesses_of(flow.everything.difference(*(loop.body for loop in outermost)))
    enter([access for access in outside if streams(access)])
    asides += [[access] for access in outside if not streams(access)]
    return streaming, places, asides


# ---- The verdict ----------------------------------------------------------------------------------------------------


def output(*command):
    """What a command prints on stdout, and what it says on stderr."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}{command[0]} failed")
    return done.stdout, done.stderr


def examine(log, disassembly):
    """The Functions of one compilation, from what ptxas said and from the disassembly."""
    functions, codes = parse_ptxas(log), parse_sass(disassembly)
    kernels = {mangled for mangled, function in functions.items() if function.kernel}
    if not kernels or kernels != set(codes):
        which = ", ".join(sorted(kernels ^ set(codes))) or "there is no kernel in either"
        raise RuntimeError(f"ptxas -v and the disassembly do not agree on what was compiled: {which}")
    for function, name in zip(functions.values(), output("c++filt", *functions)[0].splitlines()):
        function.name = re.sub(r"^void |ldm_fused::|\([^()]*\)$", "", name)
        code = codes.get(function.mangled)
        try:
            if code and role(function.name) == "streaming":
                function.accesses = [access for loop in streaming_loops(code) for access in loop]
            elif code and role(function.name) == "resident":
                function.accesses, function.places, function.asides = judge_resident(code)
        except ValueError as error:
            function.unread = str(error)
        function.cost = issue_slots.cost_of(function.name, code) if code else None
    return list(functions.values())


def faults(function):
    """What is wrong with a function, in words."""
    if function.spilled:
        yield f"{function.spilled} bytes spilled"
    if function.stack:
        yield f"a stack frame of {function.stack} bytes"
    if function.kernel and not role(function.name):
        yield "named neither in STREAMING nor in RESIDENT nor in SMALL of tools/check_sass.py"
    if function.kernel and role(function.name) == "streaming":
        judged = {access.kind[:2] for access in function.accesses}
        writes = re.match(STREAMING, function.name)["writes"]
        for kind, name, there in (("LD", "load", True), ("ST", "store", writes)):
            if there and kind not in judged:
                yield f"no {name} judged: {function.unread or f'it has no loop with a global {name}'}"
    if function.kernel and role(function.name) == "resident":
        loads, stores, asides = known_places(function.name)
        for kind, name, least in (("LD", "load", loads), ("ST", "store", stores)):
            found = sum(any(access.kind.startswith(kind) for access in place) for place in function.places)
            if found < least:
                yield (f"{found} of {least} places {name} {WIDE} bytes: "
                       + (function.unread or "the others are narrow, or RESIDENT says too many"))
        if len(function.asides) > asides:
            yield (f"{len(function.asides)} asides narrower than {WIDE} bytes, where {asides} have a reason: "
                   + ", ".join(str(aside[0]) for aside in function.asides))
    narrow = [access for access in function.accesses if access.width < WIDE]
    if narrow:
        yield (f"{len(narrow)} of {len(function.accesses)} streaming accesses narrower than {WIDE} bytes: "
               + ", ".join(map(str, narrow[:4])) + (", ..." if len(narrow) > 4 else ""))


def percent_wide(functions):
    """The share of streaming accesses that are wide, rounded down: only all of them give 100."""
    wide = [access.width >= WIDE for function in functions for access in function.accesses]
    return f"{math.floor(1000 * sum(wide) / len(wide)) / 10:g}" if wide else "no"


def report(functions, every_kernel=False):
    """Prints the table, the faults and the last line; True where there is no fault.

    `functions` has a list of Functions for each architecture.
    """
    def row(arch, some, what):
        print(f"{arch:>6} {max(f.registers for f in some):9} {sum(f.spilled for f in some):7} "
              f"{max(f.stack for f in some):5} {max(f.shared for f in some):6} "
              f"{sum(len(f.accesses) for f in some):8} {percent_wide(some) + ' %':>8}  {what}")

    print("\nThe most registers, bytes of stack and of static shared memory that a kernel takes; all bytes of spill\n"
          "stores and loads; the global loads and stores in streaming loops, and how many of them move 16 bytes.\n\n"
          "  arch registers spilled stack shared accesses 16 bytes  kernels")
    for arch, some in functions.items():
        roles = [role(f.name) or "unknown" for f in some if f.kernel]
        counts = ", ".join(f"{roles.count(each)} {each}" for each in sorted(set(roles), reverse=True))
        row(arch, some, f"{len(roles)}: {counts}")
        for f in sorted(some, key=lambda f: f.name) if every_kernel else []:
            row("", [f], f.name)

    names = {f.name for some in functions.values() for f in some if f.kernel}
    wrong = [f"{arch:>6} {f.name}: {fault}" for arch, some in functions.items() for f in some for fault in faults(f)]
    wrong += [f"{arch:>6} {name}: not compiled for this architecture, unlike for another"
              for arch, some in functions.items() for name in sorted(names - {f.name for f in some})]
    if len(names) > MOST_KERNELS:
        wrong.append(f"{len(names)} kernels, more than {MOST_KERNELS}: the compile time and the binary grow with each")
    everything = [f for some in functions.values() for f in some]
    print()
    if wrong:
        print(f"{len(wrong)} faults:", *wrong, "", sep="\n")
    print(f"sass: {len(names)} kernels x {len(functions)} architectures, {sum(f.spilled for f in everything)} spilled "
          f"bytes, {percent_wide(everything)} % of streaming accesses 16 bytes wide")
    return not wrong


# ---- Compiling ------------------------------------------------------------------------------------------------------


def read_setup():
    """The globals of setup.py, which finds the toolkit and has the sources, the flags and the architectures."""
    os.environ["FORCE_CUDA"] = "1"
    sys.argv[1:] = ["--name"]  # a command that builds nothing
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return runpy.run_path(str(ROOT / "setup.py"))
    except SystemExit as error:
        if str(error).startswith("FORCE_CUDA=1"):
            sys.exit(f"make sass needs a CUDA toolkit, for which `{sys.executable} -m pip install "
                     f"'cuda-toolkit[nvcc,cccl]'` is enough: {error}")
        raise


def find_nvdisasm(cuda_home):
    nvidia = importlib.util.find_spec("nvidia")  # where pip puts it
    packages = [path for folder in nvidia.submodule_search_locations
                for path in sorted(glob.glob(os.path.join(folder, "cu[0-9]*", "bin")), reverse=True)] if nvidia else []
    folders = [os.path.join(cuda_home, "bin"), *packages, os.environ.get("PATH", "")]
    return shutil.which("nvdisasm", path=os.pathsep.join(folders)) or sys.exit(
        f"make sass needs nvdisasm, which {cuda_home} does not have: "
        f"`{sys.executable} -m pip install nvidia-cuda-nvdisasm` installs it.")


def compile_and_examine(nvcc, nvdisasm, arch, source):
    start = time.monotonic()
    sm = "sm_" + arch.replace(".", "")
    base = ROOT / "build" / "sass" / f"{Path(source).stem}.{sm}"
    _, log = output(*nvcc, "-cubin", f"-arch={sm}", "-Xptxas", "-v", source, "-o", f"{base}.cubin")
    disassembly, _ = output(nvdisasm, "-c", f"{base}.cubin")
    Path(f"{base}.ptxas").write_text(log)
    Path(f"{base}.sass").write_text(disassembly)
    functions = examine(log, disassembly)
    print(f"{source} for {sm}: {time.monotonic() - start:.0f} s", flush=True)
    return functions


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", metavar="9.0", help="this architecture only; may be given again")
    parser.add_argument("--all", action="store_true", help="a line for every kernel, not only for each architecture")
    options = parser.parse_args()

    setup = read_setup()
    torch = setup["cpp_extension"]
    nvcc = [os.path.join(setup["cuda_home"], "bin", "nvcc"), *torch.COMMON_NVCC_FLAGS, *setup["nvcc"],
            *(f"-I{folder}" for folder in setup["include_dirs"] + torch.include_paths())]
    nvdisasm = find_nvdisasm(setup["cuda_home"])
    print(f"nvcc {setup['cuda_version']} in {setup['cuda_home']}, {nvdisasm}", flush=True)
    functions = {arch: [] for arch in options.arch or setup["CUDA_ARCHS"]}
    (ROOT / "build" / "sass").mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or 2)) as pool:
        jobs = {pool.submit(compile_and_examine, nvcc, nvdisasm, arch, source): arch
                for arch in functions for source in setup["CUDA_SOURCES"]}
        try:
            for job in concurrent.futures.as_completed(jobs):
                functions[jobs[job]] += job.result()
        except (OSError, RuntimeError) as error:
            pool.shutdown(cancel_futures=True)
            sys.exit(f"sass: {error}")
    costs = {arch: {f.name: f.cost for f in some if f.cost} for arch, some in functions.items()}
    fast, line = issue_slots.report(costs, options.all)
    sound = report(functions, options.all)
    print(line)
    return 0 if sound and fast else 1


if __name__ == "__main__":
    sys.exit(main())
