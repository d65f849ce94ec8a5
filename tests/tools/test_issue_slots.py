"""`make sass` counts what a kernel issues for an element on the main way through its loops, and can fail by it."""

import re
from pathlib import Path

import pytest

from benchmarks import workloads
from tools import check_sass, issue_slots
from tools.devices import DEVICES
from tools.disassembly import parse_sass

ROOT = Path(__file__).resolve().parents[2]

FORWARD, BACKWARD = (f"resident_{direction}<BFloat16, BFloat16, 8, false, true>" for direction in
                     ("forward", "backward"))
VECTOR = 8  # elements


def cost_of(name, *lines):
    """The Cost of a kernel whose code this is: instructions, labels and, as "> label", what jumps to them."""
    text, address = [".text.f:"], 0
    for line in [*lines, "EXIT"]:
        if line.endswith(":"):
            text.append(f".L_{line}" if line[0] != "$" else line)
        else:
            line = re.sub(r"> (\w+)", r"`(.L_\1)", re.sub(r"> (\$\w+)", r"`(\1)", line))
            text.append(f"        /*{address:04x}*/                   {line} ;")
            address += 16
    return issue_slots.cost_of(name, parse_sass("\n".join(text))["f"])


def loop(label, *lines):
    """Runs again while P0."""
    return [f"{label}:", *lines, f"@P0 BRA > {label}"]


def skipped(label, predicate, *lines):
    """Runs unless the predicate."""
    return [f"@{predicate} BRA > {label}", *lines, f"{label}:"]


def load(*registers, opcode="LDS.128"):
    return [f"{opcode} R{r}, [R80]" for r in registers]


def store(*registers, opcode="STG.E.128"):
    return [f"{opcode} [R82], R{r}" for r in registers]


def compute(register, times=2):
    """That often for each element of the vector that begins at this register."""
    return [f"FADD R{90 + i % 4}, R{register + i % 4}, R89" for i in range(times * VECTOR)]


def activate(register):
    return [line for i in range(VECTOR) for line in (f"MUFU.EX2 R{100 + i}, R{register + i % 4}",
                                                     f"MUFU.RCP R{110 + i}, R{100 + i}")]


DROPOUT = ["IMAD R70, R71, R72, R73"] * 5
COPY = loop("copy", "LDGSTS.E.BYPASS.128 [R84], [R86]", "IADD3 R84, R84, R85, RZ")  # 3 instructions, 1 vector
STATISTICS = loop("statistics", *load(4, 8), *compute(4), *compute(8))  # 35 instructions, 2 vectors
APPLY = loop("apply", *load(4, 8), *compute(4, 1), *compute(8, 1),
             *skipped("linear", "P1", *activate(4), *activate(8)),
             *skipped("kept", "P2", *DROPOUT), *store(4, 8))  # without dropout 55 instructions, 2 vectors


def test_an_activation_is_on_the_main_way_and_dropout_is_not():
    apply = cost_of(FORWARD, *APPLY).phases["apply"]
    assert (apply.elements, apply.instructions, apply.mufu, apply.exponentials) == (16, 55 / 16, 2, 1)
    unconditional = [line for line in APPLY if line not in ("@P2 BRA > kept", "kept:")]
    assert cost_of(FORWARD, *unconditional).phases["apply"].instructions == (55 - 1 + len(DROPOUT)) / 16


def test_a_branch_an_element_costs_what_it_issues():
    each = [skipped(f"e{i}", "P1", *activate(4)[2 * i:2 * i + 2]) for i in range(VECTOR)]
    apply = cost_of(FORWARD, *loop("apply", *load(4), *[line for some in each for line in some], *store(4)))
    assert apply.phases["apply"].instructions == (1 + 3 * VECTOR + 1 + 1) / VECTOR


