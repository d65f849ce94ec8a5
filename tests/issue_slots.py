"""How many instructions a kernel issues for an element, read from its machine code, and whether a GPU can issue as many
while it copies that element's bytes.

`make sass` judges every resident and every streaming kernel by it, float64's and misaligned tensors' (V = 1) apart.

What is counted
  - Every instruction on the way of one turn through a loop that moves vectors takes one issue slot: predicated ones
    that do nothing, uniform ones and address arithmetic too. MUFU operations are counted beside them.
  - A loop moves vectors if it has, itself and not in a loop inside it, an access of 16 bytes: LDGSTS; LDG, STG; LDS,
    STS. (Parameters are read in narrower ones.) What a turn does by its LDGSTS is copy; with an STG it is the phase that
    writes (apply, dx), else the one that reduces (statistics, sums). Its elements are the bytes that the turn stores
    (writing; sums that keep what they compute), loads (reducing) or copies, over those of an element.
  - Of all ways through the loop the main one is, in this order of importance, the one that writes most, that loads most
    from shared memory, that uses most of what it has loaded and exponentiated, that keeps and copies most, that
    exponentiates most, and that issues fewest instructions. So all vectors of a batch are there, the activation is on,
    and dropout, shortcuts, biases' gradients and the step from unit to unit, if they are branches, are off. That a way
    uses what it loads keeps two branches that always go together from being taken apart.
  - A loop inside a loop: if it moves vectors it is a phase of its own, and passing it costs its outer loop nothing;
    else, with a loop that does inside of it or not, the outer one pays for one turn. A subroutine costs its shortest
    way.
  - Of several loops of one phase that one counts which loads most of an element from shared memory (what is not kept on
    the chip comes from global memory, and is named apart), then exponentiates most an element, then keeps most, then
    does most in a turn (others take what is left over), and then is the cheapest. A loop that reduces computes
    something: at least one floating-point operation an element.
  - A copying loop exists several times: before the first item, while waiting, and in the loop that writes. They are
    grouped by the loop that they are in, and of each group the one counts that does most in a turn; of these the
    dearest. What a turn of another phase copies by the way is not counted twice.
  - A kernel's cost is the sum of its phases: each element goes through each once.
What is not counted: what runs once a unit or an item (prologues, reductions among threads, parameters, exchanges), what
registers hold across an item (no loop has it), waiting, bank conflicts, and that pipes narrower than the issue, those
of integers and conversions above all, can be full before it is.

A basic block that holds a single exponential is a chain of dependent instructions that nothing overlaps: on a main way
it is a fault.
"""

import json
import math
import re
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from disassembly import Flow

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from benchmarks.devices import DEVICES  # noqa: E402

# ---- The limits -----------------------------------------------------------------------------------------------------

ARCH = "9.0"  # they are this architecture's; others are printed only


@dataclass(frozen=True)
class Limit:
    """Of an element, compared as printed, to a tenth: the one reciprocal of a batch of statistics is 0.03."""
    instructions: float
    mufu: float


LIMITS = {"forward": Limit(18, 2), "backward": Limit(30, 2)}
# The kernels that bfloat16 workloads reach: all of benchmarks/workloads.json, as the plan for an H200 has them.
LIMITED = {f"resident_{direction}<BFloat16, BFloat16, 8, {columns}, {grid}>": direction
           for direction in LIMITS for columns in ("false", "true") for grid in ("false", "true")}

# ---- What is known of kernels ---------------------------------------------------------------------------------------

SIZES = {"BFloat16": 2, "Half": 2, "float": 4}


@dataclass(frozen=True)
class Tensors:
    """What an element is, and what the phases are named. Bytes an element, 0 for what the kernel does not do."""
    loaded: int  # by a phase that reduces, or by a copy
    stored: int  # by a phase that writes
    kept: int  # by a phase that reduces, in place of what it has loaded
    moved: int  # of all tensors, at the least
    phases: tuple  # all that the kernel must have
    reduce: str = ""
    write: str = ""


