"""Draw the demo's image set: labeled images of patterns. Only the pattern tells the class.

Colors, position, shading, clutter, blur, noise, image size and JPEG quality follow the same law in every class. What is
left to learn is the pattern: its shapes, their spacing and their direction.

Self-distillation learns this set in minutes, for two reasons. A pattern repeats several times in every crop, so that
two crops of an image have it in common. And the recipe's augmentation (configs/cpu_demo.yaml) takes away color, which
random features see first. Earlier image sets, whose crops had little in common, taught nothing in the same time:
bench/LOG.md has the figures.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from shards.errors import UserError

Field: TypeAlias = NDArray[np.floating]  # float32 throughout; the type checker loses that when Python floats join in
Pattern: TypeAlias = Callable[[Field, Field, np.random.Generator], Field]

LONG_SIDE = (120, 180)  # pixels
ASPECT = (0.7, 1.4)  # width / height, log-uniform
CELLS = (6.5, 8.0)  # how often a pattern repeats along the short side
MAX_TURN = 0.15  # radians by which a pattern is turned
MEAN_LEVEL = (118, 138)  # gray level of the mean of the two colors, 0 to 255
CONTRAST = (60, 72)  # gray levels between that mean and each of the two colors
TINT = 80  # levels by which a channel of either may differ from that
LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in a gray level
DRIFT = 12  # levels by which the colors change along an image
FADE = 0.15  # share by which the contrast changes along an image
MAX_CLUTTER = 1  # odd shapes on an image
BLUR = 0.7  # pixels, radius of the Gaussian blur
NOISE = 6  # levels, standard deviation
RECORD_FILE = "drawing.json"
VERSION = 3  # raise it when a change here changes any image


# ---- the patterns ---------------------------------------------------------------------------------------------------
# Each function takes coordinates u, v [H, W] in cells; one cell is one repeat of the pattern. It returns how far inside
# the shape each pixel lies, [H, W] in cells: positive inside, negative outside.


def _split_into_cells(u: Field, v: Field) -> tuple[Field, Field]:
    """Return the coordinates within each cell, from its center: both in [-0.5, 0.5)."""
    return u - np.floor(u) - 0.5, v - np.floor(v) - 0.5


def _stripes(u: Field, v: Field, rng: np.random.Generator) -> Field:
    return rng.uniform(0.17, 0.33) - np.abs(_split_into_cells(u, v)[0])


def _lines(u: Field, v: Field, rng: np.random.Generator) -> Field:
    return _stripes(v * np.float32(1.5), u, rng)


def _diagonals(u: Field, v: Field, rng: np.random.Generator) -> Field:
    return _stripes((u + v) * np.float32(0.85), v, rng)


def _waves(u: Field, v: Field, rng: np.random.Generator) -> Field:
    swing = rng.uniform(0.3, 0.45) * np.sin(v * np.float32(np.pi))
    return rng.uniform(0.17, 0.33) - np.abs(_split_into_cells(u + swing, v)[0])


def _checks(u: Field, v: Field, rng: np.random.Generator) -> Field:
    a, b = _split_into_cells(u, v)
    inside = 0.25 - np.maximum(np.abs(np.abs(a) - 0.25), np.abs(np.abs(b) - 0.25))
    return inside * np.sign(a) * np.sign(b)


def _dots(u: Field, v: Field, rng: np.random.Generator) -> Field:
    return rng.uniform(0.26, 0.4) - np.hypot(*_split_into_cells(u, v))


def _rings(u: Field, v: Field, rng: np.random.Generator) -> Field:
    return rng.uniform(0.06, 0.1) - np.abs(np.hypot(*_split_into_cells(u, v)) - 0.33)


def _crosses(u: Field, v: Field, rng: np.random.Generator) -> Field:
    a, b = (np.abs(x) for x in _split_into_cells(u, v))
    return np.minimum(rng.uniform(0.08, 0.13) - np.minimum(a, b), 0.42 - np.maximum(a, b))


def _triangles(u: Field, v: Field, rng: np.random.Generator) -> Field:
    a, b = _split_into_cells(u, v)
    return rng.uniform(0.18, 0.24) - np.maximum(np.abs(a) * 0.866 + b * 0.5, -b)


def _bricks(u: Field, v: Field, rng: np.random.Generator) -> Field:
    row = np.floor(v * 1.6)
    a, b = _split_into_cells(u * 0.8 + 0.5 * row, v * 1.6)
    return np.minimum(0.5 - np.abs(a), (0.5 - np.abs(b)) * 0.6) - rng.uniform(0.04, 0.07)


def _honeycomb(u: Field, v: Field, rng: np.random.Generator) -> Field:
    """Draw the walls of hexagonal cells: pixels that are about as near to a second lattice point as to the nearest."""
    tall = np.float32(np.sqrt(3))
    distances = []
    for shift in (0.0, 0.5):
        a, b = _split_into_cells(u + shift, v / tall + shift)
        a, b = np.abs(a), np.abs(b) * tall
        distances.append(np.maximum(a, a * 0.5 + b * 0.866))
    return 0.5 - np.minimum(*distances) - rng.uniform(0.07, 0.11)


def _blobs(u: Field, v: Field, rng: np.random.Generator) -> Field:
    """Cut a sum of plane waves in random directions at about its mean, which gives round islands in no order."""
    total = np.zeros_like(u)
    for angle in (np.arange(7) + rng.random(7)) * (np.pi / 7):
        pace = rng.uniform(4.5, 6.5)
        x, y, phase = np.float32(pace * np.cos(angle)), np.float32(pace * np.sin(angle)), rng.uniform(0, 2 * np.pi)
        total += np.sin(u * x + v * y + np.float32(phase))
    return total * 0.1


PATTERNS: dict[str, Pattern] = {
    "blobs": _blobs,
    "bricks": _bricks,
    "checks": _checks,
    "crosses": _crosses,
    "diagonals": _diagonals,
    "dots": _dots,
    "honeycomb": _honeycomb,
    "lines": _lines,
    "rings": _rings,
    "stripes": _stripes,
    "triangles": _triangles,
    "waves": _waves,
}


# ---- what must not tell the class -----------------------------------------------------------------------------------


def _make_coordinates(width: int, height: int, rng: np.random.Generator) -> tuple[Field, Field, float]:
    """Turn, stretch, bend and shift the pixels' coordinates, and measure them in cells.

    Return u, v [H, W] float32, and the size of a cell in pixels.
    """
    cell = min(width, height) / rng.uniform(*CELLS)
    angle, stretch = rng.uniform(-MAX_TURN, MAX_TURN), np.exp(rng.uniform(-0.08, 0.08))
    x = (np.arange(width, dtype=np.float32)[None, :] - np.float32(width * rng.uniform(0.3, 0.7))) / np.float32(cell)
    y = (np.arange(height, dtype=np.float32)[:, None] - np.float32(height * rng.uniform(0.3, 0.7))) / np.float32(cell)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = (x * cos - y * sin) * np.float32(stretch), (x * sin + y * cos) / np.float32(stretch)
    bend = np.float32(rng.uniform(-0.03, 0.03))
    return u + bend * v * v, v + bend * u * u, cell


def _make_smooth_noise(width: int, height: int, channels: int, grid: int, rng: np.random.Generator) -> Field:
    """Enlarge a coarse random grid to smooth noise in about [-1, 1]: [H, W, channels] float32."""
    coarse = rng.integers(0, 256, (grid, grid, channels), dtype=np.uint8)
    image = Image.fromarray(coarse.squeeze() if channels == 1 else coarse)
    fine = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    return (fine / np.float32(127.5) - 1).reshape(height, width, channels)


def _add_clutter(image: Image.Image, rng: np.random.Generator) -> None:
    """Draw a few opaque shapes of any color over the pattern."""
    draw, (width, height) = ImageDraw.Draw(image), image.size
    for _ in range(int(rng.integers(0, MAX_CLUTTER + 1))):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        across, down = rng.uniform(0.03, 0.12, 2) * min(width, height)
        color = tuple(int(level) for level in rng.integers(0, 256, 3))
        kind = rng.integers(0, 3)
        if kind == 0:
            draw.ellipse((x - across, y - down, x + across, y + down), fill=color)
        elif kind == 1:
            draw.rectangle((x - across, y - down, x + across, y + down), fill=color)
        else:
            end = (x + rng.uniform(-0.6, 0.6) * width, y + rng.uniform(-0.6, 0.6) * height)
            draw.line((x, y, *end), fill=color, width=int(rng.integers(2, 8)))


def _choose_colors(rng: np.random.Generator) -> tuple[Field, Field]:
    """Choose two colors of any hue. The shape is lighter than the ground.

    Return their mean, and the step from it to the shape's color: [3] each, in levels. The tints change no luminance, so
    that nothing of them is left in a grayscale view of the image.
    """
    tints = rng.uniform(-TINT, TINT, (2, 3))
    tints -= (tints @ LUMA)[:, None]
    mean, contrast = rng.uniform(*MEAN_LEVEL), rng.uniform(*CONTRAST)
    return (mean + tints[0]).astype(np.float32), (contrast + tints[1]).astype(np.float32)


def _color_mask(mask: Field, rng: np.random.Generator) -> Field:
    """Color a mask [H, W] in 0 to 1 with two colors that drift along the image: [H, W, 3], in levels."""
    height, width = mask.shape
    mean, step = _choose_colors(rng)
    drift = _make_smooth_noise(width, height, 3, 4, rng) * np.float32(DRIFT)
    fade = np.float32(0.8) + _make_smooth_noise(width, height, 3, 3, rng) * np.float32(FADE)
    shape = 2 * (mask - mask.mean())[..., None]  # so that the share of the shape does not show in the mean color
    return np.asarray(mean + drift + step * fade * shape, dtype=np.float32)


def _add_blur_and_noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Add blur and sensor noise. Both vary in strength along the image."""
    width, height = image.size
    smooth = _make_smooth_noise(width, height, 2, 3, rng)
    strength = smooth * np.float32(0.5) + np.float32(0.5)  # [H, W, 2], about 0 to 1
    sharp, soft = (np.asarray(x, np.float32) for x in (image, image.filter(ImageFilter.GaussianBlur(BLUR))))
    noise = rng.standard_normal((height, width, 1), dtype=np.float32) * np.float32(NOISE)
    levels = sharp + strength[..., :1] * (soft - sharp) + strength[..., 1:] * noise
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))