def test_a_kernel_costs_the_sum_of_its_phases():
    cost = cost_of(FORWARD, *COPY, *STATISTICS, *APPLY)
    assert {phase: (some.elements, some.loop) for phase, some in cost.phases.items()} == {
        "copy": (8, "0x0000"), "statistics": (16, "0x0030"), "apply": (16, "0x0260")}
    assert cost.instructions == 3 / 8 + 35 / 16 + 55 / 16 and cost.mufu == 2
    assert list(issue_slots.faults(FORWARD, cost)) == []


def test_of_a_vector_that_may_be_there_or_not_it_is():
    apply = cost_of(FORWARD, *loop("apply", *load(4), *skipped("no1", "P3", *load(8)), *store(4),
                                   *skipped("no2", "P3", *store(8)))).phases["apply"]
    assert (apply.elements, apply.instructions) == (16, 7 / 16)


def test_a_remainder_loop_is_not_the_main_one():
    remainder = loop("rest", *load(4), *compute(4), "IADD3 R1, R1, R2, RZ")
    for lines in (STATISTICS + remainder, remainder + STATISTICS, loop("round", *STATISTICS, *remainder)):
        assert cost_of(FORWARD, *lines).phases["statistics"].instructions == 35 / 16
    # Nor if it is the cheaper one an element.
    cheap = loop("rest", *load(4), *compute(4, 1), "IADD3 R1, R1, R2, RZ")
    assert cost_of(FORWARD, *cheap, *STATISTICS).phases["statistics"].instructions == 35 / 16
    # Nor where it is inside of the other, on a way of its own.
    inside = loop("batch", "@P4 BRA > whole", *remainder, "BRA > end", "whole:", *load(4, 8), *compute(4), *compute(8),
                  "end:")
    assert cost_of(FORWARD, *inside).phases["statistics"].instructions == 36 / 16


def test_a_way_uses_what_it_has_loaded():
    """A batch is whole, or each of its vectors is looked at: a way that takes neither branch does not happen."""
    whole = ["@P4 BRA > some", *compute(4), *compute(8), "BRA > end"]
    some = ["some:", *skipped("no1", "P5", "MUFU.RCP R1, R2", *compute(4)),
            *skipped("no2", "P6", "MUFU.RCP R1, R2", *compute(8)), "end:"]
    statistics = cost_of(FORWARD, *loop("statistics", *load(4, 8), *whole, *some)).phases["statistics"]
    assert (statistics.instructions, statistics.mufu) == ((2 + 2 + 32 + 1) / 16, 0)


@pytest.mark.parametrize("unpack", ["PRMT R{0}, R{1}, 0x7632, R{0}", "HADD2.F32 R{0}, -RZ, R{1}.H0_H0",
                                    "SHF.L.U32 R{0}, R{1}, 0x10, RZ"])
def test_to_unpack_a_vector_is_not_to_use_it(unpack):
    unpacked = [unpack.format(20 + i, 4 + i) for i in range(4)]
    lines = loop("statistics", *load(4), *unpacked, *skipped("no", "P5", *compute(20)), "NOP")
    assert cost_of(FORWARD, *lines).phases["statistics"].instructions == (1 + 4 + 1 + 16 + 2) / 8


def test_a_load_ahead_is_used_in_the_next_turn():
    lines = loop("statistics", *skipped("no", "P5", *compute(4)), "FADD R4, R4, R5", *load(4))
    assert cost_of(FORWARD, *lines).phases["statistics"].instructions == (1 + 16 + 3) / 8


