"""`make sass` can fail: at a spill, a stack frame, a narrow access, a kernel that it does not know or cannot follow."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import check_sass, disassembly

ROOT = Path(__file__).resolve().parents[2]
NAME = "_ZN9ldm_fused10apply_rowsIfLi4EEEvNS_13ForwardParamsE"  # apply_rows<float, 4>

PTXAS = f"""\
ptxas info    : 28 bytes gmem
ptxas info    : Compiling entry function '{NAME}' for 'sm_90'
ptxas info    : Function properties for {NAME}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 20 registers, used 1 barriers, 384 bytes smem
ptxas info    : Compile time = 8.350 ms
"""

# A loop over rows, which loads a parameter of the row, and in it one over the row's vectors; then a subroutine.
SASS = f"""\
	.target	sm_90

//--------------------- .text.{NAME} --------------------------
	.section	.text.{NAME},"ax",@progbits
        .type           {NAME},@function
        .other          {NAME},@"STO_CUDA_ENTRY STV_DEFAULT"
{NAME}:
.text.{NAME}:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E R0, desc[UR6][R2.64] ;
        /*0030*/                   ISETP.LE.AND P0, PT, R0, UR4, PT ;
        /*0040*/               @P0 EXIT ;
.L_x_14:
        /*00c0*/                   BSSY B0, `(.L_x_11) ;
        /*0110*/               @P1 BRA `(.L_x_12) ;
        /*0120*/                   LDG.E.U16 R17, desc[UR6][R2.64] ;
.L_x_13:
        /*0170*/                   LDG.E.128 R4, desc[UR6][R6.64] ;
        /*01a0*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_rcp) ;
        /*01c0*/                   STG.E.128 desc[UR6][R2.64], R4 ;
        /*01d0*/              @!P1 BRA `(.L_x_13) ;
.L_x_12:
        /*01e0*/                   BSYNC B0 ;
.L_x_11:
        /*01f0*/              @!P0 BRA `(.L_x_14) ;
        /*0200*/                   EXIT ;
        .weak           $__internal_0_$__cuda_sm20_rcp
        .type           $__internal_0_$__cuda_sm20_rcp,@function
$__internal_0_$__cuda_sm20_rcp:
        /*0210*/                   MUFU.RCP R39, R26 ;
        /*0220*/                   RET.REL.NODEC R2 `({NAME}) ;
.L_x_15:
        /*0230*/                   BRA `(.L_x_15);
        /*0240*/                   NOP;
