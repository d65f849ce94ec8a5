"""--model: a whole LDM kl-f8 autoencoder with each block implementation in turn, or a model of diffusers patched."""

import itertools
import math
import sys
from dataclasses import dataclass, field
from typing import Dict, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import diffusers_models, measure
from benchmarks.autoencoder import AutoencoderKL
from benchmarks.providers import MEMORY_FORMATS, OTHERS, PROVIDERS, Contender, compiled, randomize_norms
from benchmarks.report import Cell, Progress, aligned, scaled, times

TITLES = {
    "ldm": "LDM kl-f8 autoencoder, encode and decode",
    "ldm-decoder": "LDM kl-f8 autoencoder, decode",
    **diffusers_models.TITLES,
}


@dataclass
class ModelRow:
    """A model forward or in training, by each provider."""

    model: str
    mode: str
    layout: str
    dtype: str
    device: str
    resolution: int
    picture: str
    cells: Dict[str, Cell] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{'autoencoder' if self.model == 'ldm' else self.model} {self.mode}"

    def seconds(self, name: str) -> Optional[float]:
        return self.cells[name].seconds("wall") if name in self.cells else None

    def speedup(self, name: str) -> Optional[float]:
        mine, other = self.seconds("ours"), self.seconds(name)
        return other / mine if mine and other else None

    def kept_ratio(self, name: str) -> str:
        """What is kept over what eager keeps, for the table."""
        mine, eager = (self.cells[n].kept_bytes if n in self.cells else None for n in (name, "eager"))
        return f"{mine / eager:.3f}x" if mine and eager else "n/a"

    def as_dict(self) -> Dict[str, object]:
        numbers = {
            name: {
                "wall_seconds": cell.seconds("wall"),
                "speedup_of_ours": self.speedup(name),
                "kept_bytes": cell.kept_bytes,
                "peak_bytes": cell.peak_bytes,
                "difference": cell.error if cell.error is not None and math.isfinite(cell.error) else None,
                "reason": cell.reason,
            }
            for name, cell in self.cells.items()
        }
        case = {k: getattr(self, k) for k in ("model", "mode", "layout", "dtype", "device", "resolution", "picture")}
        return {"level": "model", **case, "providers": numbers}


# ---- the picture


def picture(path: Optional[str], resolution: int) -> Tensor:
    """A picture as the autoencoder takes it: (1, 3, resolution, resolution) between -1 and 1."""
    image = synthetic_picture(resolution) if path is None else load_picture(path)
    edge = min(image.shape[-2:])
    top, left = (image.shape[-2] - edge) // 2, (image.shape[-1] - edge) // 2
    square = image[None, :, top : top + edge, left : left + edge]
    if edge == resolution:
        return square
    return F.interpolate(square, size=(resolution, resolution), mode="bilinear", antialias=True)


def synthetic_picture(resolution: int) -> Tensor:
    """Coloured rings and a slope: edges as well as smooth areas."""
    axis = torch.linspace(-1, 1, resolution)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    rings = torch.sin(12 * torch.hypot(x, y))
    return torch.stack([rings, x * rings, 0.5 * (x + y)])


def load_picture(path: str) -> Tensor:
    """A .npy array, (H, W, 3) or (3, H, W), of bytes or of floats between -1 and 1; or a file that Pillow reads."""
    try:
        import numpy
    except ImportError:
        sys.exit("--image needs numpy: pip install numpy")
    try:
        if path.endswith(".npy"):
            array = numpy.load(path)
        else:
            from PIL import Image

            array = numpy.asarray(Image.open(path).convert("RGB"))
    except ImportError:
        sys.exit("--image needs Pillow for anything but .npy: pip install pillow")
    except (OSError, ValueError) as e:
        sys.exit(f"--image {path}: {e}")
    if array.ndim == 3 and array.shape[-1] == 3:
        array = array.transpose(2, 0, 1)
    if array.ndim != 3 or array.shape[0] != 3:
        sys.exit(f"--image {path}: the array's shape is {array.shape}, expected (H, W, 3) or (3, H, W)")
    scaled_to_one = array / 127.5 - 1 if array.dtype == numpy.uint8 else array
    return torch.from_numpy(numpy.ascontiguousarray(scaled_to_one, dtype=numpy.float32))


# ---- the run


def run(args) -> List[ModelRow]:
    """Each layout and mode; all implementations share one set of random weights."""
    if args.resolution < 8 or args.resolution % 8:
        sys.exit(f"--resolution {args.resolution}: the autoencoder needs a multiple of 8")
    if args.model in ("diffusers-unet", "ldm-decoder"):
        x = diffusers_models.latent(args.resolution)
    else:
        x = picture(args.image, args.resolution)
    layouts = ["contiguous", "channels_last"] if args.layout == "both" else [args.layout]
    own = args.model.startswith("ldm")
    names = [name for name in args.providers if own or name != "F.silu"]  # which is not in a real model
    names = [name for name in names if PROVIDERS[name].block]
    modes = ["forward"] if args.model == "ldm-decoder" else args.modes
    progress = Progress(len(args.dtypes) * len(layouts) * len(modes) * (len(names) + 1))
    rows = []
    for dtype, layout in itertools.product(args.dtypes, layouts):
        make = build if own else diffusers_models.build
        contenders = make(list(dict.fromkeys(["eager", *names])), args, layout, getattr(torch, dtype))
        for mode in modes:
            row = ModelRow(args.model, mode, layout, dtype, args.device, args.resolution, args.image or "synthetic")
            measure_row(row, contenders, x, names, args, progress)
            rows.append(row)
    progress.close()
    return rows