def test_a_copy_in_the_loop_that_writes_is_a_phase_of_its_own():
    """The outer loop pays for what it does around it, and a turn of the inner one is not its own."""
    nested = APPLY[:-1] + ["IMAD R1, R2, R3, R4", *COPY] + APPLY[-1:]
    phases = cost_of(FORWARD, *nested).phases
    assert phases["copy"].instructions == 3 / 8 and phases["apply"].instructions == 56 / 16
    # The outer loop pays for what is around the inner one, a loop too: it is passed once a turn.
    bursts = loop("bursts", "IMAD R1, R2, R3, R4", *COPY, "IMAD R1, R2, R3, R4")
    phases = cost_of(FORWARD, *APPLY[:-1], *bursts, *APPLY[-1:]).phases
    assert phases["copy"].instructions == 3 / 8 and phases["apply"].instructions == 58 / 16
    # What is copied before the first item is another place; the dearer one counts.
    first = loop("first", "LDGSTS.E.BYPASS.128 [R84], [R86]", *["NOP"] * 6)
    assert cost_of(FORWARD, *first, *nested).phases["copy"].instructions == 1
    # In one place the one that does most in a turn, or the cheaper one. That in a remainder's loop does not count.
    pairs = loop("pairs", *["LDGSTS.E.BYPASS.128 [R84], [R86]"] * 2, *["NOP"] * 6)
    assert cost_of(FORWARD, *pairs, *COPY, *APPLY).phases["copy"].instructions == 9 / 16
    assert cost_of(FORWARD, *first, *COPY, *APPLY).phases["copy"].instructions == 3 / 8
    rest = loop("rest", *load(4), *compute(4), *activate(4), *first, *store(4))
    assert cost_of(FORWARD, *COPY, *APPLY, *rest).phases["copy"].instructions == 3 / 8


def test_a_copy_by_the_way_is_not_counted_twice():
    half = APPLY[:-1] + ["LDGSTS.E.BYPASS.128 [R84], [R86]"] + APPLY[-1:]
    phases = cost_of(FORWARD, *COPY, *half).phases
    assert phases["apply"].instructions == 56 / 16 and phases["copy"].instructions == 3 / 8 / 2
    whole = APPLY[:-1] + ["LDGSTS.E.BYPASS.128 [R84], [R86]"] * 2 + APPLY[-1:]
    assert cost_of(FORWARD, *COPY, *whole).phases["copy"].instructions == 0


def test_without_asynchronous_copies_a_copy_loads_and_stores():
    copy = loop("copy", *load(4, opcode="LDG.E.128"), *store(4, opcode="STS.128"))
    assert cost_of(FORWARD, *copy, *APPLY).phases["copy"].instructions == 3 / 8


def test_what_is_not_kept_on_the_chip_is_named_apart():
    again = [line.replace("LDS.128", "LDG.E.128").replace("> ", "> again_") if line[-1] != ":" else f"again_{line}"
             for line in STATISTICS[:-2] + STATISTICS[-1:] + APPLY]
    for lines in (STATISTICS + APPLY + again, again + STATISTICS + APPLY):
        cost = cost_of(FORWARD, *COPY, *lines)
        assert cost.instructions == 3 / 8 + 35 / 16 + 55 / 16
        assert {phase: some.instructions for phase, some in cost.again.items()} == {
            "statistics": 34 / 16, "apply": 55 / 16}


def test_a_loop_over_tables_is_no_statistics():
    tables = loop("tables", *load(4, 8, 12, 16), *compute(4, 1))
    assert cost_of(FORWARD, *tables, *STATISTICS).phases["statistics"].instructions == 35 / 16


def test_backward_keeps_what_it_computes_and_a_shortcut_is_off():
    sums = loop("sums", *load(4, 8), *skipped("linear", "P1", *activate(4)), *compute(4),
                *skipped("unkept", "P2", *store(8, opcode="STS.128")))
    dx = loop("dx", *load(4, 8), *skipped("alone", "P3", *load(12, opcode="LDG.E.128"), *compute(12)), *compute(4),
              *store(4))
    copy = loop("copy", *["LDGSTS.E.BYPASS.128 [R84], [R86]"] * 2)
    cost = cost_of(BACKWARD, *copy, *sums, *dx)
    assert {phase: (some.elements, some.instructions) for phase, some in cost.phases.items()} == {
        "copy": (8, 3 / 8), "sums": (8, (2 + 17 + 16 + 2 + 1) / 8), "dx": (8, (2 + 1 + 16 + 2) / 8)}
    assert cost.mufu == 2


