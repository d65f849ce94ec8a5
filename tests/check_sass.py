"""What nvcc makes of the CUDA kernels: registers, spills, stack, and the width of their global loads and stores.

`make sass` compiles every kernel for every architecture of setup.py, which takes a CUDA toolkit and no GPU, and reads
what ptxas says of it and its disassembly. It fails (status 1) on
  - a spill or a stack frame, in any kernel: local memory is traffic that no plan predicts;
  - a global access of less than 16 bytes in a streaming loop: instructions are then the limit, where memory should be;
  - a kernel that the table below does not know, or a streaming one without a loop to judge: not looking is no passing.
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

ROOT = Path(__file__).resolve().parent.parent

# ---- The kernels: a new one is entered here -------------------------------------------------------------------------

# Those that go over a whole tensor. Their last template argument is V, the elements of a vector. V = 1 is for tensors
# that are not aligned, or whose rows are no multiple of 16 bytes, and is narrow for that reason. V > 1 is planned only
# where every vector is whole: none of its loops has a reason for a narrow access, and the one that takes what an
# unrolled loop leaves over is judged like it.
STREAMING = r"(statistics|sums|(?P<writes>apply|input_gradient))_(rows|columns)"
# Those that see only partial results and parameters.
SMALL = r"merge_statistics|merge_sums|parameter_gradients"

WIDE = 16  # bytes


def role(name):
    """"streaming", "misaligned" (V = 1) or "small"; None for a kernel that is not in the table."""
    base, _, arguments = name.partition("<")
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
    accesses: list = field(default_factory=list)  # Instructions: a streaming kernel's, in its streaming loops
    unread: str = ""  # why the disassembly could not be followed


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


@dataclass
class Instruction:
    address: str
    predicate: str
    opcode: str  # with what it is modified by, as in LDG.E.128
    operands: str

    def __str__(self):
        return f"{self.opcode} at {self.address}"

    @property
    def kind(self):
        return self.opcode.split(".")[0]

    @property
    def is_access(self):
        """Of global memory, or (LD, ST) of memory that may be global."""
        return self.kind in ("LDG", "STG", "LD", "ST", "LDGSTS")

    @property
    def width(self):
        """Bytes that a thread moves. A size is a part of the opcode of its own: LTC128B is a hint for the L2 cache."""
        sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
        return next((sizes[part] for part in self.opcode.split(".") if part in sizes), 4)


@dataclass
class Code:
    """A function, and behind it the subroutines that ptxas gave it."""
    instructions: list = field(default_factory=list)
    labels: dict = field(default_factory=dict)  # index of the instruction behind each


def parse_sass(disassembly):
    """{mangled name: Code} of what `nvdisasm -c` prints."""
    functions, code = {}, Code()
    for line in disassembly.splitlines():
        if m := re.match(r"\.text\.(.+):$", line):
            code = functions[m[1]] = Code()
        elif m := re.match(r"([.$\w]+):$", line):
            code.labels[m[1]] = len(code.instructions)
        elif m := re.match(r"\s+/\*([0-9a-f]+)\*/\s+(@\S+\s)?\s*([A-Z]\S*)\s*([^;]*);", line):
            code.instructions.append(Instruction("0x" + m[1], m[2] or "", m[3], m[4]))
    return functions


def successors(code):
    """For each instruction, the indices of those that can run next; of a call, of the one that it returns to.

    BSSY and BSYNC need no thought: the label at which threads meet again is right behind BSYNC.
    """
    result = []
    for i, instruction in enumerate(code.instructions):
        targets, goes_on = [], True
        if instruction.kind == "CALL":
            # Subroutines have names. Of a mere label it is how code for sm_80 to sm_89 leaves a loop, for good.
            targets = [code.labels[label] for label in re.findall(r"\.L\w+", instruction.operands)]
        elif instruction.kind in ("EXIT", "RET"):
            goes_on = bool(instruction.predicate)
        elif instruction.kind in ("BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU"):
            targets = [code.labels[label] for label in re.findall(r"\.L\w+", instruction.operands)]
            if not targets:
                raise ValueError(f"the disassembly does not say where {instruction} goes")
            # Conditional by a predicate before it, by one among its operands, or where threads diverge (BRA.DIV).
            goes_on = bool(instruction.predicate or re.match(r"!?U?P\d", instruction.operands)
                           or ".DIV" in instruction.opcode)
        result.append(targets + [i + 1] * (goes_on and i + 1 < len(code.instructions)))
    return result


def reachable(start, edges, within):
    """What can be reached from `start` in one step or more; `start` itself only if a cycle leads back to it."""
    seen, todo = set(), [start]
    while todo:
        for i in edges[todo.pop()]:
            if i in within and i not in seen:
                seen.add(i)
                todo.append(i)
    return seen


def streaming_loops(code):
    """The global accesses of each loop that has some, and encloses no other that has some.

    Only innermost loops run once a vector. What a loop does around them runs once a unit of work, and may be narrow, as
    a load of a channel's parameters is. So may a loop that puts parameters into shared memory: it stores there, and no
    access of it is wide. A subroutine that a loop calls is part of it.
    """
    after = successors(code)
    before = [[] for _ in after]
    for i, targets in enumerate(after):
        for j in targets:
            before[j].append(i)
    everything = set(range(len(after)))

    def cycles(within):
        """Disjoint: the largest sets of instructions that can all run again after each other."""
        found = []
        for head in sorted({j for i in within for j in after[i] if j <= i}):  # somewhere each cycle goes back
            if head in within and not any(head in cycle for cycle in found):
                cycle = reachable(head, after, within) & reachable(head, before, within)
                found += [cycle] if cycle else []
        return found

    def accesses(loop):
        loop, todo = set(loop), list(loop)
        while todo:
            call = code.instructions[todo.pop()]
            if call.kind == "CALL" and "`(.L" not in call.operands:
                label = re.search(r"`\((.+?)\)", call.operands)
                if not label or label[1] not in code.labels:
                    raise ValueError(f"a loop calls code that is elsewhere: {call}")
                start = code.labels[label[1]]
                subroutine = {start} | reachable(start, after, everything)
                todo += subroutine - loop
                loop |= subroutine
        found = [code.instructions[i] for i in sorted(loop) if code.instructions[i].is_access]
        shares = any(code.instructions[i].kind == "STS" for i in loop)
        return [] if shares and all(access.width < WIDE for access in found) else found

    def innermost(within):
        for loop in cycles(within):
            entries = {i for i in loop if set(before[i]) - loop} or {min(loop)}
            inner = list(innermost(loop - entries))  # without its entry a loop does not run again, loops in it do
            own = accesses(loop)
            yield from inner or ([own] if own else [])

    return list(innermost(everything))


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
        if function.kernel and role(function.name) == "streaming":
            try:
                function.accesses = [access for loop in streaming_loops(codes[function.mangled]) for access in loop]
            except ValueError as error:
                function.unread = str(error)
    return list(functions.values())


def faults(function):
    """What is wrong with a function, in words."""
    if function.spilled:
        yield f"{function.spilled} bytes spilled"
    if function.stack:
        yield f"a stack frame of {function.stack} bytes"
    if function.kernel and not role(function.name):
        yield "named neither in STREAMING nor in SMALL of tests/check_sass.py"
    if function.kernel and role(function.name) == "streaming":
        judged = {access.kind[:2] for access in function.accesses}
        writes = re.match(STREAMING, function.name)["writes"]
        for kind, name, there in (("LD", "load", True), ("ST", "store", writes)):
            if there and kind not in judged:
                yield f"no {name} judged: {function.unread or f'it has no loop with a global {name}'}"
    narrow = [access for access in function.accesses if access.width < WIDE]
    if narrow:
        yield (f"{len(narrow)} of {len(function.accesses)} streaming accesses narrower than {WIDE} bytes: "
               + ", ".join(map(str, narrow[:4])) + (", ..." if len(narrow) > 4 else ""))


def percent_wide(functions):
    """Of the streaming accesses, rounded down: 100 is said of all only."""
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
    return 0 if report(functions, options.all) else 1


if __name__ == "__main__":
    sys.exit(main())