def draw_image(name: str, rng: np.random.Generator) -> Image.Image:
    """Draw one RGB image of class `name`, with every choice from `rng`. Its sides are 80 to 180 pixels."""
    long_side, aspect = rng.uniform(*LONG_SIDE), np.exp(rng.uniform(*np.log(ASPECT)))
    width, height = (round(long_side * min(1.0, ratio)) for ratio in (aspect, 1 / aspect))
    u, v, cell = _make_coordinates(width, height, rng)
    inside = PATTERNS[name](u, v, rng) * np.float32(cell)  # pixels from the edge of the shape, roughly
    mask = np.clip(inside + 0.5, 0, 1).astype(np.float32)
    levels = _color_mask(mask, rng)
    image = Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))
    _add_clutter(image, rng)
    return _add_blur_and_noise(image, rng)


# ---- files ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Drawing:
    """All that the files of a drawn folder depend on. It is written into the folder last."""

    per_class: int
    """training images of each class"""
    val_per_class: int
    """validation images of each class"""
    seed: int
    """seed of all choices"""
    classes: tuple[str, ...] = tuple(PATTERNS)
    """names of the classes"""
    version: int = VERSION
    """version of this file"""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def _list_images(drawing: _Drawing) -> Iterator[tuple[Path, str, np.random.Generator]]:
    """Yield each image's path below the folder, its class and its own generator: no image depends on another."""
    for split, (folder, count) in enumerate((("train", drawing.per_class), ("val", drawing.val_per_class))):
        for label, name in enumerate(drawing.classes):
            for number in range(count):
                rng = np.random.default_rng([drawing.seed, split, label, number])
                yield Path(folder, name, f"{number:05d}.jpg"), name, rng


