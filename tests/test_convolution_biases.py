"""Who adds the biases of convolutions on CUDA: the fused ops, unless the class does more in a call."""

import pytest
from patched import TwoNorms, assert_close, check, hook, random, randomize, results
from torch import nn
from torch.nn import functional as F

import ldm_fused
from ldm_fused import functional, resnet_block

pytestmark = pytest.mark.usefixtures("one_thread")  # tensors are small here, and kernels have their own tests


@pytest.fixture
def left(monkeypatch):
    """Whether the second convolution's bias and the shortcut's are left to the residual op, as on CUDA."""
    told, op = [], functional.bias_add_residual
    monkeypatch.setattr(resnet_block, "_has_separate_bias", lambda x: True)
    monkeypatch.setattr(functional, "bias_add_residual",
                        lambda *a: told.append((a[2] is not None, a[3] is not None)) or op(*a))
    return told


COMFY = {"comfy.ops": "disable_weight_init", "ldm_patched.modules.ops": "disable_weight_init",
         "backend.operations": "ForgeOperations"}


def comfy_block(file, load):
    ops = getattr(load(file), COMFY[file])
    return randomize(load("comfy.ldm.modules.diffusionmodules.model").ResnetBlock(32, 64, layers=ops)).double()


@pytest.mark.parametrize("file", COMFY)
def test_biases_of_comfys_convolutions_are_left_to_the_fused_ops(file, load, left):
    load("comfy.ops")
    block = comfy_block(file, load)
    patched, run = check(block, (random(2, 32, 8, 6),))
    assert set(left) == {(True, True)} and not patched.skipped and run.share == 1


def cast(conv):
    conv.comfy_cast_weights = True


def weight_function(conv):
    conv.weight_function = [lambda t: 2 * t]


def bias_function(conv):
    conv.bias_function = [lambda t: 2 * t]


def own_conv_forward(conv):
    conv._conv_forward = lambda x, weight, bias: F.conv2d(x, weight, conv.bias, padding="same")


def hooked(conv):
    hook(conv)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", [cast, weight_function, bias_function, own_conv_forward, hooked],
                         ids=lambda f: f.__name__)
def test_a_convolution_that_does_more_in_this_call_is_called(change, when, load, left):
    load("comfy.ops")
    block = comfy_block("comfy.ops", load)
    arguments = random(2, 32, 8, 6),
    if when == "after":
        ldm_fused.patch(block)
    for conv in (block.conv1, block.conv2):
        change(conv)
    if when == "before":
        ldm_fused.patch(block)
    found = results(block, arguments)
    ldm_fused.unpatch(block)
    assert left[-1] == (False, True)
    assert_close(found, results(block, arguments))


def test_convolutions_that_cast_their_weights_are_called(load, left):
    ops = load("comfy.ops")
    file = load("comfy.ldm.modules.diffusionmodules.model")
    block = randomize(file.ResnetBlock(32, 64, layers=ops.manual_cast)).double()
    _, run = check(block, (random(2, 32, 8, 6),))
    assert left == [] and run.fused == 0 and set(run.fallbacks) == {"its weights are cast in each call"}


class Uninitialised(nn.Conv2d):
    def reset_parameters(self):
        pass


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Circular(nn.Conv2d):
    """Whose bias is part of what it convolves."""

    def _conv_forward(self, x, weight, bias):
        bias = 0 if self.bias is None else self.bias[:, None, None]
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight) + bias


@pytest.mark.parametrize("cls,fused", [(nn.Conv2d, True), (Uninitialised, True), (Doubled, False), (Circular, False)])
def test_a_subclass_of_a_convolution_keeps_its_bias_unless_it_changes_nothing(cls, fused, left):
    block = TwoNorms()
    block.conv1, block.conv2 = cls(32, 64, 3, padding=1), cls(64, 32, 3, padding=1)
    patched, run = check(block.double(), (random(2, 32, 8, 6),))
    assert not patched.skipped and run.share == 1
    assert set(left) == ({(True, False)} if fused else set())


@pytest.mark.parametrize("name", ["forward", "_conv_forward"])
def test_what_replaces_the_method_of_pytorchs_convolutions_is_run(name, load, left, monkeypatch):
    load("comfy.ops")
    blocks = [comfy_block("comfy.ops", load), TwoNorms().double()]
    for block in blocks:
        ldm_fused.patch(block)
    left.clear()  # of trials
    before = getattr(nn.Conv2d, name)
    monkeypatch.setattr(nn.Conv2d, name, lambda self, *args: 2 * before(self, *args))
    for block in blocks:
        x = random(2, 32, 8, 6)
        with ldm_fused.disabled():
            expected = results(block, (x,))
        assert_close(results(block, (x,)), expected)
    assert left == []
