"""The emulator that runs the CUDA kernels on the CPU: it computes what a GPU would, and what is wrong it reports."""

import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("pybind11", reason="the emulator is built with pybind11")
from emulator import build  # noqa: E402

ORDERS = [("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)]


@pytest.fixture(scope="module")
def emulator():
    return build.load("emulator_selftest")


@pytest.fixture(params=ORDERS, ids=lambda order: f"{order[0]}{order[1]}")
def ordered(request, emulator):
    """The emulator in each of the orders in which threads can run."""
    emulator.set_order(*request.param)
    yield emulator
    emulator.set_order("forward")


def in_all_orders(emulator, run):
    results = []
    for order in ORDERS:
        emulator.set_order(*order)
        results.append(run())
    emulator.set_order("forward")
    return results


@pytest.fixture
def rows():
    return np.random.default_rng().normal(5, 3, (7, 1000)).astype(np.float32)


# ---- Right kernels


def test_indices(ordered):
    grid, block = (3, 2, 5), (5, 3, 4)
    out = ordered.indices(grid, block)
    axes = np.meshgrid(*(np.arange(n) for n in (*grid[::-1], *block[::-1])), indexing="ij")
    np.testing.assert_array_equal(out, np.stack([axes[i] for i in (2, 1, 0, 5, 4, 3)], axis=-1))


@pytest.mark.parametrize("threads", [32, 256, 1024])
def test_block_reduction(ordered, rows, threads):
    x = rows.astype(np.float64)
    expected = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    np.testing.assert_allclose(ordered.normalize(rows, threads), expected, atol=2e-6)


@pytest.mark.parametrize("kind", ["idx", "up", "down", "xor"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int64"])
def test_shuffle(emulator, kind, dtype):
    values = np.random.default_rng().normal(0, 1e6, 64).astype(dtype)
    thread = np.arange(64)
    for width in 1, 2, 4, 8, 16, 32:
        first = thread // width * width
        for by in range(32):
            source = {"idx": first + by % width, "up": thread - by, "down": thread + by, "xor": thread ^ by}[kind]
            # Beyond its own segment a lane reads itself, but for xor, which may reach back.
            outside = (source >= first + width) | ((source < first) & (kind != "xor"))
            expected = values[np.where(outside, thread, source)]
            shuffled = emulator.shuffle(emulator.shuffles[kind], values, by, width)
            np.testing.assert_array_equal(shuffled, expected, err_msg=f"width {width}, by {by}")


@pytest.mark.parametrize("probability", [0, 0.5, 1])
def test_votes(ordered, probability):
    predicate = np.random.default_rng().random(128) < probability
    ballot, any_, all_, count, or_, and_, active = ordered.vote(predicate.astype(np.int32) * 6).T
    bits = predicate.reshape(-1, 2, 16) << np.array([np.arange(16), np.arange(16, 32)])
    np.testing.assert_array_equal(ballot, bits.sum(-1).ravel().repeat(16))
    np.testing.assert_array_equal(any_, predicate.reshape(-1, 32).any(1).repeat(32))
    np.testing.assert_array_equal(all_, predicate.reshape(-1, 32).all(1).repeat(32))
    np.testing.assert_array_equal(count, predicate.sum())
    np.testing.assert_array_equal(or_, predicate.any())
    np.testing.assert_array_equal(and_, predicate.all())
    assert (active >> np.arange(128) % 32 & 1).all()


def test_warp_that_the_block_does_not_fill(ordered):
    # The lanes that do not exist are not waited for.
    predicate = np.ones(40, np.int32)
    ballot, any_, all_, count, *_ = ordered.vote(predicate).T
    np.testing.assert_array_equal(ballot, [0xFFFF] * 16 + [0xFFFF0000] * 16 + [0xFF] * 8)
    assert (any_ == 1).all() and (all_ == 1).all() and (count == 40).all()


def test_atomics(ordered):
    assert ordered.count_threads(24, 96) == (24 * 96, 0)


def test_fast_math(emulator):
    exp, quotient, rsqrt, smaller, larger = emulator.fast_math(1.5, 3)
    results = [exp, quotient, rsqrt, smaller, larger]
    np.testing.assert_allclose(results, [np.exp(1.5), 0.5, 1.5**-0.5, 1.5, 3], rtol=1e-6)
    assert emulator.fast_math(1e38, 1e38)[1] == 0  # the hardware's fast division gives up above 2^126
    assert emulator.fast_math(1, float("nan"))[3:] == (1, 1)


def test_one_order_gives_the_same_bits_as_another(emulator, rows):
    first, *others = in_all_orders(emulator, lambda: emulator.normalize(rows))
    assert all(np.array_equal(first, other) for other in others)


# ---- Wrong kernels


@pytest.mark.parametrize("barrier", ["before_write", "before_read"])
def test_missing_barrier_shows_between_orders(emulator, rows, barrier):
    right = emulator.normalize(rows)
    first, *others = in_all_orders(emulator, lambda: emulator.normalize(rows, **{barrier: False}))
    assert not np.array_equal(first, right)
    assert not all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize(
    "kernel, message",
    [
        ("divergent_barrier", r"deadlock: waits in __syncthreads at \S+:\d+ for .* waits in __syncthreads"),
        ("early_exit", r"deadlock: waits in __syncthreads at \S+:\d+ for thread \(40,0,0\), which has exited"),
        ("missing_lanes", r"waits in __shfl_sync with mask 0xffffffff at \S+:\d+ for .* has exited"),
        ("mixed_masks", r"waits in __shfl_sync with mask 0xffffffff at \S+:\d+ for .* has exited"),
        ("barrier_against_shuffle", r"waits in __syncthreads at \S+:\d+ for .* waits in __shfl_sync"),
        ("foreign_mask", r"__syncwarp with mask 0x0000ffff at \S+:\d+, which does not name the calling lane"),
        ("absent_source", r"__shfl_sync with mask 0x0000ffff at \S+:\d+ reads lane 20, which takes no part"),
        ("trap", r"^block \(1,0,0\), thread \(33,0,0\): __trap\(\)$"),
        ("misaligned", r"access of 16 bytes is misaligned by 4 bytes"),
    ],
)
def test_wrong_kernel_is_reported(ordered, rows, kernel, message):
    with pytest.raises(RuntimeError, match=message) as error:
        ordered.launch(kernel, [2])
    assert str(error.value).startswith(("block (0,0,0), thread", "block (1,0,0), thread"))
    # The threads that were left waiting are gone: the next launch is sound.
    assert np.isfinite(ordered.normalize(rows)).all()


@pytest.mark.skipif(
    "address" not in os.environ.get("LDM_FUSED_EMULATOR_FLAGS", ""),
    reason="needs LDM_FUSED_EMULATOR_FLAGS=-fsanitize=address",
)
def test_address_sanitizer_sees_the_stacks_of_suspended_threads():
    program = "from emulator import build; build.load('emulator_selftest').launch('stack_overflow')"
    result = subprocess.run([sys.executable, "-c", program], cwd=build.ROOT / "tests", capture_output=True, text=True)
    assert result.returncode != 0 and "stack-buffer-overflow" in result.stderr


def test_dynamic_shared_memory_is_poisoned_before_each_block(emulator):
    assert (emulator.touch_dynamic_shared(3, 1000) == 0xFF).all()


def test_write_past_dynamic_shared_memory_is_reported(emulator):
    with pytest.raises(RuntimeError, match="wrote past its 1000 bytes of dynamic shared memory"):
        emulator.touch_dynamic_shared(1, 1000, past=1)


def test_dynamic_shared_memory_above_48_kb_must_be_asked_for(emulator):
    kilobyte = 1024
    emulator.touch_dynamic_shared(1, 48 * kilobyte)
    with pytest.raises(ValueError, match="invalid argument"):
        emulator.touch_dynamic_shared(1, 48 * kilobyte + 1)
    emulator.touch_dynamic_shared(1, 227 * kilobyte, limit=227 * kilobyte)
    with pytest.raises(ValueError, match="invalid argument"):
        emulator.touch_dynamic_shared(1, 1, limit=227 * kilobyte + 1)


@pytest.mark.parametrize(
    "grid, block",
    [
        ((1,), (1025,)),
        ((1,), (32, 33)),
        ((1,), (1, 1, 65)),
        ((1,), (0,)),
        ((0,), (32,)),
        ((2**31,), (32,)),
        ((1, 65536), (32,)),
        ((1, 1, 65536), (32,)),
    ],
)
def test_launch_beyond_the_limits_is_refused(emulator, grid, block):
    with pytest.raises(ValueError, match="invalid configuration argument"):
        emulator.launch("divergent_barrier", grid, block)


def test_unknown_order_is_refused(emulator):
    with pytest.raises(ValueError, match="order is 'sideways', expected 'forward', 'reverse' or 'random'"):
        emulator.set_order("sideways")


def test_build_error_shows_what_the_compiler_said():
    with pytest.raises(RuntimeError, match=r"absent.cpp failed:\n.*error: "):
        build.load("absent")