def tensors_of(name):
    """The Tensors of a kernel; None for one that is not judged."""
    match = re.fullmatch(r"(\w+)<(\w+)(?:, (\w+))?, (\d+)(?:, (?:true|false)){0,2}>", name)
    if not match or match[4] == "1" or match[2] not in SIZES:
        return None
    base, x, y = match[1], SIZES[match[2]], SIZES[match[3] or match[2]]
    if base == "resident_forward":
        return Tensors(x, y, 0, x + y, ("copy", "statistics", "apply"), "statistics", "apply")
    if base == "resident_backward":
        return Tensors(x + y, x, y, 2 * x + y, ("copy", "sums", "dx"), "sums", "dx")
    streaming = {
        "statistics": Tensors(x, 0, 0, x, ("statistics",), "statistics"),
        "apply": Tensors(x, y, 0, x + y, ("apply",), "", "apply"),
        "sums": Tensors(x + y, 0, 0, x + y, ("sums",), "sums"),
        "input_gradient": Tensors(x + y, x, 0, 2 * x + y, ("dx",), "", "dx"),
        "residual": Tensors(2 * x, x, 0, 3 * x, ("residual",), "", "residual"),
        "channel_sums": Tensors(x, 0, 0, x, ("sums",), "sums"),
    }
    return streaming.get(re.sub("_(rows|columns)$", "", base))


# ---- The way through a loop -----------------------------------------------------------------------------------------

WIDE = 16  # bytes
PAIRS = ("FADD2", "FMUL2", "FFMA2")  # of registers
FLOATS = {"FADD": 1, "FMUL": 1, "FFMA": 1, "FMNMX": 1, "HADD2": 2, "HMUL2": 2, "HFMA2": 2,  # operations each
          **dict.fromkeys(PAIRS, 2)}


def registers(instruction):
    """The numbers of those that it writes and of those that it reads; of a vector all, of a pair both where it shows."""
    parts = instruction.opcode.split(".")
    width = 4 if "128" in parts else 2 if {"64", "WIDE", "F64"} & set(parts) or parts[0] in PAIRS else 1
    operands = [each.strip() for each in instruction.operands.split(",")]
    numbers = [[int(number) for number in re.findall(r"\bR(\d+)", each)] for each in operands]
    written = set()
    if instruction.kind in ("STG", "STS", "ST"):
        numbers[-1] = [number + i for number in numbers[-1] for i in range(width)]
    elif "SETP" not in instruction.kind:
        first = 1 if re.match(r"U?P[\dT]", operands[0]) and len(operands) > 1 else 0
        if re.match(r"R\d", operands[first]):
            written = {numbers[first][0] + i for i in range(width)}
            numbers[first] = []
    return written, {number for some in numbers for number in some}


@dataclass
class Way:
    """One turn through a loop."""
    loop: object
    parent: object  # the loop around it
    indices: list  # of its instructions, in their order
    bytes: dict  # moved in accesses of 16 bytes, by kind of instruction
    instructions: int
    mufu: int
    exponentials: int
    floats: int
    phase: str = ""
    elements: float = 0

    def an_element(self, what):
        return getattr(self, what) / self.elements

    def of(self, kind):
        return self.bytes.get(kind, 0)


@dataclass
class Label:
    """The best way so far to a block, of those that use the same."""
    moved: tuple  # what counts more than what is used
    used: int  # a bit for each register that was loaded or exponentiated
    rest: tuple  # what counts less
    block: int
    before: object

    @property
    def rank(self):
        return self.moved, bin(self.used).count("1"), self.rest


MOST_LABELS = 200  # of a block; more are met only where registers hold vectors, outside of the loops that are judged


