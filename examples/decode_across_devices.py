#!/usr/bin/env python3
"""One picture decoded by several devices, each of which has some of its rows: diffusers' AutoencoderKL, exactly.

    torchrun --nproc-per-node 4 examples/decode_across_devices.py --height 2048 --width 2048 --model PATH
    torchrun --nproc-per-node 2 examples/decode_across_devices.py --height 256 --width 256 --small --check

Tiled decoding normalizes each tile by statistics of its own, and blends the seams. Here the picture is that of a single
device but for rounding: each 3x3 convolution gets a row from either neighbour, each GroupNorm is over the whole picture
(`ldm_fused.group_norm_act(..., group=...)`), and each row's attention sees the keys and values of all rows. A device
has the memory of its own rows. Without --model weights are random, and nothing is downloaded.
"""

import argparse
import copy
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parent.parent))

import ldm_fused  # noqa: E402
from benchmarks import machine  # noqa: E402

# ---- Between devices -------------------------------------------------------------------------------------------


def with_neighbours_rows(x: Tensor, group) -> Tensor:
    """x (N, C, H, W) between the last row of the rank before and the first of the next; at the edges, zeros."""
    rank, last = dist.get_rank(group), dist.get_world_size(group) - 1
    top, bottom = x[:, :, :1].contiguous(), x[:, :, -1:].contiguous()
    above, below = torch.zeros_like(top), torch.zeros_like(bottom)
    exchanges = []
    for own, other, neighbour in ((top, above, rank - 1), (bottom, below, rank + 1)):
        if 0 <= neighbour <= last:
            peer = dist.get_global_rank(group, neighbour)
            exchanges += [dist.P2POp(dist.isend, own, peer, group), dist.P2POp(dist.irecv, other, peer, group)]
    for exchange in dist.batch_isend_irecv(exchanges) if exchanges else ():
        exchange.wait()
    return torch.cat([above, x, below], 2)


def gathered(t: Tensor, dim: int, group) -> Tensor:
    """The parts of all ranks, which may have other sizes in ``dim``, behind each other."""
    own = t.movedim(dim, 0)
    size = torch.tensor([own.shape[0]], device=t.device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    sizes = [int(size) for size in sizes]
    padded = own.new_zeros((max(sizes), *own.shape[1:]))
    padded[:own.shape[0]] = own
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes)]).movedim(0, dim)


# ---- The parts of a decoder ------------------------------------------------------------------------------------


class Convolution(nn.Module):
    """A 3x3 convolution with padding 1 of a picture whose rows are cut across ranks."""

    def __init__(self, conv: nn.Conv2d, group) -> None:
        super().__init__()
        self.weight, self.bias, self.group = conv.weight, conv.bias, group

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(with_neighbours_rows(x, self.group), self.weight, self.bias, padding=(0, 1))


class Norm(nn.Module):
    """A GroupNorm over all ranks' rows, and the activation behind it."""

    def __init__(self, norm: nn.GroupNorm, group) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.num_groups, self.eps, self.activation, self.group = norm.num_groups, norm.eps, None, group

    def forward(self, x: Tensor) -> Tensor:
        return ldm_fused.group_norm_act(x, self.num_groups, self.weight, self.bias, self.eps,
                                        activation=self.activation, group=self.group)


class GatheredAttention:
    """Attention of a rank's own pixels to all pixels."""

    def __init__(self, group) -> None:
        self.group = group

    def __call__(self, attn: Attention, x: Tensor, encoder_hidden_states=None, attention_mask=None, temb=None):
        height, width = x.shape[2:]
        h = attn.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = attn.to_q(h), attn.to_k(h), attn.to_v(h)
        q, k, v = (t.unflatten(2, (attn.heads, -1)).transpose(1, 2)
                   for t in (q, gathered(k, 1, self.group), gathered(v, 1, self.group)))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = attn.to_out[0](h).transpose(1, 2).unflatten(2, (height, width))
        return (h + x if attn.residual_connection else h) / attn.rescale_output_factor