def test_a_loop_that_moves_nothing_costs_one_turn():
    rounds = loop("rounds", "IMAD R1, R2, R3, R1")
    statistics = cost_of(FORWARD, *loop("statistics", *load(4), *compute(4), *rounds)).phases["statistics"]
    assert statistics.instructions == (1 + 16 + 2 + 1) / 8


def test_a_subroutine_costs_its_shortest_way():
    statistics = loop("statistics", *load(4), *compute(4), "CALL.REL.NOINC > $division")
    division = ["EXIT", "$division:", *skipped("rare", "P1", "MUFU.RCP R1, R1", "FMUL R1, R1, R1"),
                "RET.REL.NODEC R2 `(f)"]
    statistics = cost_of(FORWARD, *statistics, *division).phases["statistics"]
    assert (statistics.instructions, statistics.mufu) == ((1 + 16 + 1 + 2 + 1) / 8, 0)


def test_an_exponential_alone_in_its_basic_block_fails():
    each = [line for i in range(VECTOR) for line in skipped(f"e{i}", "P1", *activate(4)[2 * i:2 * i + 2])]
    cost = cost_of(FORWARD, *COPY, *STATISTICS, *loop("apply", *load(4), *each, *store(4)))
    [fault] = issue_slots.faults(FORWARD, cost)
    assert fault == ("8 exponentials on main ways are alone in their basic block, the first one is MUFU.EX2 at 0x0280")
    # In a loop that is not the main one it is none of a fault.
    rest = loop("rest", *load(4), *compute(4), *skipped("e", "P1", "MUFU.EX2 R1, R2"), *store(4))
    assert list(issue_slots.faults(FORWARD, cost_of(FORWARD, *COPY, *STATISTICS, *APPLY, *rest))) == []


def test_a_phase_that_is_not_found_fails():
    assert list(issue_slots.faults(FORWARD, cost_of(FORWARD, *APPLY))) == [
        "its instructions an element are not known: no loop found for copy, statistics"]
    assert list(issue_slots.faults(FORWARD, cost_of(FORWARD, *COPY, *STATISTICS, *APPLY, "BRX R2 -0x10"))) == [
        "its instructions an element are not known: the disassembly does not say where BRX at 0x0620 goes"]


# ---- The report -----------------------------------------------------------------------------------------------------

SUMS = loop("sums", *load(4, 8), *activate(4), *compute(4))
DX = loop("dx", *load(4, 8), *compute(4), *store(4))
GOOD = {"forward": [*COPY, *STATISTICS, *APPLY], "backward": [*COPY, *SUMS, *DX]}


def costs(*more, of=FORWARD):
    """Of all kernels that have a limit; one of them does something more in its last loop."""
    found = {}
    for name, direction in issue_slots.LIMITED.items():
        lines = GOOD[direction]
        found[name] = cost_of(name, *lines[:-1], *(more if name == of else ()), lines[-1])
    return found


def test_what_can_be_issued_while_bytes_move_is_reported(capsys):
    passed, line = issue_slots.report({"9.0": costs()})
    assert passed
    assert re.fullmatch(r"issue: forward worst 6\.0 instructions an element, backward worst 7\.6; H100 15 % / 13 %, "
                        r"H200 22 % / 18 % of the issue slots at copy bandwidth", line)
    printed = capsys.readouterr().out
    assert f"{FORWARD}: copy 0.4 + statistics 2.2 + apply 3.4" in printed
    assert re.findall(r"^  (\w.*?)  .*%$", printed, re.M) == list(DEVICES)


