"""ldm_fused.patch(model, memory_format=torch.channels_last), and the memory that a patched model takes."""

import copy
import pickle

import pytest
import torch
from oracle import laid_out
from patched import TwoNorms, assert_close, random, randomize, results
from torch import nn
from watched import LayoutCopies, LiveBytes, peak_of

import ldm_fused
from benchmarks.autoencoder import AutoencoderKL, Decoder
from ldm_fused import FusedResnetBlock, UnsupportedBlock, reference

pytestmark = pytest.mark.usefixtures("one_thread")

BOTH = {"fold_upsample": True, "memory_format": torch.channels_last}


class NormAct(nn.Sequential):
    def __init__(self, *args, **options):
        super().__init__(nn.GroupNorm(*args, **options), nn.SiLU())


def autoencoder():
    return randomize(AutoencoderKL(reference.ResnetBlock, NormAct, ch=32, ch_mult=(1, 2, 2), num_res_blocks=1))


def test_weights_are_laid_out_once_and_get_their_strides_back():
    model = autoencoder()
    nn.utils.parametrizations.weight_norm(model.decoder.conv_out)
    parameters, state = list(model.parameters()), {name: t.clone() for name, t in model.state_dict().items()}
    strides, classes = [p.stride() for p in parameters], [type(m) for m in model.modules()]
    x = torch.randn(1, 3, 16, 16)
    expected = model(x)
    found = ldm_fused.patch(model, memory_format=torch.channels_last)
    assert len(found.laid_out) == sum(isinstance(m, nn.Conv2d) for m in model.modules()) and not found.skipped
    assert f"laid out {len(found.laid_out)} modules" in str(found)
    assert all(a is b for a, b in zip(parameters, model.parameters()))
    for p in parameters:
        assert p.dim() != 4 or p.stride() == torch.empty(p.shape, memory_format=torch.channels_last).stride()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert type(model.decoder.conv_in) is nn.Conv2d
    assert ldm_fused.patch(model, memory_format=torch.channels_last).laid_out == []
    assert_close([model(x)], [expected], 1e-4)
    ldm_fused.unpatch(model)
    assert not ldm_fused.is_patched(model)
    assert [p.stride() for p in parameters] == strides and [type(m) for m in model.modules()] == classes
    assert torch.equal(model(x), expected)


def test_a_weight_of_two_modules():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    model[1].weight = model[0].weight
    strides = model[0].weight.stride()
    assert len(ldm_fused.patch(model, memory_format=torch.channels_last).laid_out) == 2
    assert model[1].weight is model[0].weight and model[0].weight.stride() != strides
    ldm_fused.unpatch(model)
    assert model[0].weight.stride() == strides


