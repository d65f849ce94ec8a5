"""The emulator that runs the CUDA kernels on the CPU: it computes what a GPU would, and what is wrong it reports."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pybind11", reason="the emulator is built with pybind11")
from emulator import build  # noqa: E402

watched = pytest.mark.skipif(not build.watches(),
                             reason="AddressSanitizer takes the place of the emulator's own watch")

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


def test_last_block_sees_what_the_others_have_written(ordered):
    assert ordered.count_threads(24, 96) == (24 * 96, 0)


@pytest.mark.parametrize("cluster,large", [(2, False), (8, False), (16, True)])
def test_clusters_share_their_shared_memory(ordered, cluster, large):
    values = np.random.default_rng().integers(-1000, 1000, (48, 40)).astype(np.int32)
    sums = values.reshape(-1, cluster, 40).sum(1).repeat(cluster, 0)
    np.testing.assert_array_equal(ordered.cluster_sum(values, cluster, large=large), sums)


@pytest.mark.parametrize("by_hand", [False, True])
def test_cooperative_grids_meet(ordered, by_hand):
    values = np.random.default_rng().integers(-1000, 1000, (12, 64)).astype(np.int32)
    np.testing.assert_array_equal(ordered.rotate(values, by_hand=by_hand), np.roll(values, -1, 0))


def test_what_several_blocks_have_read_may_be_written_when_all_are_known_to_be_past_it(ordered):
    np.testing.assert_array_equal(ordered.broadcast(5, 40, True), [np.roll(np.arange(40), -1)] * 5)


def test_a_warp_meets_without_the_block(ordered):
    np.testing.assert_array_equal(ordered.next_lane(True), np.arange(64) ^ 1)


@pytest.mark.parametrize("bytes_", [4, 8, 16])
@pytest.mark.parametrize("tiles", [1, 2, 5])
def test_asynchronous_copies_arrive(ordered, bytes_, tiles):
    values = np.random.default_rng().integers(0, 256, (tiles, 64, bytes_), np.uint8)
    reversed_ = ordered.reverse_tiles(values, bytes_, ordered.mistakes["none"])
    np.testing.assert_array_equal(np.frombuffer(reversed_, np.uint8).reshape(values.shape), values[:, ::-1])


def test_fast_math(emulator):
    exp, quotient, rsqrt, smaller, larger = emulator.fast_math(1.5, 3)
    results = [exp, quotient, rsqrt, smaller, larger]
    np.testing.assert_allclose(results, [np.exp(1.5), 0.5, 1.5**-0.5, 1.5, 3], rtol=1e-6)
    assert emulator.fast_math(1e38, 1e38)[1] == 0  # the hardware's fast division gives up above 2^126
    assert emulator.fast_math(1, float("nan"))[3:] == (1, 1)


def test_one_order_gives_the_same_bits_as_another(emulator, rows):
    first, *others = in_all_orders(emulator, lambda: emulator.normalize(rows))
    assert all(np.array_equal(first, other) for other in others)


def toolkit_headers():
    """A folder with the CUDA toolkit's headers, or None."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda", *sys.path]
    for pattern in ("include", "nvidia/cu[0-9]*/include"):
        for home in filter(None, homes):
            for folder in sorted(Path(home).glob(pattern)):
                if (folder / "cuda_fp16.h").exists() and (folder / "nv" / "target").exists():
                    return folder
    return None