def test_more_than_the_limit_fails_on_the_architecture_that_has_it(capsys):
    for name in (FORWARD, BACKWARD):
        limit = issue_slots.LIMITS[issue_slots.LIMITED[name]].instructions
        slow = costs(*["NOP"] * round(16 * limit), of=name)
        passed, _ = issue_slots.report({"9.0": slow})
        assert not passed
        assert f"\n1 faults:\n{name}: " in capsys.readouterr().out
        assert issue_slots.report({"9.0": costs(), "8.0": slow})[0]
    assert not issue_slots.report({"9.0": costs("MUFU.RCP R1, R1", "MUFU.RCP R1, R1")})[0]
    assert "2.1 MUFU operations an element, where 2 are the limit" in capsys.readouterr().out


def test_a_kernel_with_a_limit_that_is_not_compiled_fails(capsys):
    some = costs()
    del some[FORWARD]
    passed, _ = issue_slots.report({"9.0": some})
    assert not passed and f"{FORWARD}: not compiled" in capsys.readouterr().out
    assert issue_slots.report({"8.0": some}) == (True, "issue: nothing judged, for 9.0 was not compiled")


@pytest.mark.parametrize("name,moved", [
    (FORWARD, 4), (BACKWARD, 6), ("resident_backward<float, Half, 8, true, true>", 10),
    ("apply_rows<Half, float, 8>", 6), ("statistics_columns<float, 4>", 4), ("sums_rows<BFloat16, BFloat16, 8>", 4),
    ("channel_sums_rows<Half, 8>", 2),
    ("input_gradient_columns<BFloat16, float, 8>", 8), ("residual_rows<BFloat16, 8>", 6),
    ("apply_rows<float, float, 1>", None), ("apply_rows<double, double, 2>", None), ("merge_sums<float>", None)])
def test_which_kernels_are_judged_and_what_an_element_is(name, moved):
    tensors = issue_slots.tensors_of(name)
    assert (tensors and tensors.moved) == moved


def test_every_streaming_and_every_resident_kernel_of_the_sources_is_judged():
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu*"))
    found = {name + arguments for name in re.findall(r"__global__ void[^{;]*?(\w+)\(\w+ p\)", sources)
             for arguments in ("<float, 4>", "<float, float, 4>", "<float, float, 4, true, true>")}
    found = [name for name in found if check_sass.role(name) in ("streaming", "resident")]
    assert len(found) > 20 and [name for name in found if not issue_slots.tensors_of(name)] == []


def test_devices_have_the_issue_slots_that_a_budget_counts_with():
    """Instructions an element at copy bandwidth, in 16 bits: forward, backward."""
    budgets = {gpu.name: tuple(round(1 / gpu.issue_share(1, moved)) for moved in (4, 6)) for gpu in DEVICES.values()}
    assert budgets == {"H100": (40, 59), "H200": (28, 41), "A100": (45, 67), "RTX 4090": (180, 269), "B200": (21, 31)}
    assert round(1 / DEVICES["H200"].mufu_share(1, 4), 1) == 3.4


def test_the_kernels_with_a_limit_are_those_that_the_plan_takes_for_the_workloads():
    import emulated
    import torch

    reached = set()
    with emulated.device(emulated.DEVICES["H200"]):
        for workload in workloads.load():
            for layout in workload.layouts("both"):
                formats = {4: torch.channels_last, 5: torch.channels_last_3d}
                x = torch.empty(workload.shape, dtype=torch.bfloat16, device="meta")
                if layout == "channels_last":
                    x = x.contiguous(memory_format=formats[x.dim()])
                for direction, plan_of in (("forward", emulated.plan_forward), ("backward", emulated.plan_backward)):
                    plan = plan_of(x, workload.groups)
                    if plan["tier"] != "two passes":
                        columns, grid = layout == "channels_last", plan["tier"].startswith("grid")
                        reached.add(f"resident_{direction}<BFloat16, BFloat16, 8, {columns}, {grid}>".replace(
                            "True", "true").replace("False", "false"))
    assert reached == set(issue_slots.LIMITED)
