"""A copy or a pickle of a patched model is patched and fused as before, or it is unpatched: never between."""

import copy
import pickle

import pytest
import torch
from fresh import run_python
from patched import assert_close, random, randomize
from torch import nn

import ldm_fused
from ldm_fused.patching import swap

pytestmark = pytest.mark.usefixtures("one_thread")

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def in_a_fresh_process(data, arguments, files, tmp_path):
    """The output and report.fused of a pickled model that another process loads and runs."""
    torch.save([data, arguments], tmp_path / "in.pt")
    program = f"""
import pickle, pytest, torch, libraries
torch.set_num_threads(1)
loaded = [libraries.load(name, pytest.MonkeyPatch()) for name in {list(files)!r}]
data, arguments = torch.load({str(tmp_path / "in.pt")!r}, weights_only=False)
model = pickle.loads(data)
y = model(*arguments)
import ldm_fused
run = ldm_fused.report(model)
torch.save((y, run.fused, run.fallbacks, ldm_fused.is_patched(model)), {str(tmp_path / "out.pt")!r})
"""
    run = run_python(program)
    assert run.returncode == 0, run.stderr
    return torch.load(tmp_path / "out.pt", weights_only=False)


def openai(load):
    load("guided_diffusion.nn")
    files = "guided_diffusion.nn", "guided_diffusion.unet"
    return load("guided_diffusion.unet").UNet(), (torch.randn(2, 32, 8, 6), torch.randn(2, 24)), files, 4


def ldm(load):
    file = "ldm.modules.diffusionmodules.model"
    return load(file).Decoder(), (torch.randn(2, 4, 8, 6),), (file,), 6


def comfy(load):
    load("comfy.ops")
    file = "comfy.ldm.modules.diffusionmodules.model"
    return load(file).ResnetBlock(32, 64), (torch.randn(2, 32, 8, 6),), ("comfy.ops", file), 2


def read(load):
    load("guided_diffusion.nn")
    return load("somebodys.ddpm").Block(32), (torch.randn(2, 32, 8, 6),), ("somebodys.ddpm",), 2


@pytest.mark.parametrize("make", [openai, ldm, comfy, read], ids=lambda f: f.__name__)
def test_a_pickle_in_a_fresh_process_is_patched_and_fused(make, load, tmp_path):
    model, arguments, files, fused = make(load)
    randomize(model).eval()
    ldm_fused.patch(model)
    with torch.no_grad():
        y = model(*arguments)
    found, calls, fallbacks, is_patched = in_a_fresh_process(pickle.dumps(model), arguments, files, tmp_path)
    assert torch.equal(found, y) and calls == fused and not fallbacks and is_patched


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("make", [openai, ldm, comfy, read], ids=lambda f: f.__name__)
def test_every_protocol(make, protocol, load):
    model, arguments, _, fused = make(load)
    randomize(model).eval()
    ldm_fused.patch(model)
    other = pickle.loads(pickle.dumps(model, protocol))
    assert torch.equal(other(*arguments), model(*arguments))
    assert ldm_fused.is_patched(other) and ldm_fused.report(other).fused == fused
    ldm_fused.unpatch(other)
    assert not ldm_fused.is_patched(other) and ldm_fused.is_patched(model)


def rebuilt(meta):
    """What a persistent class's pickle says, and nothing else."""
    block = Persistent.__new__(Persistent)
    nn.Module.__init__(block)
    block.__dict__.update(meta["state"])
    return block


class Persistent(nn.Module):
    """Its pickles and copies are made in a way of its own, as EDM's."""

    def __init__(self):
        super().__init__()
        self.norm0, self.norm1 = nn.GroupNorm(8, 32), nn.GroupNorm(8, 32)
        self.conv0, self.conv1 = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x):
        h = self.conv0(nn.functional.silu(self.norm0(x)))
        return (x + self.conv1(nn.functional.silu(self.norm1(h)))) * 0.5**0.5

    def __reduce__(self):
        return rebuilt, ({"class": "Persistent", "state": super().__reduce__()[2]},)


@pytest.mark.parametrize("make", [copy.deepcopy, *(lambda m, p=p: pickle.loads(pickle.dumps(m, p)) for p in PROTOCOLS)])
def test_a_class_with_ways_of_its_own_gives_unpatched_copies(make):
    model, x = randomize(Persistent()).double(), random(2, 32, 6, 5)
    expected = model(x)
    ldm_fused.patch(model, strict=True)
    other = make(model)
    assert type(other) is Persistent and not ldm_fused.is_patched(other) and torch.equal(other(x), expected)
    ldm_fused.unpatch(other)
    assert ldm_fused.report(other).sites == []
    assert len(ldm_fused.patch(other).replaced) == 1 and ldm_fused.is_patched(other)
    assert_close([other(x)], [expected])
    assert ldm_fused.report(other).fused == 2 and ldm_fused.is_patched(model)
    ldm_fused.unpatch(other)
    assert torch.equal(other(x), expected) and swap.STATE not in vars(other)


@pytest.mark.parametrize("patched", [True, False])
def test_a_pickle_says_what_is_missing_where_it_is_read(patched, tmp_path):
    model = nn.Sequential(nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 8, 1))
    ldm_fused.patch(model)
    if not patched:
        ldm_fused.unpatch(model)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    run = run_python("import pickle, sys; sys.modules['ldm_fused'] = None; pickle.load(open('model.pickle', 'rb'))",
                     cwd=tmp_path)
    if patched:
        last = run.stderr.splitlines()[-1]
        assert last.startswith("ModuleNotFoundError") and "ldm_fused" in last
    else:
        assert run.returncode == 0, run.stderr


def test_a_snapshot_of_such_classes_names_nothing_of_ours():
    model = randomize(Persistent())
    ldm_fused.patch(model)
    import pickletools
    names = [str(argument) for _, argument, _ in pickletools.genops(pickle.dumps(model))]
    assert not any("ldm_fused." in name for name in names)


def test_what_is_left_of_a_patched_model_is_cleaned_up():
    model, x = randomize(Persistent()).double(), random(2, 32, 6, 5)
    expected = model(x)
    ldm_fused.patch(model)
    vars(model).pop(swap.STATE)
    assert not ldm_fused.is_patched(model) and torch.equal(model(x), expected)
    assert len(ldm_fused.patch(model).replaced) == 1
    assert_close([model(x)], [expected])
    assert ldm_fused.report(model).fused == 2
