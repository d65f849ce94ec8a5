"""ldm_fused.patch on EDM's blocks, from files and from its pickles, which bring their classes with them."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from patched import assert_close, check, hook, random, randomize, results
from torch import nn

import ldm_fused

pytestmark = pytest.mark.usefixtures("one_thread")  # tensors are small here, and kernels have their own tests

EDM = {"default": dict(out_channels=32), "not adaptive": dict(out_channels=64, adaptive_scale=False),
       "up": dict(out_channels=32, up=True, skip_scale=0.5**0.5), "down": dict(out_channels=64, down=True),
       "attention": dict(out_channels=32, num_heads=4, skip_scale=0.5**0.5),
       "dropout": dict(out_channels=32, dropout=0.1)}


def persistent(source, monkeypatch):
    """The classes of a file as EDM's pickles bring them: made anew from its source, in a file with a made-up name."""
    file = ModuleType("_imported_module_0123456789abcdef")
    monkeypatch.setitem(sys.modules, file.__name__, file)
    exec(source, vars(file))

    def carrying(cls):
        class Decorator(cls):
            _orig_module_src, _orig_class_name = source, cls.__name__

            def __reduce__(self):
                return rebuilt, ({"source": source, "class": cls.__name__, "state": super().__reduce__()[2]},)

        Decorator.__name__, Decorator.__module__ = cls.__name__, file.__name__
        return Decorator

    for name, cls in list(vars(file).items()):
        if isinstance(cls, type) and issubclass(cls, nn.Module):
            setattr(file, name, carrying(cls))
    return file


def rebuilt(meta):
    raise NotImplementedError


EDM_SOURCE = (Path(__file__).parent / "libraries/edm_networks.py").read_text()


@pytest.mark.parametrize("file", ["by its name", "from a pickle"])
@pytest.mark.parametrize("name", EDM)
def test_edm_block(name, file, load, monkeypatch, biases):
    file = load("training.networks") if file == "by its name" else persistent(EDM_SOURCE, monkeypatch)
    block = file.UNetBlock(in_channels=32, emb_channels=24, **EDM[name]).double()
    tolerance = 1e-5 if block.num_heads else 1e-9  # whose attention computes in float32
    patched, run = check(block, (random(2, 32, 8, 6), random(2, 24)), tolerance=tolerance)
    assert not patched.skipped and run.share == 1 and len(run.sites) == 2 + bool(block.num_heads)


@pytest.mark.parametrize("before,after", [
    ("        return x\n", "        return x.clamp(-1e6, 1e6)\n"), ("        before = x\n", "        before = x * 1\n"),
    ("        before = x\n", "        before = x if x.shape[0] > 1 else 2 * x\n"),
    ("(x + (before if", "(self.factor * x + (before if"), ("(scale + 1)", "(scale + 2)")])
def test_an_edm_block_from_a_pickle_that_computes_something_else(before, after, monkeypatch):
    start = EDM_SOURCE.index("class UNetBlock")
    changed = EDM_SOURCE[start:].replace(before, after)
    changed = changed.replace("super().__init__()", "super().__init__(); self.factor = 2")
    assert changed.count(after) == 1
    block = persistent(EDM_SOURCE[:start] + changed, monkeypatch).UNetBlock(32, 32, 24, num_heads=4).double()
    arguments = random(2, 32, 8, 6), random(2, 24)
    patched, run = check(block, arguments, tolerance=1e-5)
    same = after.endswith("x * 1\n")  # but for its rounding
    assert [name for name, _, _ in patched.replaced] == ([""] if same else ["norm0", "norm1", "norm2"])


@pytest.mark.parametrize("name", ["up", "attention"])
def test_an_edm_block_with_numpys_factor_compiles_whole(name, load):
    block = load("training.networks").UNetBlock(32, emb_channels=24, **{**EDM[name], "skip_scale": np.sqrt(0.5)})
    randomize(block)
    arguments = random(2, 32, 8, 6, dtype=torch.float32), random(2, 24, dtype=torch.float32)
    expected = results(block, arguments)
    ldm_fused.patch(block, strict=True)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert_close([compiled(*arguments)], expected[:1], 1e-4)


@pytest.mark.parametrize("file", ["by its name", "from a pickle"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_edm_attention_in_16_bits(dtype, file, load, monkeypatch):
    """Which computes its weights in float32: ours is no less accurate."""
    file = load("training.networks") if file == "by its name" else persistent(EDM_SOURCE, monkeypatch)
    block = randomize(file.UNetBlock(32, 32, 24, num_heads=4, skip_scale=0.5**0.5))
    x, emb = torch.randn(2, 32, 8, 6), torch.randn(2, 24)
    exact = block.double()(x.double(), emb.double())
    block, x, emb = block.to(dtype), x.to(dtype), emb.to(dtype)
    eager = block(x, emb)
    ldm_fused.patch(block, strict=True)
    ours = block(x, emb)
    assert ldm_fused.report(block).fused == 3 and ours.dtype == dtype
    error, theirs = ((y.double() - exact).square().mean().sqrt() for y in (ours, eager))
    assert error <= 2 * theirs


def test_edm_block_in_training(load):
    block = load("training.networks").UNetBlock(in_channels=32, emb_channels=24, **EDM["dropout"]).double()
    randomize(block).train()
    arguments = random(2, 32, 8, 6), random(2, 24)
    expected = results(block, arguments)
    ldm_fused.patch(block)
    assert_close(results(block, arguments), expected)


@pytest.mark.parametrize("name", ["norm0", "norm2"])
def test_edm_block_with_a_hooked_norm(name, load):
    block = randomize(load("training.networks").UNetBlock(in_channels=32, emb_channels=24, **EDM["attention"])).double()
    hook(getattr(block, name))
    arguments = random(2, 32, 8, 6), random(2, 24)
    expected = results(block, arguments)
    ldm_fused.patch(block)
    assert_close(results(block, arguments), expected, 1e-5)
    assert ldm_fused.report(block).fallbacks == {"it has hooks": 1} and ldm_fused.report(block).fused == 2