@pytest.mark.skipif(toolkit_headers() is None, reason="no CUDA toolkit's headers")
def test_conversions_are_the_toolkits_own():
    rng = np.random.default_rng()
    values = rng.integers(0, 2**32, 2**19, np.uint32).view(np.float32)  # any magnitude, subnormals and NaN too
    near_half = rng.normal(0, 1, 2**17).astype(np.float32) * np.float32(2.0) ** rng.integers(-28, 18, 2**17)
    values = np.concatenate([values, near_half.astype(np.float32)])
    half, our_half, bfloat16, our_bfloat16, *widened = build.load("toolkit_halves", toolkit_headers()).convert(values)
    number = ~np.isnan(values)
    for toolkit, ours in ((half, our_half), (bfloat16, our_bfloat16)):
        np.testing.assert_array_equal(toolkit[number], ours[number])
    assert (our_half[~number] & 0x7FFF > 0x7C00).all() and (our_bfloat16[~number] & 0x7FFF > 0x7F80).all()
    for toolkit, ours in (widened[:2], widened[2:]):
        np.testing.assert_array_equal(toolkit, ours)  # all 2^16 of them, eight times and more; NaN where NaN


# ---- Traffic


@watched
@pytest.mark.parametrize("stride,bytes,counts", [
    (4, 4, (128, 4, 1)),  # stride and bytes of each lane: bytes, sectors and requests of the warp
    (8, 4, (128, 8, 1)),
    (32, 4, (128, 32, 1)),
    (256, 4, (128, 32, 1)),
    (0, 4, (4, 1, 1)),
    (2, 4, None),
    (4, 8, (256, 9, 2)),  # each lane reads on where its neighbour has begun
    (64, 12, (384, 96, 3)),
])
def test_requests_of_a_warp(emulator, stride, bytes, counts):
    if counts is None:
        with pytest.raises(RuntimeError, match="misaligned"):
            emulator.count_reads(stride, bytes, "strided", 0)
        return
    read, sectors, _, _, requests = emulator.count_reads(stride, bytes, "strided", 0)
    assert (read, sectors, requests) == counts


@watched
@pytest.mark.parametrize("kind", ["vectors", "asynchronous"])
@pytest.mark.parametrize("offset,sectors", [(0, 16), (1, 17)])
def test_vectors_are_one_access(emulator, kind, offset, sectors):
    assert emulator.count_reads(0, 0, kind, offset) == (512, sectors, 512, 16, 2)


def test_memory_that_is_given_again_is_new(emulator):
    assert emulator.memory_given_again().tolist() == [2]


# ---- Wrong kernels


@watched
@pytest.mark.parametrize("barrier", ["before_write", "before_read"])
def test_missing_barrier_is_a_race(ordered, rows, barrier):
    message = r"(race: (reads|writes) what .*|reads memory that nothing has written) .*shared memory"
    with pytest.raises(RuntimeError, match=message):
        ordered.normalize(rows, **{barrier: False})


@watched
@pytest.mark.parametrize("mistake", ["no_commit", "no_wait", "waits_for_too_few"])
@pytest.mark.parametrize("tiles", [1, 2, 5])
def test_missing_wait_for_an_asynchronous_copy_is_reported(ordered, mistake, tiles):
    values = np.zeros((tiles, 64, 16), np.uint8)
    with pytest.raises(RuntimeError, match=r"reads what an asynchronous copy of thread \S+ is still to write .*shared"):
        ordered.reverse_tiles(values, 16, ordered.mistakes[mistake])


@watched
def test_missing_barrier_around_asynchronous_copies_is_reported(ordered):
    values = np.zeros((5, 64, 16), np.uint8)
    pending = "reads what an asynchronous copy of thread"
    with pytest.raises(RuntimeError, match=f"{pending}|race: reads what|reads memory that nothing has written"):
        ordered.reverse_tiles(values, 16, ordered.mistakes["no_barrier_before_read"])
    with pytest.raises(RuntimeError, match=f"{pending}|race: writes what thread"):
        ordered.reverse_tiles(values, 16, ordered.mistakes["no_barrier_after_read"])


@watched
def test_asynchronous_copies_order_nothing_between_threads(emulator):
    with pytest.raises(RuntimeError, match=r"race: reads what thread \(0,0,0\) writes .*shared memory"):
        emulator.launch("reads_copy_of_neighbour")
    with pytest.raises(RuntimeError, match=r"race: writes what thread \(0,0,0\) reads .*shared memory"):
        emulator.launch("copies_what_others_read")


