"""Models exported to ONNX and run by onnxruntime, beside the plain model's file."""

import sys
from pathlib import Path

import pytest
import torch

import ldm_fused

sys.path.append(str(Path(__file__).parents[1]))
from read_models import MODELS, inputs, models  # noqa: E402

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def export(model, name, path, dynamo):
    x = inputs(name)
    names = [f"x{i}" for i in range(len(x))]
    if dynamo:
        options = {"dynamic_shapes": tuple({0: "batch"} for _ in x)}
    else:
        options = {"dynamic_axes": {n: {0: "batch"} for n in names}}
    torch.onnx.export(model, x, str(path), input_names=names, dynamo=dynamo, **options)
    file = onnx.load(str(path))
    assert all(node.domain == "" for node in file.graph.node)
    session = onnxruntime.InferenceSession(str(path))
    return lambda *x: torch.from_numpy(session.run(None, {n: t.numpy() for n, t in zip(names, x)})[0])


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_exported_as_pytorchs_ops(name, dynamo, tmp_path):
    ours, plain = models(name)
    run = export(ours, name, tmp_path / "ours.onnx", dynamo)
    for batch in (1, 8, 3):
        x = inputs(name, batch)
        torch.testing.assert_close(run(*x), plain(*x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["GroupNormSiLU", "FusedResnetBlock", "patched UNet"])
@torch.no_grad()
def test_a_program_that_was_exported_before_while_the_ops_were_off(name, tmp_path):
    ours, plain = models(name)
    x = inputs(name)
    with ldm_fused.disabled():
        program = torch.export.export(ours, x)
    torch.onnx.export(program, (), str(tmp_path / "ours.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "ours.onnx"))
    [found] = session.run(None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), x)})
    torch.testing.assert_close(torch.from_numpy(found), plain(*x), rtol=1e-3, atol=1e-4)