"""


def change(text, old, new):
    assert old in text
    return text.replace(old, new)


def check(log=PTXAS, disassembly=SASS):
    """The faults of the kernel above, changed."""
    return [fault for function in check_sass.examine(log, disassembly) for fault in check_sass.faults(function)]


def with_sass(*old_and_new):
    return check(disassembly=change(SASS, *old_and_new))


def test_a_good_kernel_passes_and_what_is_read_is_right(capsys):
    [kernel] = check_sass.examine(PTXAS, SASS)
    assert (kernel.name, kernel.registers, kernel.shared) == ("apply_rows<float, 4>", 20, 384)
    # Not the load before the loops, nor that of the outer loop, which runs once a row.
    assert list(map(str, kernel.accesses)) == ["LDG.E.128 at 0x0170", "STG.E.128 at 0x01c0"]
    assert check_sass.report({"8.0": [kernel], "9.0": [kernel]}, every_kernel=True)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == ("sass: 1 kernels x 2 architectures, 0 spilled bytes, "
                    "100 % of streaming accesses 16 bytes wide")


def test_a_spill_and_a_stack_frame_fail(capsys):
    log = change(PTXAS, "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads",
                 "16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads")
    assert check(log) == ["20 bytes spilled", "a stack frame of 16 bytes"]
    assert not check_sass.report({"9.0": check_sass.examine(log, SASS)})
    printed = capsys.readouterr().out
    assert "apply_rows<float, 4>: 20 bytes spilled" in printed
    assert printed.splitlines()[-1].startswith("sass: 1 kernels x 1 architectures, 20 spilled bytes, 100 %")


def test_a_stack_frame_of_a_called_function_fails():
    log = PTXAS + ("ptxas info    : Function properties for _Z5twicef\n"
                   "    32 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n")
    assert check(log) == ["a stack frame of 32 bytes"]


@pytest.mark.parametrize("old,new", [("LDG.E.128", "LDG.E.64"), ("STG.E.128", "STG.E"), ("STG.E.128", "ST.E.U16"),
                                     ("LDG.E.128", "LDG.E.LTC128B.64")])
def test_a_narrow_access_in_a_streaming_loop_fails(old, new, capsys):
    sass = change(SASS, old, new)
    [fault] = check(disassembly=sass)
    assert fault.startswith("1 of 2 streaming accesses narrower than 16 bytes: " + new)
    assert not check_sass.report({"9.0": check_sass.examine(PTXAS, sass)})
    assert capsys.readouterr().out.endswith("0 spilled bytes, 50 % of streaming accesses 16 bytes wide\n")


def test_a_subroutine_is_part_of_the_loop_that_calls_it():
    assert with_sass("MUFU.RCP R39, R26", "LDG.E R39, desc[UR6][R2.64]") == [
        "1 of 3 streaming accesses narrower than 16 bytes: LDG.E at 0x0210"]
    assert with_sass("CALL.REL.NOINC `($__internal_0_$__cuda_sm20_rcp)", "CALL.ABS.NOINC R2") == [
        f"no {access} judged: a loop calls code that is elsewhere: CALL.ABS.NOINC at 0x01a0"
        for access in ("load", "store")]


def test_a_loop_that_is_left_by_a_call_ends_there():
    sass = change(SASS, "@!P1 BRA `(.L_x_13)", "@P1 CALL.REL.NOINC `(.L_x_12) ;\n /*01d8*/  BRA `(.L_x_13)")
    assert check(disassembly=change(sass, "BSYNC B0", "STG.E desc[UR6][R2.64], R0")) == []


def test_without_its_inner_loop_the_outer_one_is_judged():
    assert with_sass("@!P1 BRA `(.L_x_13)", "@!P1 BRA `(.L_x_12)") == [
        "1 of 3 streaming accesses narrower than 16 bytes: LDG.E.U16 at 0x0120"]


def test_a_jump_back_alone_is_no_loop():
    """ptxas puts rare cases behind the end: their way back is none that runs again."""
    sass = change(change(SASS, "@!P1 BRA `(.L_x_13)", "@P1 BRA `(.L_x_16)"), "@!P0 BRA `(.L_x_14)", "BSYNC B1")
    sass = change(sass, "        /*0240*/                   NOP;", ".L_x_16:\n        /*0240*/  BRA `(.L_x_12) ;")
    assert check(disassembly=sass) == ["no load judged: it has no loop with a global load",
                                        "no store judged: it has no loop with a global store"]


@pytest.mark.parametrize("instruction,expected", [
    ("NOP", [1]),
    ("BRA `(.L_x_1)", [2]),
    ("BRA.U `(.L_x_1)", [2]),
    ("BRX R2 -0x10 (*\"BRANCH_TARGETS .L_x_1,.L_x_0\"*)", [2, 0]),
    ("@!P1 BRA `(.L_x_1)", [2, 1]),
    ("@P0 BRA !P2, `(.L_x_1)", [2, 1]),
    ("BRA.U !UP0, `(.L_x_1)", [2, 1]),
    ("BRA.DIV ~URZ, `(.L_x_1)", [2, 1]),
    ("BRA.DIV `(.L_x_1)", [2, 1]),
    ("BSSY.RECONVERGENT B0, `(.L_x_1)", [1]),
    ("CALL.REL.NOINC `($__internal_0_$__cuda_sm20_rcp)", [1]),
    ("@P0 CALL.REL.NOINC `(.L_x_1)", [2, 1]),
    ("EXIT", []),
    ("@P0 EXIT", [1]),
    ("RET.REL.NODEC R2 `(f)", []),
])
def test_what_can_run_next(instruction, expected):
    code = disassembly.parse_sass(f".text.f:\n.L_x_0:\n /*0000*/ {instruction} ;\n /*0010*/ NOP;\n.L_x_1:\n"
                                 " /*0020*/ EXIT ;\n")["f"]
    assert disassembly.successors(code)[0] == expected


def test_a_branch_to_an_unknown_place_fails():
    assert with_sass("@!P0 BRA `(.L_x_14)", "BRX R2 -0x10") == [
        f"no {access} judged: the disassembly does not say where BRX at 0x01f0 goes" for access in ("load", "store")]


def test_a_loop_that_shares_parameters_may_be_narrow_but_tensors_may_not_hide_in_it():
    """What all threads need goes there; a kernel that reads its tensor so has no other read to judge."""
    shares = "LDG.E.U16 R4, desc[UR6][R6.64] ;\n        /*0180*/   STS [R2], R4"
    assert with_sass("LDG.E.128 R4, desc[UR6][R6.64]", shares) == [
        "1 of 2 streaming accesses narrower than 16 bytes: LDG.E.U16 at 0x0170"]
    sass = change(SASS, "LDG.E.128 R4, desc[UR6][R6.64]", shares)
    assert check(disassembly=change(sass, "STG.E.128 desc[UR6][R2.64], R4", "NOP")) == [
        "no load judged: it has no loop with a global load", "no store judged: it has no loop with a global store"]


@pytest.mark.parametrize("opcode,width", [("LDG.E", 4), ("LDG.E.U8", 1), ("STG.E.U16.SYS", 2), ("LDG.E.64.CONSTANT", 8),
                                          ("LDG.E.EF.128", 16), ("LDG.E.LTC128B", 4), ("LDG.E.LTC128B.128", 16),
                                          ("LDGSTS.E.BYPASS.128", 16), ("STG.E.ENL2.256", 32)])
def test_widths(opcode, width):
    access = disassembly.Instruction("0x0", "", opcode, "")
    assert access.is_access and access.width == width


def renamed(mangled):
    return PTXAS.replace(NAME, mangled), SASS.replace(NAME, mangled).replace(".128", "")


def test_kernels_for_misaligned_tensors_and_small_ones_may_be_narrow():
    assert check(*renamed("_ZN9ldm_fused10apply_rowsIfLi1EEEvNS_13ForwardParamsE")) == []
    assert check(*renamed("_ZN9ldm_fused10merge_sumsIfEEvNS_14BackwardParamsE")) == []
    assert len(check(*renamed("_ZN9ldm_fused10apply_rowsIfLi16EEEvNS_13ForwardParamsE"))) == 1


def test_a_kernel_of_unknown_name_fails():
    [fault] = check(*renamed("_ZN9ldm_fused10apply_diskIfLi4EEEvNS_13ForwardParamsE"))
    assert fault.startswith("named neither in STREAMING nor in RESIDENT nor in SMALL")


@pytest.mark.parametrize("name,role", [
    ("apply_rows<float, 4>", "streaming"), ("apply_rows<float, 1>", "misaligned"), ("merge_sums<float>", "small"),
    ("resident_forward<float, Half, 8, true, false>", "resident"),
    ("resident_backward<BFloat16, BFloat16, 8, false, true>", "resident"),
    ("resident_backward<float, float, 1, false, true>", "resident"),  # never narrow for a reason
    ("resident_backward<float, 4>", None), ("resident_forward<float, float, 4, true>", None),
    ("resident_sideways<float, float, 4, true, true>", None), ("apply_disk<float, 4>", None)])
def test_roles(name, role):
    assert check_sass.role(name) == role


# resident_forward<float, float, 4, true, false>: copies to shared memory; loads parameters; what blocks of a cluster
# have of a group, and statistics; rounds, which store y of a vector in registers, then of those in shared memory; in no
# loop the seed of dropout.
RESIDENT_NAME = "_ZN9ldm_fused16resident_forwardIffLi4ELb1ELb0EEEvNS_13ForwardParamsE"
RESIDENT_PTXAS = PTXAS.replace(NAME, RESIDENT_NAME)
RESIDENT_SASS = f"""\
.text.{RESIDENT_NAME}:
.L_x_0:
        /*0000*/                   LDGSTS.E.BYPASS.128 [R12], desc[UR6][R4.64] ;
        /*0010*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/                   LDG.E.U16 R0, desc[UR6][R2.64] ;
        /*0030*/                   STS [R8], R0 ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0050*/                   FADD R0, R0, R1 ;
