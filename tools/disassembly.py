"""What nvdisasm prints of a kernel: its instructions, and what runs after what."""

import re
from dataclasses import dataclass, field


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


@dataclass
class Loop:
    body: set  # indices of instructions
    entries: set  # those of them that can run next from outside
    inner: list  # the Loops in it

    @property
    def own(self):
        return self.body.difference(*(loop.body for loop in self.inner))


class Flow:
    """What runs after what in a function."""

    def __init__(self, code):
        self.code, self.after = code, successors(code)
        self.before = [[] for _ in self.after]
        for i, targets in enumerate(self.after):
            for j in targets:
                self.before[j].append(i)
        self.everything = set(range(len(self.after)))

    def cycles(self, within):
        """The largest sets of instructions that can all run again after each other. They are disjoint."""
        found = []
        for head in sorted({j for i in within for j in self.after[i] if j <= i}):  # somewhere each cycle goes back
            if head in within and not any(head in cycle for cycle in found):
                cycle = reachable(head, self.after, within) & reachable(head, self.before, within)
                found += [cycle] if cycle else []
        return found

    def loops(self, within=None):
        """The outermost loops."""
        found = []
        for body in self.cycles(self.everything if within is None else within):
            entries = {i for i in body if set(self.before[i]) - body} or {min(body)}
            inner = self.loops(body - entries)  # without its entry it does not run again, others do
            found.append(Loop(body, entries, inner))
        return found

    def blocks(self, within):
        """{its first index: the indices of a basic block}: what runs one after the other and not otherwise."""
        found, first = {}, None
        for i in sorted(within):
            if first is None or i - 1 not in within or self.before[i] != [i - 1] or self.after[i - 1] != [i]:
                first = i
            found.setdefault(first, []).append(i)
        return found

    def called(self, i):
        """The index at which the subroutine starts that instruction i calls; None if it calls none."""
        call = self.code.instructions[i]
        if call.kind != "CALL" or "`(.L" in call.operands:
            return None
        label = re.search(r"`\((.+?)\)", call.operands)
        if not label or label[1] not in self.code.labels:
            raise ValueError(f"a loop calls code that is elsewhere: {call}")
        return self.code.labels[label[1]]

    def accesses(self, instructions):
        """The global ones of these instructions and of the subroutines that they call; whether there are stores to
        shared memory."""
        found, todo = set(instructions), list(instructions)
        while todo:
            start = self.called(todo.pop())
            if start is not None:
                subroutine = {start} | reachable(start, self.after, self.everything)
                todo += subroutine - found
                found |= subroutine
        found = [self.code.instructions[i] for i in sorted(found)]
        return [each for each in found if each.is_access], any(each.kind == "STS" for each in found)
