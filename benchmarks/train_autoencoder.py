#!/usr/bin/env python3
"""Trains the LDM autoencoder on several processes: the fused blocks under DDP and FSDP2.

    torchrun --nproc-per-node 2 benchmarks/train_autoencoder.py --parallel fsdp2

Everything that is parallel here is PyTorch's own; the blocks need nothing said to them. A process takes a GPU (NCCL), or
a part of the CPU where there is none (gloo). Pictures are synthetic: whoever has others replaces ``pictures``.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks.autoencoder import AutoencoderKL  # noqa: E402
from ldm_fused import FusedResnetBlock, GroupNormSiLU  # noqa: E402


def pictures(batch: int, resolution: int, device: torch.device) -> Tensor:
    """Coloured waves, (batch, 3, resolution, resolution) between -1 and 1, channels_last."""
    axis = torch.linspace(-1, 1, resolution, device=device)
    down, right, phase = 2 * torch.randn(3, batch, 3, 1, 1, device=device)
    waves = torch.sin(down * axis[:, None] + right * axis + phase)
    return waves.contiguous(memory_format=torch.channels_last)


def block(**options) -> nn.Module:
    return FusedResnetBlock(**options, recompute=True)


def parallel(model: nn.Module, kind: str, device: torch.device) -> nn.Module:
    """The model as each process holds it: whole under DDP, in shards under FSDP2."""
    if kind == "ddp":
        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if device.type == "cuda" else MixedPrecisionPolicy()
    for module in model.modules():
        if isinstance(module, FusedResnetBlock):
            fully_shard(module, mesh=mesh, mp_policy=precision)
    return fully_shard(model, mesh=mesh, mp_policy=precision)


def train(args, rank: int, device: torch.device) -> None:
    torch.manual_seed(0)  # the same weights everywhere; then other pictures and dropout in each process
    model = AutoencoderKL(block, GroupNormSiLU, ch=args.channels).to(device)
    if args.parallel == "ddp":  # FSDP2 takes contiguous parameters alone; activations are as the pictures are
        model.to(memory_format=torch.channels_last)
    model = parallel(model, args.parallel, device)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr)
    torch.manual_seed(1 + rank)
    start = time.perf_counter()
    for step in range(1, args.steps + 1):
        x = pictures(args.batch, args.resolution, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = (model(x) - x).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % args.every == 0 or step == args.steps:
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            rate = step * args.batch * dist.get_world_size() / (time.perf_counter() - start)
            if rank == 0:
                print(f"step {step:4d}  loss {mean.item() / dist.get_world_size():.4f}  {rate:.2f} pictures/s", flush=True)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--parallel", choices=["ddp", "fsdp2"], default="ddp")
    p.add_argument("--channels", type=int, default=128, help="of the first level; LDM's kl-f8 has 128")
    p.add_argument("--resolution", type=int, default=256, help="height and width of a picture, a multiple of 8")
    p.add_argument("--batch", type=int, default=4, help="pictures of each process and step")
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--every", type=int, default=10, help="steps from one line of output to the next")
    p.add_argument("--lr", type=float, default=1e-4)
    return p


def main() -> None:
    args = parser().parse_args()
    if "RANK" not in os.environ:
        sys.exit(f"start it with torchrun: torchrun --nproc-per-node 2 {' '.join(sys.argv)}")
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        train(args, rank, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
