"""ldm_fused.patch on minimal classes of other libraries' structure (tests/libraries).

Each adapter is seen to fuse and to fall back. tests/integrations has the same for the real libraries.
"""

import inspect
import threading

import pytest
import torch
from patched import TwoNorms, assert_close, check, hook, random, randomize, results
from torch import nn
from torch.nn import functional as F

import ldm_fused
from ldm_fused import FusedResnetBlock, functional
from ldm_fused.compat import ldm as compat
from ldm_fused.patching import pair

pytestmark = pytest.mark.usefixtures("one_thread")  # tensors are small here, and kernels have their own tests

LDM = {"identity": dict(), "1x1 shortcut": dict(out_channels=64),
       "3x3 shortcut": dict(out_channels=64, conv_shortcut=True),
       "time embedding": dict(out_channels=64, temb_channels=24)}
LDM_FILES = ["ldm.modules.diffusionmodules.model", "sgm.modules.diffusionmodules.model", "somebodys.copy"]


@pytest.mark.parametrize("file", LDM_FILES)
@pytest.mark.parametrize("name", LDM)
def test_ldm_block(file, name, load, biases):
    block = load(file).ResnetBlock(in_channels=32, dropout=0.1, **{"temb_channels": 0, **LDM[name]}).double()
    temb = random(2, 24) if hasattr(block, "temb_proj") else None
    patched, run = check(block, (random(2, 32, 6, 8), temb))
    assert patched.replaced[0][2] == ("norm1", "norm2") and run.share == 1


@pytest.mark.parametrize("file", LDM_FILES)
def test_ldm_decoder(file, load):
    patched, run = check(load(file).Decoder().double(), (random(2, 4, 8, 6),))
    assert not patched.skipped and run.share == 1
    assert [row.name for row in run.sites] == [
        "norm_out", "mid.attn_1.norm", *(f"up.{i}.norm{j}" for i in (0, 1) for j in (1, 2))]


def test_ldm_norm_out_is_fused_with_its_activation_in_the_decoders_forward_only(load, monkeypatch):
    decoder = load("ldm.modules.diffusionmodules.model").Decoder()
    ldm_fused.patch(decoder)
    calls, op = [], functional.group_norm_act
    monkeypatch.setattr(functional, "group_norm_act",
                        lambda *a, **o: calls.append(o.get("activation", "silu")) or op(*a, **o))
    x = torch.randn(2, 64, 5, 4)
    h = decoder.norm_out(x)
    assert torch.equal(h, F.group_norm(x, 8, decoder.norm_out.weight, decoder.norm_out.bias, 1e-6)) and not calls
    decoder(torch.randn(2, 4, 5, 4))
    assert calls[-1] == "silu"
    calls.clear()
    torch.compile(decoder, backend="eager", fullgraph=True)(torch.randn(2, 4, 5, 4))
    assert calls == [] or calls[-1] is None


def test_ldm_decoders_that_fail_or_run_side_by_side_or_nested_leave_no_trace(load):
    decoder = load("ldm.modules.diffusionmodules.model").Decoder().double()
    randomize(decoder)
    z = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    expected = decoder(z)
    ldm_fused.patch(decoder)
    x = torch.randn(2, 64, 5, 4, dtype=torch.float64)
    alone = F.group_norm(x, 8, decoder.norm_out.weight, decoder.norm_out.bias, 1e-6)

    entered = []

    def inside(module, args):  # while the decoder's forward runs, it is called by another thread, and by the same
        if entered:
            return
        entered.append(True)
        seen = []
        thread = threading.Thread(target=lambda: seen.extend([decoder.norm_out(x), decoder(z)]))
        thread.start()
        thread.join(60)
        assert torch.equal(seen[0], alone)
        torch.testing.assert_close(seen[1], expected)
        torch.testing.assert_close(decoder(z), expected)

    handle = decoder.conv_out.register_forward_pre_hook(inside)
    torch.testing.assert_close(decoder(z), expected)
    handle.remove()
    with pytest.raises(RuntimeError):
        decoder(torch.randn(2, 5, 5, 4, dtype=torch.float64))
    assert torch.equal(decoder.norm_out(x), alone)


