"""examples/decode_across_devices.py: the picture is that of one process, and memory falls with the number of ranks.

This file is a program too: `python tests/integrations/test_decode_across_devices.py FILE` decodes on groups of one, two
and four of its four processes. It imports the libraries and decodes whole pictures once, and forks.
"""

import json
import os
import re
import subprocess
import sys
from copy import deepcopy
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "decode_across_devices.py"
sys.path += [str(EXAMPLE.parent), str(ROOT / "tests")]  # patched.py and forked.py are there

import decode_across_devices as example  # noqa: E402
import forked  # noqa: E402
from diffusers import AutoencoderKL  # noqa: E402
from patched import randomize  # noqa: E402

WORLDS = (1, 2, 4)
HEIGHTS = (16, 9)  # of the latent: two parts and four are of one size, or not


class Case:
    """An autoencoder and a latent in float32 and float64, and the whole pictures."""

    def __init__(self, height):
        vae = randomize(AutoencoderKL(block_out_channels=(32, 64), layers_per_block=1,
                                      down_block_types=("DownEncoderBlock2D",) * 2,
                                      up_block_types=("UpDecoderBlock2D",) * 2))
        z = torch.randn(1, 4, height, 48)
        self.inputs = {"float32": (vae, z), "float64": (deepcopy(vae).double(), z.double())}
        with torch.no_grad():
            self.wholes = {name: model.decode(z).sample for name, (model, z) in self.inputs.items()}

    def compare(self, group):
        """The largest difference from the whole picture in float32 and in float64, over the largest value; the same of
        the whole picture in float32 from that in float64; and the most bytes that a rank had at a time, in float32."""
        found = {"rounding": difference(self.wholes["float32"], self.wholes["float64"])}
        for name, (vae, z) in self.inputs.items():
            vae = deepcopy(vae)
            example.cut(vae.decoder, group)
            rows, peak = example.measured(lambda: example.decode(vae, z, group), "cpu")
            found[name] = difference(example.gathered(rows, 2, group), self.wholes[name])
            peaks = [None] * dist.get_world_size(group)
            dist.all_gather_object(peaks, peak, group=group)
            found.setdefault("peak", max(peaks))
        return found


def difference(picture, want):
    return ((picture - want).abs().max() / want.abs().max()).item()


def main(rank, file, cases):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=max(WORLDS),
                            timeout=timedelta(seconds=120))
    for world in WORLDS:
        group = dist.new_group(range(world))
        for height in HEIGHTS if rank < world else ():
            found = cases[height].compare(group)
            if rank == 0:
                print("FOUND", json.dumps([world, height, found]), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def fork(file):
    torch.set_num_threads(1)  # so none is started before the fork
    torch.manual_seed(2)
    cases = {height: Case(height) for height in HEIGHTS}
    return int(not forked.run(max(WORLDS), lambda rank: main(rank, file, cases)))


@pytest.fixture(scope="module")
def environment():
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
            "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def found(environment, tmp_path_factory):
    file = tmp_path_factory.mktemp("decode") / "rendezvous"
    run = subprocess.run([sys.executable, __file__, str(file)], env=environment, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True, timeout=600)
    lines = [json.loads(line.removeprefix("FOUND ")) for line in run.stdout.splitlines() if line.startswith("FOUND ")]
    assert len(lines) == len(WORLDS) * len(HEIGHTS), run.stdout
    return {(world, height): result for world, height, result in lines}


@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize("world", WORLDS)
def test_the_picture_is_that_of_one_process(found, world, height):
    result = found[world, height]
    assert result["float64"] < 1e-12
    assert result["float32"] < 4 * result["rounding"]


@pytest.mark.parametrize("height", HEIGHTS)
def test_memory_of_a_rank_falls_with_their_number(found, height):
    peaks = [found[world, height]["peak"] for world in WORLDS]
    assert peaks[1] < 0.8 * peaks[0] and peaks[2] < 0.8 * peaks[1]


def test_the_program_says_what_each_rank_has(environment, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = "--small --check --height 72 --width 64 --out picture.pt".split()
    run = subprocess.run([*torchrun, str(EXAMPLE), *options], env=environment, cwd=tmp_path, capture_output=True,
                         text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.findall(r"rank (\d): (\d+) rows of 72, peak [\d.]+ MB", run.stdout) == [("0", "40"), ("1", "32")]
    assert float(re.search(r"largest difference (\S+)", run.stdout)[1]) < 1e-4
    assert torch.load(tmp_path / "picture.pt").shape == (1, 3, 72, 64)


if __name__ == "__main__":
    sys.exit(fork(sys.argv[1]))
