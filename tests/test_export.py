"""``torch.export`` of ops, modules, blocks and patched models, beside the plain ones: batches of any size."""

import io
import shutil

import pytest
import torch
from read_models import MODELS, inputs, models
from torch import nn
from torch.export import Dim

import ldm_fused

pytestmark = pytest.mark.usefixtures("one_thread")
OPS = {torch.ops.ldm_fused.group_norm_act.default, torch.ops.ldm_fused.bias_add_residual.default}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def export(model, name, dim, strict, batch=2):
    return torch.export.export(model, inputs(name, batch), strict=strict,
                               dynamic_shapes=tuple({0: dim} for _ in MODELS[name][2]))


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
@pytest.mark.parametrize("dim", [Dim("batch", min=1, max=64), Dim.AUTO], ids=["Dim", "AUTO"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_dynamic_batch_may_have_any_size(name, dim, strict):
    ours, plain = models(name)
    exported = export(ours, name, dim, strict)
    assert any(node.target in OPS for node in exported.graph.nodes)
    for batch in (1, 4, 8, 12, 5):  # some are the number of channels or groups
        x = inputs(name, batch)
        torch.testing.assert_close(exported.module()(*x), plain(*x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_fixed_batch_of_one(name):
    ours, plain = models(name)
    x = inputs(name, 1)
    found = torch.export.export(ours, x).module()(*x)
    torch.testing.assert_close(found, plain(*x), rtol=1e-4, atol=1e-5)


class Masked(nn.Module):
    """A model of the samples that a mask chooses: their number is known at run time only."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, mask, *args):
        return self.model(*(t[mask] for t in args))


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
@pytest.mark.parametrize("name", [name for name in MODELS if len(MODELS[name][2]) == 1])
@torch.no_grad()
def test_a_batch_that_only_run_time_knows(name, strict):
    ours, plain = models(name)
    x, mask = inputs(name, 4), torch.tensor([True, False, True, True])
    exported = torch.export.export(Masked(ours), (mask, *x), strict=strict).module()
    for mask in (mask, torch.tensor([False, True, False, False]), torch.ones(4, dtype=torch.bool)):
        torch.testing.assert_close(exported(mask, *x), Masked(plain)(mask, *x), rtol=1e-4, atol=1e-5)


class Chosen(nn.Module):
    """A model of the same samples of each input."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, mask, *args):
        chosen = mask.nonzero()[:, 0]
        return self.model(*(t.index_select(0, chosen) for t in args))


@pytest.mark.parametrize("name", [name for name in MODELS if len(MODELS[name][2]) > 1])
@torch.no_grad()
def test_arguments_by_sample_of_a_batch_that_only_run_time_knows(name):
    ours, plain = models(name)
    x, mask = inputs(name, 4), torch.tensor([True, False, True, True])
    exported = torch.export.export(Chosen(ours), (mask, *x), strict=False).module()
    for mask in (mask, torch.tensor([False, True, False, False])):
        torch.testing.assert_close(exported(mask, *x), Chosen(plain)(mask, *x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_bias_by_sample_for_all_samples_of_a_batch_that_only_run_time_knows():
    """One row of a time embedding, which broadcasts."""
    ours, plain = models("FusedResnetBlock with temb")
    (x, temb), mask = inputs("FusedResnetBlock with temb", 4), torch.tensor([True, False, True, True])
    temb = temb[:1]

    def of_chosen(model):
        class OfChosen(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, mask, x, temb):
                return self.model(x[mask], temb)
        return OfChosen()

    exported = torch.export.export(of_chosen(ours), (mask, x, temb), strict=False).module()
    torch.testing.assert_close(exported(mask, x, temb), plain(x[mask], temb), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_saved_and_loaded(name):
    ours, plain = models(name)
    file = io.BytesIO()
    torch.export.save(export(ours, name, Dim("batch", min=1, max=64), strict=False), file)
    file.seek(0)
    loaded, x = torch.export.load(file).module(), inputs(name, 8)
    torch.testing.assert_close(loaded(*x), plain(*x), rtol=1e-4, atol=1e-5)


def test_what_the_op_refuses_is_refused_while_exporting():
    with pytest.raises(Exception, match=r"pre_bias must have shape \[8\] or \["):
        ours, _ = models("group_norm_act")
        x, _, scale, shift = inputs("group_norm_act")
        torch.export.export(ours, (x, torch.randn(2, 4), scale, shift), strict=False)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
@torch.no_grad()
def test_compiled_ahead_of_time(tmp_path):
    """By AOTInductor: the op is called from C++."""
    ours, plain = models("GroupNormSiLU")
    exported = export(ours, "GroupNormSiLU", Dim("batch", min=1, max=64), strict=False)
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for batch in (1, 8, 3):
        x = inputs("GroupNormSiLU", batch)
        torch.testing.assert_close(loaded(*x), plain(*x), rtol=1e-4, atol=1e-5)
