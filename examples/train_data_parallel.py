#!/usr/bin/env python3
"""Data-parallel training of the LDM autoencoder with fused blocks, by DDP or FSDP2, on pictures made of noise.

    torchrun --nproc-per-node 8 examples/train_data_parallel.py            # DDP
    torchrun --nproc-per-node 8 examples/train_data_parallel.py --fsdp     # FSDP2
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        examples/train_data_parallel.py                                    # two machines

A model of another library is trained in the same way: build it, `ldm_fused.patch(model)`, then wrap it.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks.autoencoder import AutoencoderKL  # noqa: E402
from ldm_fused import FusedResnetBlock, GroupNormSiLU  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdp", action="store_true", help="FSDP2, which shards the parameters; else DDP")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8, help="pictures in a step, of all processes together")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--channels", type=int, default=128, help="of the first level")
    args = parser.parse_args()

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    train(args)
    dist.barrier()
    dist.destroy_process_group()  # last: the model, which train() has freed, had process groups of its own


def train(args) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)

    torch.manual_seed(0)  # the same weights everywhere
    model = AutoencoderKL(FusedResnetBlock, GroupNormSiLU, ch=args.channels).to(device)
    if args.fsdp:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh(device.type, (world,))
        for module in [*(m for m in model.modules() if isinstance(m, FusedResnetBlock)), model]:
            fully_shard(module, mesh=mesh)
    else:
        model = DistributedDataParallel(model, device_ids=[device.index] if cuda else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    for step in range(args.steps):
        generator = torch.Generator().manual_seed(step)
        pictures = torch.randn(args.batch, 3, args.resolution, args.resolution, generator=generator)
        x = pictures[rank::world].to(device, memory_format=torch.channels_last)  # not the model: FSDP refuses that
        loss = F.mse_loss(model(x), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        if rank == 0:
            print(f"step {step}: loss {total.item() / world:.6f}", flush=True)


if __name__ == "__main__":
    main()