@watched
def test_missing_fence_is_a_race(ordered):
    with pytest.raises(RuntimeError, match=r"race: reads what thread \(0,0,0\) of block \d+ writes .*global memory"):
        ordered.count_threads(24, 96, fence=False)


@watched
def test_missing_cluster_barrier_is_reported(ordered):
    values = np.ones((8, 64), np.int32)
    with pytest.raises(RuntimeError, match="reads memory that nothing has written|race: "):
        ordered.cluster_sum(values, 4, before=False)
    with pytest.raises(RuntimeError, match="shared memory of a block that has exited"):
        ordered.cluster_sum(values, 4, after=False)


@watched
@pytest.mark.parametrize("by_hand", [False, True])
def test_missing_grid_barrier_is_a_race(ordered, by_hand):
    with pytest.raises(RuntimeError, match=r"race: (reads|writes) what .*global memory"):
        ordered.rotate(np.ones((6, 64), np.int32), by_hand=by_hand, synchronized=False)


@watched
def test_writing_what_several_blocks_may_still_read_is_a_race(ordered):
    with pytest.raises(RuntimeError, match=r"race: (reads|writes) what .*global memory"):
        ordered.broadcast(5, 40, False)


@watched
def test_missing_warp_barrier_is_a_race(ordered):
    with pytest.raises(RuntimeError, match=r"reads memory that nothing has written|race: "):
        ordered.next_lane(False)


def test_barrier_made_by_hand_needs_all_blocks_at_once(ordered):
    with pytest.raises(RuntimeError, match="threads spin for what no other thread will do"):
        ordered.rotate(np.ones((6, 64), np.int32), by_hand=True, cooperative=False)


@watched
@pytest.mark.parametrize(
    "kernel, grid, message",
    [
        ("misaligned", 1, r"access of 16 bytes.* is misaligned by 12 bytes"),
        ("reads_past_global", 1, r"access of 4 bytes.* is out of bounds: it ends \d+ bytes past an array of 32"),
        ("writes_past_global", 1, r"access of 4 bytes.* is out of bounds: it ends \d+ bytes past an array of 32"),
        ("reads_before_global", 1, r"access of 4 bytes.* is out of bounds"),
        ("reads_past_shared", 1, r"access of 4 bytes.* is out of bounds: it ends 4 bytes past an array of 32"),
        ("reads_unwritten_shared", 1, r"reads memory that nothing has written \(byte 132 of 256 of shared memory\)"),
        ("all_write_one", 1, r"race: writes what thread \(\d+,0,0\) writes .*global memory"),
        ("blocks_write_one", 3, r"race: writes what thread \(0,0,0\) of block \d writes .*global memory"),
        ("writes_what_others_read", 1, r"race: (writes what several threads reads|reads what)"),
        ("plain_beside_atomic", 1, r"race: writes what thread"),
        ("spins", 1, r"spins without letting other threads run"),
        ("copies_from_shared", 1, r"asynchronous copy at \S+wrong_kernels.cuh:\d+ whose source is not global memory"),
        ("copies_to_global", 1, r"asynchronous copy at \S+ whose destination is not the block's shared memory"),
        ("copies_past_global", 1, r"access of 4 bytes.* is out of bounds: it ends 4 bytes past an array of 32"),
        ("reads_what_was_there", 1, r"reads what an asynchronous copy of thread \S+ is still to write"),
        ("overwrites_copy", 1, r"writes what an asynchronous copy of thread \S+ is still to write"),
        ("copies_twice", 1, r"writes what an asynchronous copy of thread \S+ is still to write"),
        ("copies_what_others_read", 1, r"race: writes what thread \S+ reads|race: reads what thread \S+ writes"),
    ],
)
def test_wrong_access_is_reported(ordered, kernel, grid, message):
    with pytest.raises(RuntimeError, match=message):
        ordered.launch(kernel, [grid])


