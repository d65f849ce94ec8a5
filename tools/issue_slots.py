"""How many instructions a kernel issues for an element, read from its machine code, and whether a GPU can issue as many
while it copies that element's bytes.

`make sass` judges every resident and every streaming kernel by it, float64's and misaligned tensors' (V = 1) apart.

What is counted
  - Every instruction on the main way of a turn through a loop that moves vectors takes an issue slot: predicated ones
    that do nothing, uniform ones and address arithmetic too. MUFU operations are counted beside them.
  - A turn with an STG of 16 bytes is of the phase that writes (apply, dx), else one with an LDS or LDG of the one that
    reduces (statistics, sums), else one with an LDGSTS of copy. Its elements are the bytes that it stores (writing, or
    keeping what sums have computed), loads (reducing) or copies, over those of an element.
  - main_way.py says which way through a loop is the main one, and what it does with loops inside it.
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

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field

from tools.devices import DEVICES
from tools.main_way import Kernel

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


# ---- The phases of a kernel -----------------------------------------------------------------------------------------


@dataclass
class Cost:
    """What a kernel issues for an element, by its phases."""
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
    """What one phase issues for an element; the last two fields are of its loop."""
    instructions: float
    mufu: float
    exponentials: float
    elements: float  # of one turn
    loop: str  # the address of the loop's first instruction


def enter_phase(way, tensors, asynchronous):
    """Sets which phase a way belongs to and how many elements it moves: none where it moves nothing of the tensors."""
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
    limits = ", ".join(f"{direction} {limit.instructions:g} and {limit.mufu:g}" for direction, limit in LIMITS.items())
    print("\nInstructions and MUFU operations an element, on main ways of loops that move vectors, and how many\n"
          f"exponentials are alone in their basic block. The limits on {ARCH}: {limits}.\n\n"
          "  arch instructions  MUFU  alone  kernel: phases")
    for arch, some in costs.items():
        print(f"{arch:>6}")
        for name in sorted(some):
            if every_kernel or name in LIMITED:
                row(name, some[name])

    judged = costs.get(ARCH)
    if judged is None:
        return True, f"issue: nothing judged, for {ARCH} was not compiled"
    wrong = [f"{name}: {fault}" for name, cost in judged.items() for fault in faults(name, cost)]
    wrong += [f"{name}: not compiled, or not known to tools/issue_slots.py" for name in LIMITED if name not in judged]
    worst = {direction: {what: max((getattr(judged[name], what) for name, of in LIMITED.items()
                                    if of == direction and name in judged), default=math.inf)
                         for what in ("instructions", "mufu")} for direction in LIMITS}
    moved = {direction: tensors_of(next(name for name, of in LIMITED.items() if of == direction)).moved
             for direction in LIMITS}
    print(f"\nThe share of the issue slots and of the MUFU unit that {ARCH}'s worst ones take at copy bandwidth:\n\n"
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
    on = ", ".join(f"{name} {shares[name][0]} / {shares[name][2]}" for name in ("H100", "H200"))
    return not wrong, (f"issue: forward worst {forward} instructions an element, backward worst {backward}; "
                       f"{on} of the issue slots at copy bandwidth")