class Kernel:
    def __init__(self, code):
        self.code, self.flow = code, Flow(code)

    @cached_property
    def wide(self):
        """{index: bytes} of the accesses of 16 bytes."""
        return {i: each.width for i, each in enumerate(self.code.instructions)
                if each.kind in ("LDGSTS", "LDG", "STG", "LDS", "STS") and each.width >= WIDE}

    def bytes(self, indices):
        found = defaultdict(int)
        for i in indices:
            if i in self.wide:
                found[self.code.instructions[i].kind] += self.wide[i]
        return found

    @cached_property
    def registers(self):
        return [registers(each) for each in self.code.instructions]

    @cached_property
    def exponential(self):
        return [re.match(r"MUFU\.(EX2|TANH)", each.opcode) is not None for each in self.code.instructions]

    @cached_property
    def arithmetic(self):
        """Floating-point operations of each instruction; 0 for one that only unpacks, as HADD2.F32 R1, -RZ, R2.H0_H0
        does."""
        return [each.kind == "MUFU" or FLOATS.get(each.kind, 0) * ("RZ," not in each.operands)
                for each in self.code.instructions]

    def run_of(self, i):
        """i, and the shortest way through the subroutine that it calls."""
        start = self.flow.called(i)
        if start is None:
            return [i]
        before, todo = {start: None}, [start]
        for j in todo:
            if self.code.instructions[j].kind == "RET":
                way = [j]
                while before[way[-1]] is not None:
                    way.append(before[way[-1]])
                return [i, *reversed(way)]
            for k in self.flow.after[j]:
                if k not in before:
                    before[k] = j
                    todo.append(k)
        raise ValueError(f"the subroutine that {self.code.instructions[i]} calls does not return")

    def uses(self, loop, loads):
        """{index: bits} of the instructions that compute with what one of the loop's wide `loads` or exponentials
        has left in a register, a bit for each of these registers; unpacked or moved before, and in the next turn too.
        """
        found, bits = defaultdict(int), {}
        for i in sorted(loop.own):
            if self.exponential[i] or i in self.wide and self.code.instructions[i].kind in loads:
                bits[i] = {each: 1 << sum(map(len, bits.values())) + k for k, each in enumerate(self.registers[i][0])}
        blocks = self.flow.blocks(loop.body)
        held = {block: defaultdict(int) for block in blocks}  # {register: bits of what it comes from} at its start
        todo = sorted(blocks, reverse=True)
        while todo:
            block = todo.pop()
            now = held[block].copy()
            for i in blocks[block]:
                written, read = self.registers[i]
                carried = 0
                for register in read:
                    carried |= now[register]
                if self.arithmetic[i]:
                    found[i] |= carried
                    carried = 0
                for register in written:
                    kept = now[register] if self.code.instructions[i].predicate else 0
                    now[register] = bits.get(i, {}).get(register, carried) | kept
            for target in self.flow.after[blocks[block][-1]]:
                if target not in blocks:
                    continue
                more = [(register, some) for register, some in now.items() if some & ~held[target][register]]
                for register, some in more:
                    held[target][register] |= some
                if more and target not in todo:
                    todo.append(target)
        return found

    def turn(self, loop):
        """The indices of the main way."""
        head, inner = min(((entry, loop.inner if len(loop.entries) == 1 else self.flow.loops(loop.body - {entry}))
                           for entry in sorted(loop.entries)), key=lambda pair: sum(len(each.body) for each in pair[1]))
        basic = self.flow.blocks(loop.body)
        runs = {block: [j for i in indices for j in self.run_of(i)] for block, indices in basic.items()}
        blocks = {i: block for block, indices in basic.items() for i in indices}
        copied = {}
        for each in inner:  # is passed like a block
            place = min(each.body)
            for i in each.body:
                runs.pop(blocks[i], None)
                blocks[i] = place
            runs[place] = [] if self.bytes(each.own) else self.turn(each)
            copied[place] = self.bytes(each.body)["LDGSTS"]
        edges = {block: set() for block in runs}
        for i in loop.body:
            edges[blocks[i]] |= {blocks[j] for j in self.flow.after[i] if j in loop.body and blocks[j] != blocks[i]}
        order = self.order(head, edges)
        last = {blocks[i] for i in self.flow.before[head] if i in loop.body}

        own = self.bytes(loop.own)
        from_memory = not (own["STG"] or own["LDS"])
        uses = self.uses(loop, ("LDS", "LDG") if from_memory else ("LDS",))

        values = {}  # what each block adds to a label
        for block, run in runs.items():
            moved, used = self.bytes(run), 0
            for i in run:
                used |= uses[i]
            values[block] = ((moved["STG"], moved["LDS"], from_memory * moved["LDG"]), used,
                             (moved["STS"], moved["LDGSTS"] + copied.get(block, 0),
                              sum(self.exponential[i] for i in run), -len(run)))

        def follow(before, block):
            moved, used, rest = values[block]
            return Label(tuple(map(sum, zip(before.moved, moved))), before.used | used,
                         tuple(map(sum, zip(before.rest, rest))), block, before)

        labels = defaultdict(list, {head: [Label(*values[head], head, None)]})
        for block in order:
            labels[block] = self.best(labels[block])
            for target in edges[block] - {head}:
                labels[target] += [follow(label, target) for label in labels[block]]
        label = max((label for block in last for label in labels[block]), key=lambda label: label.rank)
        way = []
        while label:
            way.append(label.block)
            label = label.before
        return [i for block in reversed(way) for i in runs[block]]

    @staticmethod
    def best(labels):
        """Those that no other is better than, whatever follows."""
        most = max(label.moved for label in labels)
        found = []
        for label in sorted((each for each in labels if each.moved == most), key=lambda each: each.rank, reverse=True):
            if not any(label.used | other.used == other.used and other.rest >= label.rest for other in found):
                found.append(label)
        return found[:MOST_LABELS]

    def order(self, head, edges):
        """The blocks of a loop, each behind all that lead to it."""
        found, state = [], {head}
        todo = [(head, iter(edges[head]))]
        while todo:
            block, targets = todo[-1]
            target = next((each for each in targets if each not in state), None)
            if target is None:
                found.append(block)
                todo.pop()
            else:
                state.add(target)
                todo.append((target, iter(edges[target])))
        return found[::-1]

    def ways(self):
        """The main ways of all loops that move vectors."""
        def walk(loops, parent):
            for loop in loops:
                if self.bytes(loop.own):
                    indices = self.turn(loop)
                    yield Way(loop, parent, indices, self.bytes(indices), len(indices),
                              sum(self.code.instructions[i].kind == "MUFU" for i in indices),
                              sum(self.exponential[i] for i in indices), sum(self.arithmetic[i] for i in indices))
                yield from walk(loop.inner, loop)

        return list(walk(self.flow.loops(), None))

    def lone(self, way):
        """The exponentials of a way that are the only one of their basic block."""
        found = [[i for i in indices if self.exponential[i]]
                 for indices in self.flow.blocks(set(way.indices)).values()]
        return [self.code.instructions[some[0]] for some in found if len(some) == 1]