def test_what_was_in_channels_last_before_stays():
    model = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    found = ldm_fused.patch(model, memory_format=torch.channels_last)
    assert not found.laid_out and not ldm_fused.is_patched(model)
    ldm_fused.unpatch(model)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("other", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles(other):
    model, x = autoencoder(), torch.randn(1, 3, 16, 16)
    expected = model(x)
    ldm_fused.patch(model, **BOTH)
    found = other(model)
    assert torch.equal(found(x), model(x)) and ldm_fused.report(found).upsamplings[0].calls == 1
    ldm_fused.unpatch(found)
    assert torch.equal(found(x), expected) and all(p.is_contiguous() for p in found.parameters())
    assert ldm_fused.is_patched(model) and not model.decoder.conv_in.weight.is_contiguous()


def test_a_weight_that_was_replaced_since():
    model = autoencoder()
    state = copy.deepcopy(model.state_dict())
    ldm_fused.patch(model, **BOTH)
    model.load_state_dict(state, assign=True)
    assert ldm_fused.patch(model, memory_format=torch.channels_last).laid_out
    model.decoder.conv_in = nn.Conv2d(4, 64, 3, padding=1)
    model.decoder.conv_out.weight = nn.Parameter(torch.randn(5, 32, 3, 3))
    ldm_fused.unpatch(model)
    assert all(p.is_contiguous() for p in model.parameters()) and not ldm_fused.is_patched(model)


def shared():
    conv = nn.Conv2d(8, 8, 3)
    conv.share_memory()
    return conv


def part():
    conv = nn.Conv2d(8, 8, 3)
    conv.weight.data = torch.randn(2, 8, 8, 3, 3)[1]
    return conv


@pytest.mark.parametrize("make,memory_format,reason", [
    (lambda: nn.Conv3d(8, 8, 3), torch.channels_last, "has 5 axes"),
    (lambda: nn.Conv2d(8, 8, 3), torch.channels_last_3d, "has 4 axes"),
    (lambda: nn.Conv1d(8, 8, 3), torch.channels_last, "has 3 axes"),
    (lambda: nn.Conv2d(8, 8, 3, device="meta"), torch.channels_last, "is on meta"),
    (lambda: nn.LazyConv2d(8, 3), torch.channels_last, "has no shape yet"),
    (shared, torch.channels_last, "is in shared memory"),
    (part, torch.channels_last, "is a part of a larger tensor"),
], ids=str)
def test_what_is_not_laid_out_is_reported(make, memory_format, reason):
    model = nn.Sequential(make(), nn.GroupNorm(8, 8))
    found = ldm_fused.patch(model, memory_format=memory_format)
    [(name, cls, told)] = found.skipped
    assert name == "0" and reason in told and not found.laid_out
    ldm_fused.unpatch(model)
    with pytest.raises(UnsupportedBlock, match=reason):
        ldm_fused.patch(model, memory_format=memory_format, strict=True)
    assert not ldm_fused.is_patched(model)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.preserve_format, "channels_last"])
def test_other_memory_formats_are_refused(memory_format):
    with pytest.raises(ValueError, match="memory_format must be"):
        ldm_fused.patch(TwoNorms(), memory_format=memory_format)


def test_three_dimensions():
    model = nn.Sequential(nn.Conv3d(4, 16, 3, padding=1), nn.GroupNorm(8, 16), nn.SiLU(), nn.Conv3d(16, 4, 1))
    x = random(2, 4, 3, 4, 5, dtype=torch.float32)  # of one small sample PyTorch's own convolution gives it contiguous
    expected = results(model, (x,))
    assert len(ldm_fused.patch(model, memory_format=torch.channels_last_3d, strict=True).laid_out) == 2
    with LayoutCopies() as copies:
        model(x)
    assert copies.found == [("aten::convolution", tuple(x.shape))]
    assert_close(results(model, (x,)), expected, 1e-4)


# ---- Activations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_a_whole_autoencoder_copies_its_input_alone(dtype):
    """Into channels_last; the latent's few channels are counted, too."""
    model, x = autoencoder().to(dtype), torch.randn(2, 3, 24, 16, dtype=dtype)
    ldm_fused.patch(model, strict=True, **BOTH)
    z = model.encode(x)
    for call, given in ((model.encode, x), (model.decode, z.contiguous())):
        with LayoutCopies() as copies:
            y = call(given)
        assert copies.found == [("aten::convolution", tuple(given.shape))]
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_training_copies_no_more():
    model, z = autoencoder(), torch.randn(1, 4, 4, 6, requires_grad=True)
    ldm_fused.patch(model, strict=True, **BOTH)
    with LayoutCopies() as copies:
        y = model.decode(z)
    assert copies.found == [("aten::convolution", (1, 4, 4, 6))] and y.requires_grad


def test_a_block_brings_a_contiguous_input_into_channels_last():
    block = randomize(reference.ResnetBlock(in_channels=32, dropout=0.0))
    ldm_fused.patch(block, memory_format=torch.channels_last)
    assert block(torch.randn(2, 32, 6, 5)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(2, 16, 7), (2, 16, 3, 2, 2, 2)])
