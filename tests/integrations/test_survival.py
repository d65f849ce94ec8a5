"""What other libraries do to a model, before patch or after it: results stay right, and the report tells."""

import copy

import accelerate
import peft
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from support import assert_no_less_accurate, randomize
from test_diffusers import autoencoder, reconstruct, reconstruct_unet, unet, unet_inputs
from torch.nn import functional as F

import ldm_fused


@pytest.fixture(params=["before patch", "after patch"])
def in_order(request):
    """Calls what another library does, and patch, in this order or in the other."""
    def run(model, disturb):
        steps = [lambda: disturb(model), lambda: ldm_fused.patch(model)]
        for step in steps if request.param == "before patch" else reversed(steps):
            step()
        return model
    return run


def same(model, expected, *inputs, tolerance=1e-5):
    with torch.no_grad():
        y = reconstruct_unet(model, *inputs) if len(inputs) > 1 else reconstruct(model, *inputs)
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


PICTURE = torch.randn(1, 3, 32, 32)


@pytest.fixture
def vae():
    return randomize(autoencoder())


@pytest.fixture
def expected(vae):
    with torch.no_grad():
        return reconstruct(vae, PICTURE)


def test_accelerate_offload(vae, expected, in_order):
    in_order(vae, lambda model: accelerate.cpu_offload(model, execution_device="cpu"))
    assert all(p.is_meta for p in vae.parameters())
    same(vae, expected, PICTURE)
    run = ldm_fused.report(vae)
    assert run.fallbacks["its forward is replaced"] >= 22
    accelerate.hooks.remove_hook_from_submodules(vae)


def test_accelerate_hook_on_a_block(vae, expected, in_order):
    """Which leaves the norms alone: they are fused."""
    class Doubling(accelerate.hooks.ModelHook):
        def post_forward(self, module, output):
            seen.append(module)
            return output

    seen = []
    in_order(vae, lambda model: accelerate.hooks.add_hook_to_module(model.decoder.mid_block.resnets[0], Doubling()))
    same(vae, expected, PICTURE)
    assert seen == [vae.decoder.mid_block.resnets[0]]


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_diffusers_group_offload(vae, expected, in_order, kind):
    options = dict(num_blocks_per_group=1) if kind == "block_level" else {}
    in_order(vae, lambda model: apply_group_offloading(model, onload_device=torch.device("cpu"), offload_type=kind,
                                                       **options))
    same(vae, expected, PICTURE)
    fallbacks = ldm_fused.report(vae).fallbacks
    assert fallbacks if kind == "leaf_level" else ldm_fused.report(vae).fused


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float8_e4m3fn])
def test_layerwise_casting(in_order, storage):
    def casting(model):
        model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)

    plain = randomize(unet())
    model, inputs = copy.deepcopy(plain), unet_inputs()
    casting(plain)
    with torch.no_grad():
        want = reconstruct_unet(plain, *inputs)
    in_order(model, casting)
    same(model, want, *inputs)
    assert ldm_fused.report(model).fused >= 20  # norms are not cast


@pytest.mark.parametrize("how", ["diffusers", "peft"])
def test_peft_lora_on_convolutions(in_order, how):
    def lora(model):
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, target_modules=["conv1", "conv2", "time_emb_proj"], init_lora_weights=False)
        model.add_adapter(config) if how == "diffusers" else peft.inject_adapter_in_model(config, model)

    plain = randomize(unet())
    model, inputs = copy.deepcopy(plain), unet_inputs()
    with torch.no_grad():
        without = reconstruct_unet(plain, *inputs)
    lora(plain)
    in_order(model, lora)
    model.load_state_dict(plain.state_dict(), strict=True)
    with torch.no_grad():
        want = reconstruct_unet(plain, *inputs)
    assert not torch.allclose(want, without, rtol=1e-2)
    same(model, want, *inputs)
    run = ldm_fused.report(model)
    assert run.fused >= 20 and not run.fallbacks  # the norms stay as they are
    for m in (plain, model):
        m.zero_grad()
        reconstruct_unet(m, *inputs).square().mean().backward()
    for (name, p), q in zip(plain.named_parameters(), model.parameters()):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-3 * p.grad.abs().max().item(), msg=name)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradient_checkpointing(vae, recompute):
    other = copy.deepcopy(vae)
    ldm_fused.patch(other, recompute=recompute)
    other.enable_gradient_checkpointing()
    gradients = []
    for model in (vae.train().double(), other.train().double()):
        y = reconstruct(model, PICTURE.double())
        gradients.append(torch.autograd.grad(y.square().sum(), list(model.parameters())))
    largest = max(g.abs().max().item() for g in gradients[0])
    for a, b in zip(*gradients):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-12 * largest)