# ---- The phases of a kernel -----------------------------------------------------------------------------------------


@dataclass
class Cost:
    """Of an element."""
    tensors: Tensors
    phases: dict = field(default_factory=dict)  # {name: Phase}
    again: dict = field(default_factory=dict)  # the same of what is not kept on the chip
    lone: list = field(default_factory=list)  # exponentials on main ways that are alone in their basic block
    unread: str = ""  # why the disassembly could not be followed

    @property
    def instructions(self):
        return sum(phase.instructions for phase in self.phases.values())

    @property
    def mufu(self):
        return sum(phase.mufu for phase in self.phases.values())


@dataclass(frozen=True)
class Phase:
    """Of an element, but for the last two."""
    instructions: float
    mufu: float
    exponentials: float
    elements: float  # of one turn
    loop: str  # the address of the loop's first instruction


def enter_phase(way, tensors, asynchronous):
    """Sets what a way does and of how many elements; none for one that moves nothing of the tensors."""
    loaded = way.of("LDS") or way.of("LDG")
    # An architecture without asynchronous copies loads and stores.
    copied = way.of("LDGSTS") if asynchronous else 0 if way.of("LDS") else way.of("STS")
    if way.of("STG") and tensors.stored:
        way.phase, way.elements = tensors.write, way.of("STG") / tensors.stored
    elif loaded and (asynchronous or not copied):
        kept = way.of("STS") / tensors.kept if tensors.kept else 0
        way.phase, way.elements = tensors.reduce, kept or loaded / tensors.loaded
        if way.floats < way.elements:
            way.phase = ""
    elif copied:
        way.phase, way.elements = "copy", copied / tensors.loaded