@watched
def test_report_names_the_line(emulator):
    with pytest.raises(RuntimeError, match=r"at \S*wrong_kernels.cuh:\d+"):
        emulator.launch("all_write_one")


@watched
def test_write_past_dynamic_shared_memory_is_reported(emulator):
    emulator.touch_dynamic_shared(64 * 4)
    with pytest.raises(RuntimeError, match="access of 4 bytes.* out of bounds: it ends 4 bytes past an array of 252"):
        emulator.touch_dynamic_shared(64 * 4 - 4)


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
        ("one_block_leaves_the_grid", r"waits in grid.sync at \S+ for .* of block \(1,0,0\), which has exited"),
        ("waits_for_nobody", r"threads spin for what no other thread will do"),
        ("copies_misaligned_from", r"access of 16 bytes.* is misaligned by 4 bytes"),
        ("copies_misaligned_to", r"access of 8 bytes.* is misaligned by 4 bytes"),
        ("copies_12_bytes", r"asynchronous copy of 12 bytes at \S+: it must be 4, 8 or 16"),
        ("copies_zeros", r"__pipeline_memcpy_async that fills with zeros \(4 bytes\), which is not emulated"),
        ("copies_and_exits", r"exits before the asynchronous copy at \S+:\d+ has arrived: no wait is for it"),
        ("copies_uncommitted_and_exits", r"exits before the asynchronous copy at \S+:\d+ has arrived"),
        ("changes_source", r"the source of the asynchronous copy at \S+:\d+ was written before it arrived"),
        ("trap", r"^block \(1,0,0\), thread \(33,0,0\): __trap\(\)$"),
    ],
)
def test_wrong_kernel_is_reported(ordered, rows, kernel, message):
    with pytest.raises(RuntimeError, match=message) as error:
        ordered.launch(kernel, [2])
    assert str(error.value).startswith(("block (0,0,0), thread", "block (1,0,0), thread", "threads spin"))
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


def test_dynamic_shared_memory_above_48_kb_must_be_asked_for(emulator):
    kilobyte = 1024
    emulator.touch_dynamic_shared(48 * kilobyte)
    with pytest.raises(ValueError, match="invalid argument"):
        emulator.touch_dynamic_shared(48 * kilobyte + 1)
    emulator.touch_dynamic_shared(227 * kilobyte, limit=227 * kilobyte)
    with pytest.raises(ValueError, match="invalid argument"):
        emulator.touch_dynamic_shared(1, limit=227 * kilobyte + 1)


@pytest.fixture
def small_device(emulator):
    """One multiprocessor of compute capability 8, that is without clusters, and 64 KB of shared memory a block."""
    emulator.set_device(1, 8, 64 * 1024)
    yield emulator
    emulator.set_device(4, 9, 227 * 1024)


def test_launch_that_the_device_cannot_run_is_refused(small_device):
    with pytest.raises(ValueError, match="invalid argument"):
        small_device.touch_dynamic_shared(1, limit=64 * 1024 + 1)
    with pytest.raises(ValueError, match="operation not supported"):
        small_device.cluster_sum(np.ones((8, 64), np.int32), 4)
    small_device.rotate(np.ones((32, 64), np.int32))
    with pytest.raises(ValueError, match="too many blocks in cooperative launch"):
        small_device.rotate(np.ones((33, 64), np.int32))


def test_cluster_that_is_none_is_refused(emulator):
    with pytest.raises(ValueError, match="invalid configuration argument"):  # not a divisor of the grid
        emulator.cluster_sum(np.ones((6, 64), np.int32), 4)
    with pytest.raises(ValueError, match="invalid configuration argument"):  # more than 8 must be asked for
        emulator.cluster_sum(np.ones((16, 64), np.int32), 16, before=False)


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
    with pytest.raises(RuntimeError, match=r"absent\.cpp.* failed:\n.*error: "):
        build.load("absent")