def cut(module: nn.Module, group) -> None:
    """Makes a decoder, in place, one of the rows that a rank of ``group`` has."""
    for name, child in module.named_children():
        if type(child) is nn.Conv2d and child.kernel_size == (3, 3):
            if (child.stride, child.padding, child.dilation, child.groups) != ((1, 1), (1, 1), (1, 1), 1):
                raise ValueError(f"{name} is no plain convolution: {child}")
            setattr(module, name, Convolution(child, group))
        elif type(child) is nn.GroupNorm:
            setattr(module, name, Norm(child, group))
        else:
            cut(child, group)
    if isinstance(module, ResnetBlock2D):
        module.norm1.activation = module.norm2.activation = activation_of(module.nonlinearity)
        module.nonlinearity = nn.Identity()
    elif isinstance(module, Decoder):
        module.conv_norm_out.activation = activation_of(module.conv_act)
        module.conv_act = nn.Identity()
    elif isinstance(module, Attention):
        module.set_processor(GatheredAttention(group))


def activation_of(act: nn.Module) -> str:
    if type(act) is not nn.SiLU:
        raise ValueError(f"the activation behind a norm is {act}, and must be SiLU")
    return "silu"


@torch.no_grad()
def decode(vae: AutoencoderKL, z: Tensor, group) -> Tensor:
    """This rank's rows of the picture, of ``z``, which is the whole latent. The decoder has been ``cut``."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if z.shape[2] < ranks:
        raise ValueError(f"each of {ranks} ranks needs a row of the latent at least, which has {z.shape[2]}")
    return vae.decode(z.tensor_split(ranks, 2)[rank].contiguous()).sample


# ---- The program -----------------------------------------------------------------------------------------------


def make_autoencoder(args) -> AutoencoderKL:
    if args.model:
        return AutoencoderKL.from_pretrained(args.model, local_files_only=True)
    torch.manual_seed(0)  # the same weights everywhere
    channels = (32, 32, 64, 64) if args.small else (128, 256, 512, 512)
    return AutoencoderKL(block_out_channels=channels, layers_per_block=2, latent_channels=4,
                         down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)


def measured(run, device):
    """What a function gives, and the most bytes that it has of torch's allocator at a time."""
    result = []
    peak = machine.peak_bytes(lambda: result.append(run()), device)
    return result[0], peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=512, help="of the picture, a multiple of 8")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--model", help="a folder with an AutoencoderKL of diffusers")
    parser.add_argument("--small", action="store_true", help="few channels, to try it on a CPU")
    parser.add_argument("--check", action="store_true", help="also decode on the first device alone, and compare")
    parser.add_argument("--out", help="file for the picture, as torch.save writes it")
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    run(args, device)
    dist.barrier()
    dist.destroy_process_group()


@torch.no_grad()
def run(args, device) -> None:
    group, rank = dist.group.WORLD, dist.get_rank()
    vae = make_autoencoder(args).eval().to(device)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(1, vae.config.latent_channels, args.height // 8, args.width // 8, generator=generator).to(device)
    whole = copy.deepcopy(vae) if args.check and rank == 0 else None
    cut(vae.decoder, group)
    rows, peak = measured(lambda: decode(vae, z, group), device)
    picture = gathered(rows, 2, group)
    said = [None] * dist.get_world_size()
    dist.all_gather_object(said, f"rank {rank}: {rows.shape[2]} rows of {picture.shape[2]}, peak {peak / 1e6:.1f} MB")
    if rank == 0:
        print("\n".join(said), flush=True)
        if args.out:
            torch.save(picture.cpu(), args.out)
    if whole is not None:
        want, peak = measured(lambda: whole.decode(z).sample, device)
        error = (picture - want).abs().max() / want.abs().max()
        print(f"one device: peak {peak / 1e6:.1f} MB, largest difference {error.item():.1e} of the largest value")


if __name__ == "__main__":
    main()
