"""The main way through a loop that moves vectors: what most of its turns do, found in the control-flow graph.

A loop moves vectors if it has, itself and not in a loop inside it, an access of 16 bytes: LDGSTS; LDG, STG; LDS, STS.
Of all ways through it the main one is, in this order of importance, the one that
  - writes most, and loads most from shared memory (from global memory, if the loop does neither);
  - uses most of what it has loaded and exponentiated, so that two branches that always go together are not taken apart;
  - keeps most (STS), copies most (LDGSTS, in loops inside it too) and exponentiates most;
  - issues fewest instructions.
So all vectors of a batch are there, the activation is on, and dropout, shortcuts, biases' gradients and the step from
unit to unit are off, if they are branches.

A loop inside it that moves vectors is looked at for itself, and passing it costs the outer one nothing. Any other one
costs the outer one a turn, also if there is a loop in it that moves vectors. A subroutine costs its shortest way.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

from tools.disassembly import Flow

WIDE = 16  # bytes
PAIRS = ("FADD2", "FMUL2", "FFMA2")  # of registers
FLOATS = {"FADD": 1, "FMUL": 1, "FFMA": 1, "FMNMX": 1, "HADD2": 2, "HMUL2": 2, "HFMA2": 2,  # operations each
          **dict.fromkeys(PAIRS, 2)}


def registers(instruction):
    """The numbers of the registers that an instruction writes, and of those that it reads.

    Of a vector these are all; of a pair both, where the instruction shows that it is one.
    """
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


MOST_LABELS = 200  # of a block; it has more only where registers hold vectors, in no loop that is judged


class Kernel:
    """Finds the main ways of a kernel's loops."""

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