def _draw_into(folder: Path, drawing: _Drawing, progress: Callable[[], object]) -> None:
    for path, name, rng in _list_images(drawing):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        image = draw_image(name, rng)
        image.save(target, quality=int(rng.integers(45, 96)))
        progress()
    (folder / RECORD_FILE).write_text(drawing.to_json())


def _is_drawn(folder: Path, drawing: _Drawing) -> bool:
    """Return whether `folder` holds this very drawing, finished. Raises UserError for a folder that is not ours."""
    if not folder.exists():
        return False
    record = folder / RECORD_FILE
    if record.is_file():
        return record.read_text() == drawing.to_json()
    if folder.is_dir() and not any(folder.iterdir()):
        return False
    raise UserError(f"{folder} exists and was not drawn by the demo. Move it away, or name another folder.")


def draw_dataset(
    folder: str | os.PathLike[str],
    per_class: int,
    val_per_class: int,
    seed: int,
    progress: Callable[[], object] = lambda: None,
) -> Path:
    """Draw `folder/train/CLASS/*.jpg` and `folder/val/CLASS/*.jpg`; return `folder`.

    The same arguments give the same images, and an image does not change with the counts. `progress` is called after
    each image. A finished drawing is kept as it is; one with other arguments is replaced. The images appear all at
    once: they are drawn beside `folder` and renamed, so an interrupted drawing leaves nothing under its name.

    Raises:
        ValueError: a count below 1 or a negative seed.
        UserError: `folder` holds something else, or cannot be written.
    """
    if per_class < 1 or val_per_class < 1 or seed < 0:
        raise ValueError(f"counts must be 1 or more and the seed 0 or more, not {per_class}, {val_per_class}, {seed}")
    folder, drawing = Path(folder).absolute(), _Drawing(per_class, val_per_class, seed)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        if _is_drawn(folder, drawing):
            return folder
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        _draw_into(partial, drawing, progress)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as error:
        raise UserError(
            f"{folder}: the demo's images cannot be written there ({error.strerror}). Name another folder."
        ) from error
    return folder