def test_the_source_tells_whether_the_activation_follows_the_norm(load):
    Decoder = load("somebodys.copy").Decoder
    names = {**Decoder.forward.__globals__, "Decoder": Decoder, "super": super}

    def told(body, monkeypatch):
        """What is found behind norm_out in a forward of these lines."""
        source = "def forward(self, z):\n" + "\n".join("    " + line for line in body)
        exec(compile(source, "<made up>", "exec"), names)
        monkeypatch.setattr(pair.inspect, "getsource", lambda f: source)
        return pair.activation_behind(names["forward"], "norm_out")

    with pytest.MonkeyPatch.context() as m:
        assert told(["h = self.norm_out(z)", "h = nonlinearity(h)", "return self.conv_out(h)"], m) == "nonlinearity"
        lines = ["if z is not None:", "    h = self.norm_out(z)", "    h = nonlinearity(h)", "return h"]
        assert told(lines, m) == "nonlinearity"
        assert told(["return self.conv_out(nonlinearity(self.norm_out(z)))"], m) == "nonlinearity"
        assert told(["h = self.norm_out(z)", "h = [nonlinearity(h)]", "return h"], m) == "nonlinearity"
        assert told(["return self.conv_out(nn.functional.silu(self.norm_out(z)))"], m) == "nn.functional.silu"
        lines = ["if self.norm_out is not None:", "    z = self.norm_out(z)", "    z = self.act(z)", "return z"]
        assert told(lines, m) == "self.act"
        for body in (
            ["h = self.norm_out(z)", "y = nonlinearity(h)", "return y + h"],
            ["return nonlinearity(self.norm_out(z), 2)"], ["return (lambda h: h)(self.norm_out(z))"],
            ["h = nonlinearity(self.norm_out(z))", "return h + self.norm_out(z)"],
            ["h = self.norm_out(z)", "h = h + 1", "h = nonlinearity(h)", "return h"],
            ["h = self.norm_out(z)", "h = nonlinearity(z)", "return h"],
            ["h = self.norm_out(z)", "h = nonlinearity(h, 2)", "return h"],
            ["h = self.norm_out(z)", "h = nonlinearity(h)", "return self.norm_out(h)"],
            ["h = self.other(z)", "h = nonlinearity(h)", "return h"],
            ["if self.norm_out(z):", "    h = self.norm_out(z)", "    h = nonlinearity(h)", "return h"],
            ["h = k = self.norm_out(z)", "h = nonlinearity(h)", "return k"],
            ["return self.conv_out(z)"],
        ):
            assert told(body, m) is None, body
        m.setattr(pair.inspect, "getsource", lambda f: "not python")
        assert pair.activation_behind(lambda self: None, "norm_out") is None


def test_a_decoder_with_another_function_is_not_fused_with_it(load):
    file = load("somebodys.copy")
    file.nonlinearity = exec("def nonlinearity(x):\n    return x.relu()", vars(file)) or vars(file)["nonlinearity"]
    decoder = randomize(file.Decoder(blocks=False).double())
    z = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    expected = decoder(z)
    found = ldm_fused.patch(decoder)
    assert [name for name, _, _ in found.replaced] == ["mid.attn_1.norm", "norm_out"]
    torch.testing.assert_close(decoder(z), expected)


class Ending(nn.Module):
    """Its forward has changed since somebody wrote an adapter for it."""

    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.GroupNorm(8, 32), nn.SiLU()

    def forward(self, x):
        return torch.relu(self.norm(x))


def test_a_parent_whose_forward_does_not_call_the_activation_falls_back(registered):
    registered(Ending, pair.Parent("norm", "act"))
    model, x = randomize(Ending()), torch.randn(2, 32, 5)
    expected = model(x)
    ldm_fused.patch(model, norms=False)
    for _ in range(2):
        assert torch.equal(model(x), expected)
    assert ldm_fused.report(model).fallbacks == {"act was not called on what norm gave": 2}


OPENAI = {"default": dict(), "scale-shift norm": dict(use_scale_shift_norm=True, out_channels=64), "up": dict(up=True),
          "down": dict(down=True, use_scale_shift_norm=True), "checkpoint": dict(use_checkpoint=True, out_channels=64)}


@pytest.mark.parametrize("name", OPENAI)
@pytest.mark.parametrize("file", ["guided_diffusion.unet", "improved_diffusion.unet",
                                  "ldm.modules.diffusionmodules.openaimodel", "sgm.modules.diffusionmodules.openaimodel"])