.L_x_3:
        /*0060*/                   LD.E R1, desc[UR6][R2.64] ;
        /*0070*/               @P1 BRA `(.L_x_3) ;
        /*0080*/                   STG.E desc[UR6][R2.64], R0 ;
        /*0090*/               @P0 BRA `(.L_x_2) ;
.L_x_4:
        /*00a0*/                   STG.E.128 desc[UR6][R6.64], R4 ;
.L_x_5:
        /*00b0*/                   LDS.128 R8, [R12] ;
        /*00c0*/                   STG.E.128 desc[UR6][R8.64], R8 ;
        /*00d0*/               @P1 BRA `(.L_x_5) ;
        /*00e0*/               @P0 BRA `(.L_x_4) ;
        /*00e8*/                   LDG.E.64 R14, desc[UR6][R2.64] ;
        /*00f0*/                   EXIT ;
"""
COPY, HELD, KEPT = (next(line.split("*/")[1].strip(" ;") for line in RESIDENT_SASS.splitlines() if address in line)
                    for address in ("/*0000*/", "/*00a0*/", "/*00c0*/"))


def with_resident_sass(*changes):
    sass = RESIDENT_SASS
    for old, new in changes:
        sass = change(sass, old, new)
    return check(RESIDENT_PTXAS, sass)


def asides(*found):
    known = ["LDG.E.U16 at 0x0020", "LD.E at 0x0060", "LDG.E.64 at 0x00e8"]
    return (f"{len(known) + len(found)} asides narrower than 16 bytes, where 3 have a reason: "
            + ", ".join(sorted([*known, *found], key=lambda access: access.split()[-1])))


def test_a_resident_kernel_streams_wide_and_has_narrow_loops_aside(capsys):
    [kernel] = check_sass.examine(RESIDENT_PTXAS, RESIDENT_SASS)
    assert kernel.name == "resident_forward<float, float, 4, true, false>"
    assert sorted(map(str, kernel.accesses)) == [
        "LDGSTS.E.BYPASS.128 at 0x0000", "STG.E.128 at 0x00a0", "STG.E.128 at 0x00c0"]
    assert len(kernel.places) == 3
    assert [list(map(str, aside)) for aside in kernel.asides] == [
        ["LDG.E.U16 at 0x0020"], ["LD.E at 0x0060", "STG.E at 0x0080"], ["LDG.E.64 at 0x00e8"]]
    assert check_sass.report({"9.0": [kernel]})
    assert capsys.readouterr().out.endswith(
        "sass: 1 kernels x 1 architectures, 0 spilled bytes, 100 % of streaming accesses 16 bytes wide\n")


def test_copies_of_a_resident_kernel_may_go_through_registers():
    through = "LDG.E.128 R4, desc[UR6][R4.64] ;\n        /*0008*/   STS.128 [R12], R4"
    assert with_resident_sass((COPY, through)) == []
    assert with_resident_sass((COPY, through.replace("LDG.E.128", "LDG.E.64"))) == [
        "0 of 1 places load 16 bytes: the others are narrow, or RESIDENT says too many",
        asides("LDG.E.64 at 0x0000")]


def test_a_narrow_asynchronous_copy_fails():
    assert with_resident_sass((COPY, COPY.replace(".BYPASS.128", ".64"))) == [
        "0 of 1 places load 16 bytes: the others are narrow, or RESIDENT says too many",
        "1 of 3 streaming accesses narrower than 16 bytes: LDGSTS.E.64 at 0x0000"]


def test_a_split_store_of_a_resident_kernel_fails():
    """One of a loop's; in a loop around another that streams; all of a loop; all."""
    narrow = KEPT.replace(".128", ".64")
    assert with_resident_sass((KEPT, f"{KEPT} ;\n        /*00c8*/   {narrow}")) == [
        "1 of 4 streaming accesses narrower than 16 bytes: STG.E.64 at 0x00c8"]
    assert with_resident_sass((HELD, HELD.replace(".128", ".64"))) == [
        "1 of 3 streaming accesses narrower than 16 bytes: STG.E.64 at 0x00a0"]
    assert with_resident_sass((KEPT, narrow)) == [asides("STG.E.64 at 0x00c0")]
    assert with_resident_sass((KEPT, narrow), (HELD, HELD.replace(".128", ".U16"))) == [
        "0 of 1 places store 16 bytes: the others are narrow, or RESIDENT says too many",
        asides("STG.E.U16 at 0x00a0")]


