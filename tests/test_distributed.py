"""Data-parallel training on two gloo processes: DDP and FSDP2 give the gradients that one process has.

This file is a program too, which forks the processes: `python tests/test_distributed.py FILE` goes through all cases.
Torch takes longer to import than a case takes.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
import torch.distributed as dist
from torch import nn

import ldm_fused
from ldm_fused import FusedResnetBlock, reference, resnet_block

ROOT = Path(__file__).resolve().parents[1]
WORLD = 2
OPTIONS = dict(in_channels=32, dropout=0.0, temb_channels=16)
# Biases are "left" to the fused ops, as on CUDA, or "added" by the convolutions.
CASES = [(kind, biases, dropout) for kind in ("ddp", "fsdp2", "ddp patched", "fsdp2 patched")
         for biases, dropout in (("added", 0.0), ("left", 0.4))]
# Of examples/train_data_parallel.py: how many processes, and its options.
RUNS = ("1", "2", "2 --fsdp")
SIZES = "--steps 3 --batch 4 --resolution 16 --channels 32"


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


def main(rank, file, ports):
    """Prints the cases in which the gradients agree, and what the training example prints; ends at what is wrong."""
    import train_data_parallel

    has_separate_bias = resnet_block._has_separate_bias
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    for case in CASES:
        kind, biases, dropout = case
        resnet_block._has_separate_bias = (lambda x: True) if biases == "left" else has_separate_bias
        found, want = distributed(kind, dropout, rank), expected(dropout)
        assert set(found) == set(want), case
        for name in want:
            torch.testing.assert_close(found[name], want[name], rtol=1e-4, atol=1e-6, msg=lambda m: f"{case} {name}: {m}")
        sys.stdout.write(f"{case} agrees\n")  # at once: the other process writes too
        sys.stdout.flush()
    dist.destroy_process_group()

    resnet_block._has_separate_bias = has_separate_bias
    for run, port in zip(RUNS, ports):
        world, *options = run.split()
        if rank >= int(world):
            continue
        # What torchrun tells its processes, whose store is the launcher's.
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, MASTER_ADDR="localhost",
                          MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
                          TORCHELASTIC_RESTART_COUNT="0")
        sys.argv = ["train_data_parallel.py", *SIZES.split(), *options]
        if rank == 0:
            print("run", run, flush=True)
        train_data_parallel.main()


def fork(file):
    """Runs the processes; the status to end with. Torch is imported once for all of them."""
    sys.path.append(str(ROOT / "examples"))
    import torch.distributed.fsdp  # noqa: F401
    import train_data_parallel  # noqa: F401

    stores = [dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) for _ in RUNS]
    return int(not forked.run(WORLD, lambda rank: main(rank, file, [store.port for store in stores])))


needs_distributed = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """What the processes print."""
    file = tmp_path_factory.mktemp("distributed") / "rendezvous"
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
                   "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, __file__, str(file)], env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=300).stdout


@needs_distributed
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_have_the_gradients_of_one(case, output):
    assert output.splitlines().count(f"{case} agrees") == WORLD, output


@needs_distributed
def test_the_training_example_on_two_processes_has_the_losses_of_one(output):
    losses = {}
    for text in output.split("run ")[1:]:
        run, *lines = text.splitlines()
        losses[run] = [float(line.split()[-1]) for line in lines if line.startswith("step ")]
    assert set(losses) == set(RUNS), output
    want = losses[RUNS[0]]
    assert len(set(want)) == 3, output
    for run in RUNS[1:]:
        assert losses[run] == pytest.approx(want, rel=1e-4), run


def test_the_comparison_can_fail():
    """A block that is not the reference's has other gradients."""
    want, model = expected(), Two()
    model.second = copy.deepcopy(model.first)
    loss(model, *batch()).backward()
    assert not torch.allclose(model.first.conv1.weight.grad, want["first.conv1.weight"], rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    sys.exit(fork(sys.argv[1]))