def test_openai_unet(file, name, load, biases):
    load(file.replace(".unet", ".nn").replace(".openaimodel", ".util"))
    model = load(file).UNet(**OPENAI[name])
    patched, run = check(model, (random(2, 32, 8, 6, dtype=torch.float32), random(2, 24, dtype=torch.float32)),
                         tolerance=2e-4)
    assert not patched.skipped and run.share == 1
    assert [row.name for row in run.sites] == ["block.in_layers.0", "block.out_layers.0", "norm", "out.0"]


def test_a_subclass_that_keeps_the_method_is_fused(load):
    """As SVD's VideoResBlock, whose forward goes on with what its base's gives."""
    load("sgm.modules.diffusionmodules.util")
    ResBlock = load("sgm.modules.diffusionmodules.openaimodel").ResBlock

    class VideoResBlock(ResBlock):
        def __init__(self):
            super().__init__(32, 24, 0.0, out_channels=64)
            self.time_stack = ResBlock(64, 24, 0.0)

        def forward(self, x, emb, num_video_frames=1):
            x = super().forward(x, emb)
            return 0.5 * x + 0.5 * self.time_stack(x, emb)

    arguments = random(2, 32, 8, 6, dtype=torch.float32), random(2, 24, dtype=torch.float32)
    patched, run = check(VideoResBlock(), arguments, tolerance=2e-4)
    assert not patched.skipped and run.share == 1 and run.fused >= 4
    assert [name for name, _, _ in patched.replaced] == ["", "time_stack"]


@pytest.mark.parametrize("part", ["in_layers", "in_layers.0", "out_layers.1", "skip_connection"])
def test_openai_block_with_a_hooked_part(part, load):
    load("guided_diffusion.nn")
    block = randomize(load("guided_diffusion.unet").ResBlock(32, 24, 0.0, out_channels=64))
    block.get_submodule(part).register_forward_hook(lambda module, args, output: 2 * output)
    arguments = random(2, 32, 8, 6, dtype=torch.float32), random(2, 24, dtype=torch.float32)
    expected = results(block, arguments)
    ldm_fused.patch(block)
    assert_close(results(block, arguments), expected, 2e-4)
    reasons = {"in_layers": {"its in_layers: it has hooks": 2}, "in_layers.0": {"it has hooks": 1},
               "out_layers.1": {"its activation: it has hooks": 1}, "skip_connection": {}}
    assert ldm_fused.report(block).fallbacks == reasons[part]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_group_norm_32_in_16_bits(dtype, load):
    norm = randomize(load("guided_diffusion.nn").GroupNorm32(8, 32))
    x = torch.randn(2, 32, 9).to(dtype)
    expected = norm(x)
    ldm_fused.patch(norm)
    y = norm(x)
    assert ldm_fused.report(norm).fused == 1 and y.dtype == expected.dtype == dtype
    torch.testing.assert_close(y, expected)


def doubled(self, x):
    return 2 * nn.GroupNorm.forward(self, x)


def test_another_group_norm_32_is_left(load):
    file = load("guided_diffusion.nn")
    file.GroupNorm32.forward = doubled
    for model in (file.GroupNorm32(8, 32), nn.Sequential(file.GroupNorm32(8, 32), nn.SiLU())):
        found = ldm_fused.patch(model)
        assert not found.replaced and "it does not give group_norm's result" in found.skipped[0][2]