def build(names: List[str], args, layout: str, dtype: torch.dtype) -> List[Contender]:
    """The autoencoder of each provider. The compiled one is the reference model, as a user would compile it."""
    torch.compiler.reset()
    weights = None
    contenders = []
    for name in names:
        provider = PROVIDERS["eager" if PROVIDERS[name].compiled else name]
        model = AutoencoderKL(provider.block, provider.norm_act)
        forward = model.decode if args.model == "ldm-decoder" else model
        if weights is None:
            randomize_norms(model).to(args.device, dtype, memory_format=MEMORY_FORMATS[layout])
            weights = model.state_dict()
        model.load_state_dict(weights, assign=True)  # the same memory for all: weights count once
        call = compiled(forward, PROVIDERS[name])
        contenders.append(Contender(name, call, list(model.parameters())))
    return contenders


def measure_row(row: ModelRow, contenders: List[Contender], picture: Tensor, names: List[str], args,
                progress: Progress) -> None:
    """Difference, memory and time of every provider."""
    dtype = getattr(torch, row.dtype)
    x = picture.to(args.device, dtype).contiguous(memory_format=MEMORY_FORMATS[row.layout])
    inputs = (x,) if row.mode == "forward" else (x.requires_grad_(), torch.randn_like(x))
    expected, runs = None, {}
    for contender in contenders:
        progress.show(f"{row.title}: {contender.name}, result and memory")
        cell = row.cells[contender.name] = Cell()
        try:
            found = measure.results(contender, row.mode, inputs)
            expected = expected or found
            cell.error = difference(found, expected)
            if not cell.error <= allowed_difference(dtype, args.device):
                raise measure.CheckFailed(f"differs from the reference by {cell.error:.2g} of the result's size")
            del found
            cell.peak_bytes = measure.peak_bytes(contender, row.mode, inputs)
            if row.mode == "training":
                cell.kept_bytes = measure.kept_bytes(contender, inputs[0])
            runs[contender.name] = measure.runner(contender, row.mode)
        except measure.CheckFailed as e:
            cell.reason, cell.failed = f"CHECK FAILED, not timed: {e}", True
        except Exception as e:  # torch.compile without a working compiler, or too little memory: the others go on
            cell.reason = measure.first_line(e)
            cell.failed = contender.name not in OTHERS and not measure.out_of_memory(e)
        if contender.name in names:
            progress.step()
        if cell.failed:
            progress.say(f"{contender.name}, {row.title} {row.dtype}: {cell.reason}")
    row.cells = {name: row.cells[name] for name in names}
    runs = {name: run for name, run in runs.items() if name in names}
    progress.show(f"{row.title}: timing")
    timings = measure.time_in_turn(runs, [inputs], row.mode, args.min_run_time, graphs=False)
    for name, timing in timings.items():
        row.cells[name].timing = timing
    progress.step()


def difference(found: List[Tensor], expected: List[Tensor]) -> float:
    """Forward: the largest difference over the largest value. Training: the same of the picture, or the norm of all
    gradients' difference over their norm, whichever is larger; one by one, some are zero but for rounding."""
    truth = expected[0].double()
    picture = measure.error(found[0], truth, measure.largest(truth))
    if len(found) == 1:
        return picture
    off = sum((f.double() - e.double()).square().sum().item() for f, e in zip(found[1:], expected[1:]))
    size = sum(e.double().square().sum().item() for e in expected[1:])
    gradients = math.sqrt(off / size) if size and math.isfinite(off) else math.inf
    return max(picture, gradients)


def allowed_difference(dtype: torch.dtype, device: str) -> float:
    """Room for the rounding of some fifty layers: this is to find what is wrong."""
    tf32 = device == "cuda" and dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    eps = 2.0**-11 if tf32 else torch.finfo(dtype).eps
    return 2 * math.sqrt(eps)


def summary(rows: List[ModelRow], args) -> str:
    """One table of all modes and layouts."""
    memory = "peak MB" if args.device == "cuda" else "peak RSS MB"
    head = ["mode", "layout", "dtype", "blocks", "ms", "ours vs it", memory, "kept MB", "of eager's", "difference"]
    lines = []
    for row in rows:
        for name, cell in row.cells.items():
            size = "n/a" if cell.error is None else f"{cell.error:.1e}"
            numbers = [scaled(row.seconds(name), 1e3), times(row.speedup(name)), scaled(cell.peak_bytes, 1e-6)]
            kept = [scaled(cell.kept_bytes, 1e-6), row.kept_ratio(name)] if row.mode == "training" else ["-", "-"]
            lines.append([row.mode, row.layout, row.dtype, name, *numbers, *kept, size])
    text = aligned([head, *lines], left=4).split("\n")
    reasons = [f"n/a  {name}: {c.reason}  ({r.title})" for r in rows for name, c in r.cells.items() if c.reason]
    return "\n".join(
        [
            "",
            f"{TITLES[args.model]}, "
            f"{rows[0].resolution} x {rows[0].resolution} pixels, batch 1, "
            + ("random latent" if args.model in ("diffusers-unet", "ldm-decoder") else f"picture: {rows[0].picture}"),
            "",
            text[0],
            "-" * max(map(len, text)),
            *text[1:],
            "",
            "ms: median of one call. peak: the most memory in use during one, above what was in use before (weights).",
            "kept: what autograd keeps for the backward pass. difference: from eager's picture, relative; in training",
            "from its gradients too.",
            *reasons,
        ]
    )
