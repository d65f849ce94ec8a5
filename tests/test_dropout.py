"""Dropout inside the op: its generator, the mask in every kernel, and what follows from a mask that is never stored."""

from dataclasses import replace
from itertools import cycle
from types import SimpleNamespace

import emulated
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import LAYOUTS, assert_within_bound, eager, laid_out, make_case, oracle
from test_cuda_kernels import SMALL_DEVICES
from test_kernels import run
from torch.utils.checkpoint import checkpoint

import ldm_fused
from ldm_fused import ops

SEED = 0x0123456789ABCDEF
DTYPES = [(torch.float64, None), (torch.float32, None), (torch.bfloat16, None), (torch.float16, torch.float32),
          (torch.float32, torch.bfloat16)]
# Rows and pixels that are whole vectors, and not; tails of every length; more than one tile and draw of random bits.
SHAPES = [((2, 64, 8, 8), 32), ((3, 30, 7, 5), 3), ((2, 10), 2), ((2, 33, 31), 1), ((1, 4, 65, 129), 2),
          ((1, 2, 40000), 2), ((2, 8, 3, 4, 5), 4)]


# ---- The generator -----------------------------------------------------------------------------------------------


def philox(counter, key):
    """Philox4x32-10, after Salmon et al. 2011: four words for each counter, whose words are arrays."""
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    key0, key1 = key
    for _ in range(10):
        first, second = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (second >> np.uint64(32)) ^ c1 ^ np.uint64(key0), second & low
        c2, c3 = (first >> np.uint64(32)) ^ c3 ^ np.uint64(key1), first & low
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], -1).astype(np.uint32)


@pytest.mark.parametrize("counter,key,words", [
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], "d16cfe09 94fdcceb 5001e420 24126ea1"),
])
def test_known_answers(counter, key, words):
    """Of Random123, its authors' library."""
    assert [f"{word:08x}" for word in philox(counter, key)] == words.split()