def test_to_wait_for_other_blocks_is_no_narrow_access():
    poll = "LDG.E.STRONG.GPU R1, desc[UR6][R2.64]"
    assert with_resident_sass((HELD, f"{HELD} ;\n        /*00a8*/   {poll}")) == []
    assert with_resident_sass(("EXIT", f"{poll} ;\n        /*00f8*/   EXIT")) == []


def test_one_narrow_load_beside_vectors_is_an_aside_and_two_are_a_split_vector():
    one = f"{KEPT} ;\n        /*00c8*/   LDG.E.U16 R1, desc[UR6][R2.64]"
    assert with_resident_sass((KEPT, one)) == [asides("LDG.E.U16 at 0x00c8")]
    assert with_resident_sass((KEPT, f"{one} ;\n        /*00cc*/   LDG.E.U16 R1, desc[UR6][R2.64]")) == [
        "2 of 5 streaming accesses narrower than 16 bytes: LDG.E.U16 at 0x00c8, LDG.E.U16 at 0x00cc"]


def test_outside_loops_each_narrow_access_of_a_resident_kernel_is_an_aside():
    stores = " ;\n        /*00f8*/   ".join(["STG.E desc[UR6][R2.64], R0"] * 2 + ["EXIT"])
    assert with_resident_sass(("EXIT", stores.replace("STG.E", "STG.E.128"))) == []
    assert with_resident_sass(("EXIT", stores)) == [asides("STG.E at 0x00f0", "STG.E at 0x00f8")]


