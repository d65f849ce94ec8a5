"""Data-parallel training on two gloo processes: DDP and FSDP2 give the gradients that one process has.

This file is a program too, one of the processes: `python tests/test_distributed.py KIND BIASES DROPOUT RANK FILE`, where
BIASES is "left" if they are left to the fused ops, as on CUDA.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ldm_fused
from ldm_fused import FusedResnetBlock, reference, resnet_block

ROOT = Path(__file__).resolve().parents[1]
WORLD = 2
OPTIONS = dict(in_channels=32, dropout=0.0, temb_channels=16)


class Two(nn.Module):
    """Two blocks with a time embedding, the second one recomputing."""

    def __init__(self, cls=reference.ResnetBlock, **options):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (cls(**{**OPTIONS, **options}) for _ in range(2))

    def forward(self, x, temb):
        return self.second(self.first(x, temb), temb)


def batch():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*size, generator=generator) for size in ((2 * WORLD, 32, 8, 6), (2 * WORLD, 16))]


def loss(model, x, temb):
    return model(x, temb).square().mean()


def part_of_batch(rank):
    return [t[2 * rank:2 * rank + 2] for t in batch()]


def expected(dropout=0.0):
    """The gradients over the whole batch, by name, of the reference, which with dropout is one process's own blocks:
    each part of the batch with the seed of its rank."""
    model = Two(FusedResnetBlock, dropout=dropout) if dropout else Two()
    for rank in range(WORLD):
        torch.manual_seed(rank)
        (loss(model, *part_of_batch(rank)) / WORLD).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def distributed(kind, dropout, rank):
    """This process's gradients, gathered, by name: of its part of the batch, averaged over all processes."""
    from torch.distributed.fsdp import fully_shard

    if "patched" in kind:
        model = Two(dropout=dropout)
        ldm_fused.patch(model, recompute=True, strict=True)
    else:
        model = Two(FusedResnetBlock, dropout=dropout)
        model.second.recompute = True
    if kind.startswith("ddp"):
        model = nn.parallel.DistributedDataParallel(model)
    else:
        for block in (model.first, model.second, model):
            fully_shard(block, mesh=dist.device_mesh.init_device_mesh("cpu", (WORLD,)))
    for _ in range(2):  # the second pass finds what the first has changed
        model.zero_grad()
        torch.manual_seed(rank)
        loss(model, *part_of_batch(rank)).backward()
    gathered = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gathered.items()}


def main(kind, biases, dropout, rank, file):
    if biases == "left":
        resnet_block._has_separate_bias = lambda x: True
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=int(rank), world_size=WORLD)
    found, want = distributed(kind, float(dropout), int(rank)), expected(float(dropout))
    assert set(found) == set(want)
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    dist.destroy_process_group()
    print("gradients agree")


def environment():
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


needs_distributed = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")


@needs_distributed
@pytest.mark.parametrize("biases,dropout", [("added", "0.0"), ("left", "0.4")])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "ddp patched", "fsdp2 patched"])
def test_two_processes_have_the_gradients_of_one(kind, biases, dropout, tmp_path):
    processes = [subprocess.Popen([sys.executable, __file__, kind, biases, dropout, str(rank),
                                   str(tmp_path / "rendezvous")], env=environment(), stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, text=True)
                 for rank in range(WORLD)]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:  # one that waits for another that has failed
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(outputs)
    assert all("gradients agree" in output for output in outputs)


def losses(tmp_path, processes, *options):
    """What the training example prints, by step."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    sizes = "--steps 3 --batch 4 --resolution 16 --channels 32".split()
    run = subprocess.run([*torchrun, str(ROOT / "examples/train_data_parallel.py"), *sizes, *options],
                         env={**environment(), "CUDA_VISIBLE_DEVICES": ""}, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return [float(line.split()[-1]) for line in run.stdout.splitlines() if line.startswith("step ")]


@needs_distributed
def test_the_training_example_on_two_processes_has_the_losses_of_one(tmp_path):
    want = losses(tmp_path, 1)
    assert len(set(want)) == 3
    for options in ((), ("--fsdp",)):
        assert losses(tmp_path, WORLD, *options) == pytest.approx(want, rel=1e-4)


def test_the_comparison_can_fail():
    """A block that is not the reference's has other gradients."""
    want, model = expected(), Two()
    model.second = copy.deepcopy(model.first)
    loss(model, *batch()).backward()
    assert not torch.allclose(model.first.conv1.weight.grad, want["first.conv1.weight"], rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    main(*sys.argv[1:])
