"""Compiled models that are patched, alone and in every order: no eager call comes in between."""

import threading

import pytest
import torch
from patched import TwoNorms, assert_close, random, randomize
from torch import nn

import ldm_fused
from ldm_fused.patching import pair

pytestmark = pytest.mark.usefixtures("one_thread")


class Ended(nn.Module):
    """A block, and a norm and an activation behind it."""

    def __init__(self):
        super().__init__()
        self.block, self.norm, self.act = ldm_fused.reference.ResnetBlock(in_channels=32, dropout=0.0), \
            nn.GroupNorm(8, 32), nn.SiLU()
        self.conv = nn.Conv2d(32, 3, 1)

    def forward(self, x):
        return self.conv(self.act(self.norm(self.block(x))))


@pytest.fixture
def model(registered):
    torch._dynamo.reset()
    registered(Ended, pair.Parent("norm", "act"))
    return randomize(Ended())


def picture(width=6):
    return torch.randn(2, 32, 8, width)


def compiled(model, backend="aot_eager"):
    return torch.compile(model, backend=backend, fullgraph=True)


def in_another_thread(function, *args):
    found = []

    def call():
        try:
            found.append(function(*args))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(120)
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


STEPS = {"patch": lambda m: ldm_fused.patch(m), "unpatch": lambda m: ldm_fused.unpatch(m), "compile": lambda m: None,
         "run": lambda m: None}


@pytest.mark.parametrize("steps", [
    "patch compile run run", "compile patch run run", "compile run patch run run", "patch compile run unpatch run run",
    "patch compile run unpatch run patch run", "patch compile disabled run", "patch compile run disabled run disabled",
    "patch compile size run size", "patch compile thread thread run", "patch compile run thread run",
    "patch eager compile thread run", "compile run patch run unpatch run"])
@pytest.mark.parametrize("by", ["torch.compile", "module.compile"])
def test_every_order(steps, by, model):
    """What Dynamo has to see: what becomes of its graph is the same in each."""
    run, steps = model, steps.split()
    x, wide = picture(), picture(10)
    expected, other = model(x), model(wide)
    for step in steps:
        if step == "compile":
            if by == "torch.compile":
                run = compiled(model, "eager")
            else:
                model.compile(backend="eager", fullgraph=True)
        elif step in ("patch", "unpatch"):
            STEPS[step](model)
        elif step == "size":
            assert_close([run(wide)], [other], 1e-4)
        elif step == "thread":
            assert_close([in_another_thread(run, x)], [expected], 1e-4)
        elif step == "disabled":
            with ldm_fused.disabled():
                assert_close([run(x)], [expected], 1e-4)
        else:
            assert_close([run(x)], [expected], 1e-4)


def test_a_part_that_is_compiled_in_place(model):
    x = picture()
    expected = model(x)
    ldm_fused.patch(model)
    model.block = torch.compile(model.block, backend="aot_eager")
    for _ in range(3):
        assert_close([model(x)], [expected], 1e-4)


def test_gradients_of_a_second_call(model):
    x = random(2, 32, 8, 6, dtype=torch.float32)
    [expected] = torch.autograd.grad(model(x).square().sum(), x)
    ldm_fused.patch(model)
    run = compiled(model)
    for _ in range(3):
        assert_close(torch.autograd.grad(run(x).square().sum(), x), [expected], 1e-3)


def test_a_second_model(model):
    x = picture()
    models = [model, randomize(Ended())]
    expected = [m(x) for m in models]
    for m in models:
        ldm_fused.patch(m)
    runs = [compiled(m) for m in models]
    for _ in range(2):
        assert_close([run(x) for run in runs], expected, 1e-4)


def test_many_compiled_pieces_of_several_kinds_stay_compiled():
    """Each patched class has code of its own, and its pieces do not use up the limit of recompilations of others."""
    torch._dynamo.reset()

    def make(i):
        if i % 3 == 0:
            return ldm_fused.reference.ResnetBlock(in_channels=32, dropout=0.0)
        return TwoNorms() if i % 3 == 1 else nn.Sequential(nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 32, 1))

    pieces = nn.ModuleList([make(i) for i in range(15)])
    ldm_fused.patch(pieces)
    assert len({id(type(p).forward.__code__) for p in pieces}) == 3
    x = picture()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), torch.no_grad():
        for piece in pieces:
            piece.compile(backend="eager")
            piece(x)


def test_traced_by_fx_a_patched_block_is_the_classes_own_code():
    block = randomize(TwoNorms()).double()
    ldm_fused.patch(block)
    traced = torch.fx.symbolic_trace(block)
    x = random(2, 32, 6, 5)
    assert any(node.target is torch.nn.functional.silu for node in traced.graph.nodes)
    assert_close([traced(x)], [block(x)])