def random_bits(count, seed):
    """16 for each of the elements in memory: element i has half i % 8 of the words of counter i / 8."""
    counters = np.arange((count + 7) // 8, dtype=np.uint64)
    none = np.zeros_like(counters)
    words = philox([counters & np.uint64(0xFFFFFFFF), counters >> np.uint64(32), none, none],
                   [seed & 0xFFFFFFFF, seed >> 32])
    return np.stack([words & 0xFFFF, words >> 16], -1).reshape(-1)[:count]


def factors(x, seed, p):
    """What each element of x is multiplied by."""
    kept = random_bits(x.numel(), seed) < round((1 - p) * 65536)
    kept = torch.from_numpy(kept.astype(np.float64)) / (1 - p)
    return torch.empty_like(x, dtype=torch.float64, device="cpu").copy_(kept.as_strided(x.shape, x.stride()))


def dropped(case, seed, p, **tensors):
    """The results that the oracle and eager give with dropout: a mask on y, and on dy on the way back."""
    mask = factors(case.x, seed, p)
    results = []
    for of in (oracle, eager):
        masked = of(replace(case, dy=case.dy.double() * mask if of is oracle else (case.dy * mask).to(case.dy.dtype)))
        exact = of(case)["y"]
        results.append({**masked, "y": (exact.double() * mask).to(exact.dtype)})
    return results


def with_dropout(kernels, seed, p):
    """Kernels that are given this seed and probability in every call."""
    seed = torch.tensor([seed], device=kernels.device)
    return SimpleNamespace(device=kernels.device, forward=lambda *a: kernels.forward(*a, seed, p),
                           backward=lambda *a: kernels.backward(*a, seed, p))


# ---- The kernels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype,out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape,num_groups", SHAPES, ids=str)
def test_forward_and_backward(kernels, shape, num_groups, dtype, out_dtype, layout):
    case = make_case(shape, num_groups, dtype, layout, out_dtype=out_dtype)
    if case is None:
        pytest.skip(f"{len(shape)}-D tensors have no channels_last")
    results = run(with_dropout(kernels, SEED, 0.3), case)
    assert_within_bound(case, results, *dropped(case, SEED, 0.3))
    plain = run(kernels, case)["y"]
    assert torch.equal(results["y"].cpu() != 0, (factors(case.x, SEED, 0.3) != 0) & (plain.cpu() != 0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("silu", [True, False])
def test_with_a_shortcut_and_without_an_activation(kernels, silu, layout):
    case = make_case((2, 12, 10, 6), 3, layout=layout, silu=silu, options=("weight", "bias"))
    shortcut = laid_out(torch.randn(case.x.shape), layout)
    expected = dropped(case, SEED, 0.5)
    for results in expected:
        results["x"] = results["x"] + shortcut.to(results["x"])
    found = run(with_dropout(kernels, SEED, 0.5), case, shortcut=shortcut.to(kernels.device))
    assert_within_bound(case, found, *expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_that_is_not_aligned_has_the_same_mask(kernels, dtype, layout):
    case = make_case((2, 64, 8, 8), 32, dtype, layout, options=())
    memory = torch.zeros(case.x.numel() + 1, dtype=dtype)[1:]
    moved = replace(case, x=memory.as_strided(case.x.shape, case.x.stride()).copy_(case.x))
    aligned, misaligned = (run(with_dropout(kernels, SEED, 0.5), c)["y"] for c in (case, moved))
    assert torch.equal(aligned != 0, misaligned != 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape,num_groups,dtype,out_dtype", [
    (*shape, *dtypes) for shape, dtypes in zip(cycle([((2, 20, 24, 32), 2), ((5, 16, 40, 40), 4), ((3, 24, 8, 11), 2)]),
                                               DTYPES[1:])], ids=str)
@pytest.mark.parametrize("name", SMALL_DEVICES)
def test_every_tier(name, shape, num_groups, dtype, out_dtype, layout):
    case = make_case(shape, num_groups, dtype, layout, out_dtype=out_dtype)
    kernels = SimpleNamespace(device="cpu", forward=emulated.group_norm_act, backward=emulated.group_norm_act_backward)
    with emulated.device(SMALL_DEVICES[name]):
        assert_within_bound(case, run(with_dropout(kernels, SEED, 0.3), case), *dropped(case, SEED, 0.3))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype,out_dtype", DTYPES[1:2], ids=str)
def test_whose_bits_are_the_bound_is_dropped_and_the_next_kept(kernels, dtype, out_dtype, layout):
    case = make_case((2, 8, 6, 5), 2, dtype, layout, options=(), silu=False)
    bits = random_bits(case.x.numel(), SEED)
    for bound in (int(np.sort(bits)[len(bits) // 2]), int(np.sort(bits)[len(bits) // 2]) + 1):
        p = 1 - bound / 65536
        kept = run(with_dropout(kernels, SEED, p), case)["y"].cpu() != 0
        assert torch.equal(kept, factors(case.x, SEED, p) != 0) and kept.sum() == (bits < bound).sum()


def test_nan_and_infinity_stay_where_they_are_dropped(kernels):
    case = make_case((1, 8, 6, 5), 2, options=())
    case.x[0, 2, 3, 3] = float("nan")
    y = run(with_dropout(kernels, SEED, 0.5), case)["y"]
    assert y[0, :4].isnan().all() and y[0, 4:].isfinite().all()


def test_the_mask_is_the_same_for_any_number_of_threads():
    case = make_case((2, 20, 65, 33), 2, layout="channels_last", options=())
    kernels = SimpleNamespace(device="cpu", forward=ops.group_norm_act, backward=ops.group_norm_act_backward)
    before, results = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(run(with_dropout(kernels, SEED, 0.3), case))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("seed,p,message", [
    (None, 0.5, "dropout_p needs a dropout_seed"),
    (torch.tensor([1]), 1.0, "dropout_p must be at least 0 and below 1"),
    (torch.tensor([1]), float("nan"), "dropout_p must be at least 0 and below 1"),
    (torch.tensor([1, 2]), 0.5, "dropout_seed must be one int64"),
    (torch.tensor([1], dtype=torch.int32), 0.5, "dropout_seed must be one int64"),
])
def test_unfit_seeds_are_refused(kernels, seed, p, message):
    case = make_case((2, 8, 5), 2, options=()).to(kernels.device)
    seed = None if seed is None else seed.to(kernels.device)
    y, mean, rstd = kernels.forward(*case.arguments())
    with pytest.raises(RuntimeError, match=message):
        kernels.forward(*case.arguments(), seed, p)
    with pytest.raises(RuntimeError, match=message):
        kernels.backward(case.dy, case.x, mean, rstd, None, None, True, None, None, None, [True] * 6, None, seed, p)


# ---- The mask ----------------------------------------------------------------------------------------------------


def drawn(p, shape=(4, 32, 64, 64), device="cpu"):
    """Which elements a call keeps, in memory's order."""
    x = torch.randn(shape, device=device)
    return (ldm_fused.group_norm_act(x, 2, activation=None, dropout_p=p) != 0).flatten()


def is_likely(count, trials, probability):
    """Within five standard deviations of a binomial's mean: what chance exceeds once in two million."""
    return abs(count - trials * probability) < 5 * (trials * probability * (1 - probability)) ** 0.5


@pytest.mark.parametrize("p", [2**-8, 0.1, 0.5, 0.9, 1 - 2**-8])
def test_rate_and_independence(device, p):
    first, second = drawn(p, device=device), drawn(p, device=device)
    trials = first.numel()
    assert is_likely(first.sum().item(), trials, 1 - p)
    assert is_likely((first & second).sum().item(), trials, (1 - p) ** 2), "of one call and the next"
    for distance in (1, 2, 4, 7, 8, 64, 4096):  # neighbours in a counter, across counters, rows and channels
        together = (first[:-distance] & first[distance:]).sum().item()
        assert is_likely(together, trials - distance, (1 - p) ** 2), distance


def test_each_place_in_a_counter_is_kept_equally_often():
    kept = drawn(0.3).view(-1, 8)
    assert all(is_likely(count, len(kept), 0.7) for count in kept.sum(0).tolist())


@pytest.mark.parametrize("p", [1e-3, 0.25, 0.999])
def test_kept_elements_are_divided_by_the_probability_to_be_kept(device, p):
    x = torch.randn(2, 8, 40, 40, device=device)
    y, plain = ldm_fused.group_norm_act(x, 2, dropout_p=p), ldm_fused.group_norm_silu(x, 2)
    torch.testing.assert_close(y, torch.where(y != 0, plain / (1 - p), 0.0))


def test_probabilities_of_zero_and_one(device):
    x = torch.randn(2, 8, 6, 5, device=device, requires_grad=True)
    assert torch.equal(ldm_fused.group_norm_act(x, 2, dropout_p=0.0), ldm_fused.group_norm_silu(x, 2))
    y = ldm_fused.group_norm_act(x, 2, dropout_p=1.0)
    assert not y.any() and not torch.autograd.grad(y.sum(), x)[0].any()


def test_the_generator_repeats_and_goes_on(device):
    torch.manual_seed(5)
    first, second = drawn(0.5, (2, 8, 30), device), drawn(0.5, (2, 8, 30), device)
    torch.manual_seed(5)
    assert torch.equal(drawn(0.5, (2, 8, 30), device), first) and not torch.equal(first, second)


# ---- Autograd, transforms, compilers -------------------------------------------------------------------------------


def masked(x, function):
    """``function(x)``, and what it must be: the composed op times the mask that it has drawn."""
    y = function(x)
    mask = (y.detach() != 0) / 0.5
    return y, F.silu(F.group_norm(x, 2)) * mask


@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_and_second_derivatives(device, layout):
    x = laid_out(torch.randn(2, 6, 5, 3, dtype=torch.float64, device=device), layout).requires_grad_()
    ours, expected = masked(x, lambda x: ldm_fused.group_norm_act(x, 2, dropout_p=0.5))
    dy = torch.randn_like(ours).requires_grad_()
    first, theirs = (torch.autograd.grad(y, x, dy, create_graph=True)[0] for y in (ours, expected))
    torch.testing.assert_close(first, theirs)
    for a, b in zip(*(torch.autograd.grad(g.square().sum(), (x, dy)) for g in (first, theirs))):
        torch.testing.assert_close(a, b)


def test_only_the_input_and_a_seed_are_saved(device):
    x = torch.randn(2, 8, 16, 16, device=device, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ldm_fused.group_norm_act(x, 2, dropout_p=0.5)
    assert [t.data_ptr() for t in saved if t.numel() >= x.numel()] == [x.data_ptr()]
    assert [t.numel() for t in saved if t.dtype == torch.int64] == [1]


def test_hooks_on_saved_tensors_may_change_their_layout(device):
    x = torch.randn(2, 6, 5, 3, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
        ours, expected = masked(x, lambda x: ldm_fused.group_norm_act(x, 2, dropout_p=0.5))
    found, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, expected))
    torch.testing.assert_close(found, theirs)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_mask_again(device, use_reentrant):
    x = torch.randn(2, 6, 5, 3, device=device, requires_grad=True)
    function = lambda x: ldm_fused.group_norm_act(x, 2, dropout_p=0.5)  # noqa: E731
    ours, expected = masked(x, lambda x: checkpoint(function, x, use_reentrant=use_reentrant))
    found, theirs = (torch.autograd.grad(y.square().sum(), x)[0] if not use_reentrant or y is expected
                     else (y.square().sum().backward(), x.grad)[1] for y in (ours, expected))
    torch.testing.assert_close(found, theirs)


def test_transforms_compose_it(device):
    x = torch.randn(3, 2, 6, 5, device=device)
    function = lambda x: ldm_fused.group_norm_act(x, 2, dropout_p=0.5)  # noqa: E731
    y, tangent = torch.func.jvp(function, (x[0],), (torch.randn_like(x[0]),))
    assert torch.equal(tangent != 0, y != 0)
    masks = torch.func.vmap(function, randomness="different")(x) != 0
    assert not torch.equal(masks[0], masks[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(function)(x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fullgraph_behind_a_convolution(device, layout):
    """Inductor chooses its own layouts in between: the mask must be the same in both passes."""
    torch._dynamo.reset()
    conv = torch.nn.Conv2d(3, 8, 3, padding=1).to(device)
    x = laid_out(torch.randn(2, 3, 9, 7, device=device), layout)
    compiled = torch.compile(lambda x: ldm_fused.group_norm_act(conv(x), 2, dropout_p=0.5) * 1.0, fullgraph=True)
    y = compiled(x)
    expected = F.silu(F.group_norm(conv(x), 2)) * ((y.detach() != 0) / 0.5)
    dy = torch.randn_like(y)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(*(torch.autograd.grad(t, list(conv.parameters()), dy) for t in (y, expected))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not torch.equal(compiled(x) != 0, y != 0)


def test_export_draws_at_each_call(device):
    class Module(torch.nn.Module):
        def forward(self, x):
            return ldm_fused.group_norm_act(x, 2, dropout_p=0.5)

    x = torch.randn(2, 8, 6, 6, device=device)
    exported = torch.export.export(Module(), (x,)).module()
    assert not torch.equal(exported(x), exported(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(device, layout):
    case = make_case((2, 6, 4, 5), 3, layout=layout).to(device)
    seed = torch.tensor([SEED], device=device)
    arguments = [t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in case.arguments()]
    torch.library.opcheck(ops.group_norm_act, (*arguments, seed, 0.5))
    _, mean, rstd = ops.group_norm_act(*case.arguments())
    torch.library.opcheck(ops.group_norm_act_backward, (
        case.dy, *(t.detach() for t in (case.x, mean, rstd, case.weight, case.bias)), True,
        *(t.detach() for t in (case.pre_bias, case.scale, case.shift)), [True] * 6, None, seed, 0.5))