def test_compile_fullgraph_with_dynamic_shapes(vae):
    ldm_fused.patch(vae)
    torch._dynamo.reset()
    model = vae.decoder.up_blocks[0]  # the whole decoder takes a minute and a half
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for size in (8, 12, 10):
            x = torch.randn(1, 64, size, size + 2)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    x = torch.randn(1, 64, 8, 6, requires_grad=True)
    found, want = (torch.autograd.grad(m(x).square().sum(), x)[0] for m in (compiled, model))
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


def test_export(vae, expected):
    ldm_fused.patch(vae)
    exported = torch.export.export(vae.decoder, (torch.randn(1, 4, 16, 16),))
    calls = [n for n in exported.graph.nodes if n.target is torch.ops.ldm_fused.group_norm_act.default]
    assert len(calls) == sum(isinstance(m, torch.nn.GroupNorm) for m in vae.decoder.modules())
    z = torch.randn(1, 4, 16, 16)
    torch.testing.assert_close(exported.module()(z), vae.decoder(z), rtol=1e-4, atol=1e-4)


def test_layout_that_flips_midway(vae):
    """As diffusers' decoder does behind its attention."""
    exact = reconstruct(copy.deepcopy(vae).double(), PICTURE.double())
    before = reconstruct(vae, PICTURE)
    ldm_fused.patch(vae)
    for module in (vae.decoder.mid_block, vae.encoder.mid_block):
        module.register_forward_hook(lambda module, args, y: y.contiguous(memory_format=torch.channels_last))
    assert_no_less_accurate(reconstruct(vae, PICTURE), before, exact, torch.float32)
    assert ldm_fused.report(vae).share == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_mixed_parameter_dtypes(dtype):
    model, inputs = randomize(unet()), unet_inputs()
    with torch.no_grad():
        exact = reconstruct_unet(copy.deepcopy(model).double(), inputs[0].double(), inputs[1], inputs[2].double())
    model.mid_block.to(dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        before = reconstruct_unet(model, *inputs)
        ldm_fused.patch(model)
        after = reconstruct_unet(model, *inputs)
    assert before.dtype == after.dtype and ldm_fused.report(model).fused
    errors = [(y.double() - exact).square().mean().sqrt() for y in (after, before)]
    assert errors[0] <= 1.2 * errors[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_16_bits(vae, dtype):
    with torch.no_grad():
        exact = reconstruct(copy.deepcopy(vae).to(dtype).double(), PICTURE.to(dtype).double())
        vae.to(dtype)
        before = reconstruct(vae, PICTURE.to(dtype))
        ldm_fused.patch(vae)
        after = reconstruct(vae, PICTURE.to(dtype))
    assert_no_less_accurate(after, before, exact, dtype)
    assert ldm_fused.report(vae).share == 1


def test_tiled_decoding(vae):
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = 32, 16
    x = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        want = reconstruct(vae, x)
        ldm_fused.patch(vae)
        same(vae, want, x)


def test_tiled_code_that_walks_blocks_by_itself(vae):
    """It collects a block's parts and runs them tile by tile with its own SiLU."""
    def walk(block, x):
        h = block.conv1(F.silu(block.norm1(x)))
        h = block.conv2(F.silu(block.norm2(h)))
        return h + (x if block.conv_shortcut is None else block.conv_shortcut(x))

    x = torch.randn(1, 64, 8, 8)
    block = vae.decoder.mid_block.resnets[0]
    want = walk(block, x)
    ldm_fused.patch(vae)
    assert torch.equal(walk(block, x), want)
    torch.testing.assert_close(block(x, None), want, rtol=1e-4, atol=1e-4)


def test_in_place_consumers(vae):
    """They write to what a block or a norm gives, also before a backward pass."""
    ldm_fused.patch(vae)
    block, x = vae.decoder.mid_block.resnets[0], torch.randn(1, 64, 8, 8, requires_grad=True)
    y = block(x, None)
    y.mul_(2).add_(1)
    y.sum().backward()
    kept = torch.randn(1, 64, 8, 8)
    before = kept.clone()
    with torch.no_grad():
        block(kept, None).zero_()
        vae.decoder.conv_norm_out(torch.randn(1, 32, 8, 8)).zero_()
    assert torch.equal(kept, before)


def test_unpatch_after_offloading(vae, expected):
    ldm_fused.patch(vae)
    accelerate.cpu_offload(vae, execution_device="cpu")
    ldm_fused.unpatch(vae)
    same(vae, expected, PICTURE)
    assert not ldm_fused.is_patched(vae)