def test_a_resident_kernel_that_cannot_be_followed_fails():
    assert with_resident_sass(("@P0 BRA `(.L_x_4)", "BRX R2 -0x10")) == [
        f"0 of 1 places {access} 16 bytes: the disassembly does not say where BRX at 0x00e0 goes"
        for access in ("load", "store")]


def test_what_resident_kernels_are_to_have_goes_by_their_arguments():
    loads = [check_sass.known_places(f"resident_{arguments}")[0] for arguments in (
        "forward<float, Half, 8, true, false>", "forward<Half, Half, 8, false, true>",
        "backward<float, float, 4, true, false>", "backward<Half, float, 8, true, true>")]
    assert loads == [1, 5, 1, 6]  # a grid reads again what does not fit


def test_too_many_kernels_fail(capsys):
    [kernel] = check_sass.examine(PTXAS, SASS)
    kernels = [dataclasses.replace(kernel, name=f"apply_rows<T{i}, 4>") for i in range(check_sass.MOST_KERNELS + 1)]
    assert check_sass.report({"9.0": kernels[1:]})
    assert not check_sass.report({"9.0": kernels})
    assert "221 kernels, more than 220: the compile time and the binary grow with each" in capsys.readouterr().out


def test_every_kernel_of_the_sources_is_in_the_table():
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu*"))
    names = re.findall(r"__global__ void\s+(?:__\w+__\((?:[^()]|\([^()]*\))*\)\s+)*(\w+)\(", sources)
    assert len(names) == sources.count("__global__ ") > 0
    assert [name for name in names if not any(check_sass.role(name + arguments) for arguments in (
        "<float, 4>", "<float, float, 4, true, true>"))] == []


def test_a_kernel_that_one_architecture_lacks_fails(capsys):
    both = check_sass.examine(*(one + other for one, other in zip((PTXAS, SASS), renamed("_Z10merge_sumsIfEvi"))))
    assert check_sass.report({"9.0": both}) and not check_sass.report({"8.0": both[:1], "9.0": both})
    assert "8.0 merge_sums<float>: not compiled for this architecture" in capsys.readouterr().out


@pytest.mark.parametrize("log,disassembly", [(PTXAS, ""), ("", SASS), ("", "")])
def test_a_log_and_a_disassembly_that_do_not_agree_are_an_error(log, disassembly):
    with pytest.raises(RuntimeError, match="do not agree on what was compiled"):
        check_sass.examine(log, disassembly)


def test_100_percent_is_said_of_all_only():
    [kernel] = check_sass.examine(PTXAS, SASS)
    wide, narrow = kernel.accesses[0], disassembly.Instruction("0x0", "", "STG.E", "")
    kernel.accesses = [wide] * 9999 + [narrow]
    assert check_sass.percent_wide([kernel]) == "99.9"


def test_without_a_toolkit_it_says_what_to_do(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "check_sass.py")], capture_output=True, text=True,
                          env={**os.environ, "CUDA_HOME": str(tmp_path)})
    assert done.returncode == 1 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("make sass needs a CUDA toolkit") and "-m pip install" in line and str(tmp_path) in line