def test_the_op_keeps_channels_innermost_in_any_number_of_axes(shape):
    x = laid_out(torch.randn(shape, dtype=torch.float64), "channels_last").requires_grad_()
    weight, bias = torch.randn(2, 16, dtype=torch.float64).requires_grad_()

    def op(x):
        return ldm_fused.group_norm_silu(x, 4, weight, bias)

    torch._dynamo.reset()
    expected = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 4, weight, bias))
    dy = torch.randn_like(expected)
    for f in (op, torch.compile(op, fullgraph=True, backend="aot_eager")):
        y = f(x)
        [dx] = torch.autograd.grad(y, x, dy)
        assert y.stride() == dx.stride() == x.stride()
        assert_close([y, dx], [expected, *torch.autograd.grad(expected, x, dy, retain_graph=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("options", [{"fold_upsample": True}, {"memory_format": torch.channels_last}, BOTH], ids=[
    "fold", "layout", "both"])
def test_accuracy_of_a_decoder(dtype, batch, options):
    """Root mean square errors of output and gradients against float64 are at most 1.5 times eager's, borders' too."""
    model = randomize(Decoder(reference.ResnetBlock, NormAct, 32, (1, 2), 1, 4)).to(dtype)
    z = torch.randn(batch, 4, 7, 5).to(dtype).requires_grad_()

    def errors(model, z, exact=None):
        y, *gradients = results(model, (z,))
        borders = [y.select(axis, end) for axis in (2, 3) for end in (0, -1)]
        found = [t.detach().double() for t in (y, *borders)], torch.cat([g.double().flatten() for g in gradients])
        found = [*found[0], found[1]]
        return found if exact is None else [(a - b).square().mean().sqrt() for a, b in zip(found, exact)]

    exact = errors(copy.deepcopy(model).double(), z.detach().double().requires_grad_())
    theirs = errors(model, z, exact)
    ldm_fused.patch(model, strict=True, **options)
    for ours, eager in zip(errors(model, z, exact), theirs):
        assert ours <= 1.5 * eager


# ---- Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels,out_channels", [(32, 32), (32, 64), (64, 32)])
@torch.no_grad()
def test_a_block_takes_three_activations_in_inference(channels, out_channels, memory_format):
    """Its input is one of them. What its convolutions allocate inside is not seen."""
    block = FusedResnetBlock(in_channels=channels, out_channels=out_channels, dropout=0.0)
    x = torch.randn(1, channels, 32, 32).contiguous(memory_format=memory_format)
    peak, y = peak_of(block, x)
    assert peak + x.nbytes <= 3 * max(x.nbytes, y.nbytes) * 1.01


@torch.no_grad()
def test_a_decoders_peak():
    model = randomize(Decoder(reference.ResnetBlock, NormAct, 32, (1, 2, 4), 1, 4))
    z = torch.randn(1, 4, 16, 16)
    eager, _ = peak_of(model, z)
    ldm_fused.patch(model, strict=True, **BOTH)
    ours, _ = peak_of(model, z)
    assert ours <= 0.75 * eager, f"{ours / eager:.2f}"


def test_a_training_step_keeps_no_more_than_autograd_asks_for():
    """Behind the forward pass live what was saved for the backward pass, and the output."""
    model = randomize(Decoder(reference.ResnetBlock, NormAct, 32, (1, 2), 1, 4))
    z, saved = torch.randn(1, 4, 16, 16), {}
    ldm_fused.patch(model, strict=True, **BOTH)
    with LiveBytes() as live, torch.autograd.graph.saved_tensors_hooks(
            lambda t: (saved.setdefault(t.untyped_storage()._cdata, t.untyped_storage().nbytes()), t)[1], lambda t: t):
        y = model(z)
        live.peak = 0
        torch.zeros(1)
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = sum(size for key, size in saved.items() if key not in parameters)
    assert live.peak <= kept + y.nbytes + 2**12