def cost_of(name, code):
    """The Cost of a kernel; None for one that is not judged."""
    tensors = tensors_of(name)
    if not tensors:
        return None
    cost = Cost(tensors)
    try:
        kernel = Kernel(code)
        ways = kernel.ways()
    except ValueError as error:
        cost.unread = str(error)
        return cost
    asynchronous = any(each.kind == "LDGSTS" for each in code.instructions)
    for way in ways:
        enter_phase(way, tensors, asynchronous)

    def phase_of(way, share=1.0):
        return Phase(share * way.an_element("instructions"), share * way.an_element("mufu"),
                     share * way.an_element("exponentials"), way.elements,
                     code.instructions[min(way.loop.body)].address)

    def from_shared(way):
        return min(way.of("LDS") / way.elements, tensors.loaded)

    chosen = {}
    for phase in (tensors.reduce, tensors.write):
        found = [way for way in ways if phase and way.phase == phase]
        found.sort(key=lambda way: (-from_shared(way), -way.an_element("exponentials"), -way.of("STS") / way.elements,
                                    -way.elements, way.an_element("instructions")))
        if found:
            chosen[phase] = found[0]
        again = [way for way in found if way.of("LDG") and from_shared(way) < from_shared(found[0])
                 and not any(other.loop.body < way.loop.body for other in found)]
        if again:
            cost.again[phase] = phase_of(again[0])

    # What a turn of another phase copies by the way needs no loop of its own.
    alone = 1 - sum(way.of("LDGSTS") / tensors.loaded / way.elements for way in chosen.values())
    copies = defaultdict(list)
    for way in ways:
        if way.phase == "copy":
            copies[id(way.parent)].append(way)
    others = {id(way.loop) for way in ways if way.phase not in ("", "copy")} - {id(way.loop) for way in chosen.values()}
    copies = [min(some, key=lambda way: (-way.elements, way.an_element("instructions")))
              for parent, some in copies.items() if parent not in others]
    if alone < 1:
        cost.phases["copy"] = Phase(0, 0, 0, 0, "")
    if copies and alone > 0:
        dearest = max(copies, key=lambda way: way.an_element("instructions"))
        cost.phases["copy"] = phase_of(dearest, alone)
    for phase, way in chosen.items():
        cost.phases[phase] = phase_of(way)
        cost.lone += kernel.lone(way)
    return cost


# ---- The verdict ----------------------------------------------------------------------------------------------------


def faults(name, cost):
    """What is wrong with a kernel, in words."""
    if cost.unread:
        yield f"its instructions an element are not known: {cost.unread}"
        return
    missing = [phase for phase in cost.tensors.phases if phase not in cost.phases]
    if missing:
        yield f"its instructions an element are not known: no loop found for {', '.join(missing)}"
    if cost.lone:
        yield (f"{len(cost.lone)} exponentials on main ways are alone in their basic block, the first one is "
               f"{cost.lone[0]}")
    limit = LIMITS.get(LIMITED.get(name))
    for what in ("instructions", "mufu") if limit else ():
        found, most = round(getattr(cost, what), 1), getattr(limit, what)
        if found > most:
            yield f"{found:g} {'MUFU operations' if what == 'mufu' else what} an element, where {most:g} are the limit"