@pytest.mark.parametrize("file", ["flux.modules.autoencoder", "somebodys.flux"])
def test_flux_decoder(file, load, biases):
    patched, run = check(load(file).Decoder().double(), (random(2, 4, 8, 6),))
    assert not patched.skipped and run.share == 1
    assert [row.name for row in run.sites] == ["norm_out", *(f"blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2))]


class Relu(TwoNorms):
    def forward(self, x):
        return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


@pytest.mark.parametrize("make", [
    lambda load: FusedResnetBlock(in_channels=32, dropout=0.0), lambda load: compat.ResnetBlock(in_channels=32, dropout=0.0),
    *(lambda load, file=file: load(file).ResnetBlock(in_channels=32, dropout=0.0, temb_channels=0) for file in LDM_FILES),
    *(lambda load, file=file: load(file).ResnetBlock(32, 32) for file in ("flux.modules.autoencoder", "somebodys.flux")),
], ids=["fused", "compat", *LDM_FILES, "flux", "somebodys.flux"])
def test_a_hooked_norm_of_any_block_falls_back(make, load):
    block, x = randomize(make(load)).double(), torch.randn(2, 32, 6, 5, dtype=torch.float64)
    arguments = (x, None) if "temb" in inspect.signature(block.forward).parameters else (x,)
    assert ldm_fused.patch(block).replaced
    block.norm2.register_forward_hook(lambda module, args, output: 2 * output)
    with ldm_fused.disabled():
        expected = block(*arguments)
    assert_close([block(*arguments)], [expected])
    first, second = ldm_fused.report(block).sites
    assert (first.calls, first.fallbacks) == (1, {}) and (second.calls, second.fallbacks) == (0, {"it has hooks": 1})


def test_other_blocks_of_the_same_parts_are_left():
    found = ldm_fused.patch(nn.ModuleList([TwoNorms(), Relu()]))
    assert [name for name, _, _ in found.replaced] == ["0", "1.norm1", "1.norm2"]
    [(name, cls, reason)] = found.skipped
    assert name == "1" and cls is Relu and "is not swish" in reason


def test_flux_decoder_with_a_hooked_norm(load):
    decoder = randomize(load("flux.modules.autoencoder").Decoder()).double()
    hook(decoder.norm_out)
    hook(decoder.blocks[1].norm1)
    z = random(2, 4, 8, 6)
    expected = results(decoder, (z,))
    ldm_fused.patch(decoder)
    assert_close(results(decoder, (z,)), expected)
    assert ldm_fused.report(decoder).fallbacks == {"it has hooks": 2} and ldm_fused.report(decoder).fused == 3


def test_group_norm_32_calls_what_replaces_group_norms_forward(load, monkeypatch):
    """As A1111's Lora extension does."""
    load("guided_diffusion.nn")
    model = randomize(load("guided_diffusion.unet").UNet())
    arguments = random(2, 32, 8, 6, dtype=torch.float32), random(2, 24, dtype=torch.float32)
    ldm_fused.patch(model)
    forward = nn.GroupNorm.forward
    monkeypatch.setattr(nn.GroupNorm, "forward", lambda self, x: 2 * forward(self, x))
    found = results(model, arguments)
    run = ldm_fused.report(model)
    assert run.fused == 0 and set(run.fallbacks) == {"GroupNorm.forward is replaced"}
    with ldm_fused.disabled():
        assert_close(found, results(model, arguments), 2e-4)


def test_comfy_block(load):
    load("comfy.ops")
    ResnetBlock = load("comfy.ldm.modules.diffusionmodules.model").ResnetBlock
    patched, run = check(ResnetBlock(32, 64).double(), (random(2, 32, 8, 6),))
    assert not patched.skipped and run.share == 1
    block = randomize(ResnetBlock(32, 32, temb_channels=24)).double()
    x, temb = random(2, 32, 8, 6), random(2, 24).detach()
    expected = block(x, temb.clone())
    ldm_fused.patch(block, strict=True)
    assert_close([block(x, temb.clone())], [expected])


@pytest.mark.parametrize("name", ["weight_function", "bias_function", "comfy_cast_weights"])
def test_comfy_norms_with_weight_functions_fall_back(name, load):
    load("comfy.ops")
    block = randomize(load("comfy.ldm.modules.diffusionmodules.model").ResnetBlock(32, 64)).double()
    ldm_fused.patch(block)
    setattr(block.norm1, name, True if name == "comfy_cast_weights" else [lambda t: 2 * t])
    arguments = random(2, 32, 8, 6),
    found = results(block, arguments)
    run = ldm_fused.report(block)
    ldm_fused.unpatch(block)
    assert_close(found, results(block, arguments))
    cast = name == "comfy_cast_weights"
    reason = "its weights are cast in each call" if cast else "its weights go through functions first"
    assert run.fallbacks == {reason: 1} and run.fused == 1


def test_comfy_norm_that_stands_alone(load):
    ops = load("comfy.ops")
    for cls, fused in ((ops.disable_weight_init.GroupNorm, 1), (ops.manual_cast.GroupNorm, 0)):
        norm = randomize(cls(8, 32)).double()
        x = random(2, 32, 7)
        expected = results(norm, (x,))
        ldm_fused.patch(norm)
        assert_close(results(norm, (x,)), expected)
        assert ldm_fused.report(norm).fused == fused
