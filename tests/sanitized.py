"""The sanitizers are in force in this process, in these kernels: each run of `make sanitize` ends with these tests.

Without sanitizers they fail, so `make test` does not collect them.
"""

import os
import re
from pathlib import Path

import numpy as np
import torch


def report_on(kernels, make_array):
    """What the sanitizers write when the kernels read that array. They end the process, so a fork of this one does."""
    def forward(x):
        kernels.forward(x, 2, None, None, 1e-5, True, None, None, None, None)

    pixels = 252 if kernels.name == "emulated" else 251  # no multiple of any vector: the rest is read one by one
    forward(torch.ones(1, 4, pixels))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 2)
        forward(torch.from_numpy(make_array()[:4 * pixels]).view(1, 4, pixels))
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        report = pipe.read()
    assert os.waitpid(child, 0)[1] != 0, "the sanitizers saw nothing"
    # avx512_bf16 has no kernels of its own for float32.
    isa = os.environ["LDM_FUSED_CPU_ISA"].removesuffix("_bf16")
    namespace = "" if kernels.name == "emulated" else f"cpu::{isa}::"
    # An asynchronous copy is made for the kernel: by memcpy, in two functions of the emulator.
    assert re.search(rf"^ *#[0-3] .*ldm_fused::{namespace}\w+[<(]", report, re.M), report
    return report


def test_a_read_past_the_end_is_seen(kernels):
    report = report_on(kernels, lambda: np.lib.stride_tricks.as_strided(np.zeros(1000, np.float32), (1008,)))
    assert "AddressSanitizer: heap-buffer-overflow" in report


def test_a_misaligned_read_is_seen(kernels):
    report = report_on(kernels, lambda: np.zeros(4 * 1008 + 1, np.uint8)[1:].view(np.float32))
    assert "runtime error: load of misaligned address" in report


def test_signed_overflow_is_looked_for():
    from ldm_fused import _C

    assert b"__ubsan_handle_add_overflow_abort" in Path(_C.__file__).read_bytes()