def row(name, cost):
    phases = " + ".join(f"{phase} {cost.phases[phase].instructions:.1f}" if phase in cost.phases else f"{phase} ?"
                        for phase in cost.tensors.phases)
    again = ", ".join(f"{phase} {some.instructions:.1f}" for phase, some in cost.again.items())
    print(f"       {cost.instructions:12.1f} {cost.mufu:5.2f} {len(cost.lone):6}  {name}: {phases}"
          + (f"; not kept: {again}" if again else "") + (f"; {cost.unread}" if cost.unread else ""))


def report(costs, every_kernel=False):
    """Prints the table and the faults; whether there is no fault, and the last line.

    `costs`: {architecture: {name: Cost}}. Without every_kernel only those that have a limit get a line.
    """
    print("\nInstructions and MUFU operations an element, on the main ways through the loops that move vectors, and how\n"
          "many exponentials there are alone in their basic block. With a limit: " + ", ".join(
              f"{direction} {limit.instructions:g} and {limit.mufu:g}" for direction, limit in LIMITS.items())
          + f", on {ARCH}.\n\n  arch instructions  MUFU  alone  kernel: phases")
    for arch, some in costs.items():
        print(f"{arch:>6}")
        for name in sorted(some):
            if every_kernel or name in LIMITED:
                row(name, some[name])

    judged = costs.get(ARCH)
    if judged is None:
        return True, f"issue: nothing judged, for {ARCH} was not compiled"
    wrong = [f"{name}: {fault}" for name, cost in judged.items() for fault in faults(name, cost)]
    wrong += [f"{name}: not compiled, or not known to tests/issue_slots.py" for name in LIMITED if name not in judged]
    worst = {direction: {what: max((getattr(judged[name], what) for name, of in LIMITED.items()
                                    if of == direction and name in judged), default=math.inf)
                         for what in ("instructions", "mufu")} for direction in LIMITS}
    moved = {direction: tensors_of(next(name for name, of in LIMITED.items() if of == direction)).moved
             for direction in LIMITS}
    print(f"\nThe share of the issue slots and of the MUFU unit that {ARCH}'s worst of them takes at copy bandwidth:\n\n"
          "              TB/s   forward   MUFU   backward   MUFU")
    shares = {}
    for gpu in DEVICES.values():
        shares[gpu.name] = [f"{100 * share(worst[direction][what], moved[direction]):.0f} %" for direction in LIMITS
                            for what, share in (("instructions", gpu.issue_share), ("mufu", gpu.mufu_share))]
        print("  {:10} {:6.2f} {:>9} {:>6} {:>10} {:>6}".format(gpu.name, gpu.copy_bytes_per_second / 1e12,
                                                               *shares[gpu.name]))
    if wrong:
        print(f"\n{len(wrong)} faults:", *wrong, sep="\n")
    forward, backward = (f"{worst[direction]['instructions']:.1f}" for direction in LIMITS)
    return not wrong, (f"issue: forward worst {forward} instructions an element, backward worst {backward}; " + ", ".join(
        f"{name} {shares[name][0]} / {shares[name][2]}" for name in ("H100", "H200"))
        + " of the issue slots at copy bandwidth")


def write(costs, path):
    """Leaves {kernel: {phase: Phase}} for the time model; a phase "..., not kept" comes in place of the other."""
    path.write_text(json.dumps({name: {
        **{phase: asdict(some) for phase, some in cost.phases.items()},
        **{f"{phase}, not kept": asdict(some) for phase, some in cost.again.items()}} for name, cost in costs.items()},
        indent=1))
