"""Pictures in and out: a folder as tensors, crops of them, and PNGs of reconstructions and of a loss.

A picture is a uint8 tensor (3, H, W); what a model takes and gives is (N, 3, size, size) between -1 and 1. Pillow reads
and writes files; arrays in .npy files need none.
"""

import math
import sys
from pathlib import Path
from typing import List, Optional, Sequence

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".npy")
# Colour photographs that are files of the package scikit-image; others it would download.
SHIPPED = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg",
           "hubble_deep_field.jpg", "ihc.png")
INK, GREY, BLUE, PALE = "#222222", "#8a8a8a", "#0072B2", "#bcd7ea"


# ---- in


def load(path: Optional[str]) -> List[Tensor]:
    """The pictures of a folder and the folders in it, or one picture; without a path those that scikit-image ships."""
    if path is None:
        return [read(file) for file in shipped()]
    root = Path(path)
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES) if root.is_dir() else [root]
    if not files:
        sys.exit(f"{path}: there is no picture in it ({', '.join(SUFFIXES)})")
    return [read(file) for file in files]


def shipped() -> List[Path]:
    try:
        import skimage.data
    except ImportError:
        sys.exit("pictures to train on: `pip install scikit-image` has some, or name a folder with --pictures")
    folder = Path(skimage.data.__file__).parent
    return [folder / name for name in SHIPPED if (folder / name).exists()]


def read(file: Path) -> Tensor:
    """An array in a .npy file, (H, W, 3) or (3, H, W), of bytes or of floats between -1 and 1, or what Pillow reads."""
    try:
        if file.suffix == ".npy":
            array = numpy.load(file)
        else:
            array = numpy.asarray(pillow().open(file).convert("RGB"))
    except (OSError, ValueError) as e:
        sys.exit(f"{file}: {e}")
    if array.ndim == 3 and array.shape[-1] == 3:
        array = array.transpose(2, 0, 1)
    if array.ndim != 3 or array.shape[0] != 3:
        sys.exit(f"{file}: the array's shape is {array.shape}, expected (H, W, 3) or (3, H, W)")
    if array.dtype != numpy.uint8:
        array = numpy.rint((array.clip(-1, 1) + 1) * 127.5).astype(numpy.uint8)
    return torch.from_numpy(numpy.ascontiguousarray(array))


def pillow():
    try:
        from PIL import Image
    except ImportError:
        sys.exit("pictures need Pillow: pip install pillow")
    return Image


def crops(pictures: Sequence[Tensor], number: int, size: int, generator: torch.Generator) -> Tensor:
    """Random squares of at least half a picture's shorter edge, half of them mirrored, resized."""
    return torch.cat([crop(pictures[draw(len(pictures), generator)], size, generator) for _ in range(number)])


def crop(picture: Tensor, size: int, generator: torch.Generator) -> Tensor:
    height, width = picture.shape[1:]
    shorter = min(height, width)
    edge = (shorter + 1) // 2 + draw(shorter // 2 + 1, generator)
    top, left = draw(height - edge + 1, generator), draw(width - edge + 1, generator)
    square = picture[:, top : top + edge, left : left + edge]
    return resized(square.flip(-1) if draw(2, generator) else square, size)


def draw(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=generator))


def middle(picture: Tensor, size: int) -> Tensor:
    """The square in the middle, resized."""
    edge = min(picture.shape[1:])
    top, left = ((n - edge) // 2 for n in picture.shape[1:])
    return resized(picture[:, top : top + edge, left : left + edge], size)


def resized(square: Tensor, size: int) -> Tensor:
    x = square[None].float() / 127.5 - 1
    if square.shape[-1] != size:
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    return x


# ---- out


def font(size: int):
    from PIL import ImageFont

    return ImageFont.load_default(size)


def save_grid(path: Path, columns: Sequence[Sequence[Tensor]], labels: Sequence[str], title: str) -> None:
    """A column a picture: what it was, and under it what became of it, one row for each of `labels`."""
    from PIL import Image, ImageDraw

    tile, gap, left, top = 160, 6, 130, 44
    width, height = left + len(columns) * (tile + gap) + gap, top + len(labels) * (tile + gap) + gap
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((gap + 8, top / 2), title, INK, font(17), anchor="lm")
    for j, label in enumerate(labels):
        pen.text((left - 10, top + j * (tile + gap) + tile / 2), label, INK, font(14), anchor="rm")
        for i, column in enumerate(columns):
            pixels = ((column[j].float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
            image = Image.fromarray(pixels).resize((tile, tile), Image.Resampling.BICUBIC)
            sheet.paste(image, (left + gap + i * (tile + gap), top + j * (tile + gap)))
    sheet.save(path)


def save_curve(path: Path, losses: Sequence[float], title: str, width: int = 900, height: int = 480) -> None:
    """The loss by step on a logarithmic axis, pale, and its running mean."""
    from PIL import Image, ImageDraw

    fine = 3  # drawn larger, and made smaller: smooth lines
    sheet = Image.new("RGB", (fine * width, fine * height), "white")
    pen = ImageDraw.Draw(sheet)
    left, right, top, bottom = 70 * fine, (width - 24) * fine, 56 * fine, (height - 52) * fine
    logs = [math.log10(max(loss, 1e-12)) for loss in losses]
    low, high = min(logs), max(logs)
    low, high = low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3
    last = max(len(losses), 2)

    def at(step: float, log: float):
        return left + (right - left) * (step - 1) / (last - 1), bottom - (bottom - top) * (log - low) / (high - low)

    for value in ticks(10**low, 10**high):
        (_, y), text = at(1, math.log10(value)), f"{value:g}"
        pen.line([(left, y), (right, y)], "#e6e6e6", fine)
        pen.text((left - 8 * fine, y), text, GREY, font(13 * fine), anchor="rm")
    unit = next(d * 10**p for p in range(12) for d in (1, 2, 5) if last <= 6 * d * 10**p)
    for step in range(unit, last + 1, unit):
        pen.text((at(step, low)[0], bottom + 8 * fine), str(step), GREY, font(13 * fine), anchor="ma")
    pen.line([(left, bottom), (right, bottom)], GREY, fine)
    pen.text(((left + right) / 2, bottom + 30 * fine), "step", INK, font(13 * fine), anchor="ma")
    pen.text((left, 26 * fine), title, INK, font(17 * fine), anchor="lm")
    pen.line([at(i + 1, log) for i, log in enumerate(logs)], PALE, 2 * fine, joint="curve")
    pen.line([at(i + 1, log) for i, log in enumerate(running_mean(logs))], BLUE, 3 * fine, joint="curve")
    sheet.resize((width, height), Image.Resampling.LANCZOS).save(path)


def running_mean(values: Sequence[float]) -> List[float]:
    """Over a fifteenth of them, or what there is of it at both ends."""
    reach, sums = max(1, len(values) // 30), numpy.cumsum([0.0, *values])
    ends = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [float(sums[b] - sums[a]) / (b - a) for a, b in ends]


def ticks(low: float, high: float) -> List[float]:
    """Round numbers between them: 1, 2 and 5 times powers of ten, or tenths where there are few."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), range(1, 10), [d / 10 for d in range(10, 100)]):
        found = [d * 10.0**p for p in powers for d in digits if low <= d * 10.0**p <= high]
        if len(found) >= 4:
            break
    return found
