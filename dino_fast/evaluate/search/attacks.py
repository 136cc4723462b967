"""Changed copies of images: what a copy detector is to see through.

Every copy is a pure function of (seed, number of the image, attack), so that any of them can be made again alone.
"""

import io
import string
import zlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

_QUALITY = 90  # of the JPEG file of a copy, where the attack is not the quality itself

Draws = np.random.Generator


class Attack(NamedTuple):
    """One way to change an image."""

    change: Callable[[Image.Image, Draws], Image.Image]
    """returns the changed image, which may be drawn from the random numbers"""
    quality: int = _QUALITY
    """JPEG quality of the copy's file"""


def crop(image: Image.Image, draws: Draws, percent: int) -> Image.Image:
    """Cut away this percentage of the area, at the edges. The aspect ratio is kept."""
    sides = [max(round(side * (1 - percent / 100) ** 0.5), 1) for side in image.size]
    left, top = (int(draws.integers(0, old - new + 1)) for old, new in zip(image.size, sides, strict=True))
    return image.crop((left, top, left + sides[0], top + sides[1]))


def resize(image: Image.Image, _: Draws, percent: int) -> Image.Image:
    """Shrink both sides to this percentage."""
    width, height = (max(round(side * percent / 100), 1) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def blur(image: Image.Image, _: Draws, percent: int) -> Image.Image:
    """Blur by a Gaussian whose standard deviation is this percentage of the short side."""
    return image.filter(ImageFilter.GaussianBlur(min(image.size) * percent / 100))


def write_text(image: Image.Image, draws: Draws, lines: int) -> Image.Image:
    """Write lines of random letters in random places and colors, each about an eighth of the short side high."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(max(min(image.size) / 8, 4))
    for _ in range(lines):
        text = "".join(draws.choice(list(string.ascii_uppercase + string.digits), int(draws.integers(6, 13))))
        places = draws.uniform(0, (0.5, 0.85)) * image.size
        color = tuple(draws.integers(0, 256, 3).tolist())
        draw.text((float(places[0]), float(places[1])), text, color, font)
    return image


def flip(image: Image.Image, _: Draws, how: Image.Transpose) -> Image.Image:
    """Mirror the image."""
    return image.transpose(how)


def rotate(image: Image.Image, draws: Draws, degrees: float) -> Image.Image:
    """Turn by up to these degrees, either way. The corners become black."""
    return image.rotate(float(draws.uniform(-degrees, degrees)), Image.Resampling.BICUBIC)


def remove_color(image: Image.Image, _: Draws) -> Image.Image:
    """Return the image in gray."""
    return image.convert("L").convert("RGB")


def change_strongly(image: Image.Image, draws: Draws) -> Image.Image:
    """Turn, cut away up to half, and apply one of four further changes."""
    image = crop(rotate(image, draws, 15), draws, int(draws.integers(30, 51)))
    further = (
        partial(write_text, lines=3),
        partial(blur, percent=1),
        remove_color,
        partial(flip, how=Image.Transpose.FLIP_LEFT_RIGHT),
    )
    return further[int(draws.integers(len(further)))](image, draws)


def keep(image: Image.Image, _: Draws) -> Image.Image:
    """Return the image as it is: only the quality of its file changes."""
    return image


ATTACKS = {
    "strong": Attack(change_strongly, 30),
    **{f"jpegqual/{quality}": Attack(keep, quality) for quality in (3, 5, 10, 20, 50, 75)},
    **{f"crops/{percent}": Attack(partial(crop, percent=percent)) for percent in (10, 20, 30, 50, 70, 80)},
    **{f"resize/{percent}": Attack(partial(resize, percent=percent)) for percent in (12, 25, 50)},
    **{f"blur/{percent}": Attack(partial(blur, percent=percent)) for percent in (1, 2, 4)},
    **{f"text/{lines}": Attack(partial(write_text, lines=lines)) for lines in (1, 3)},
    "flip/horizontal": Attack(partial(flip, how=Image.Transpose.FLIP_LEFT_RIGHT)),
    "flip/vertical": Attack(partial(flip, how=Image.Transpose.FLIP_TOP_BOTTOM)),
}
"""the attacks by the name of the folder that their copies are in"""


def make_copy(image: Image.Image, seed: int, number: int, name: str) -> bytes:
    """Return the JPEG file of a copy of an RGB image. `name`: one of ATTACKS."""
    attack = ATTACKS[name]
    draws = np.random.default_rng([seed, number, zlib.crc32(name.encode())])
    out = io.BytesIO()
    attack.change(image, draws).save(out, "JPEG", quality=attack.quality)
    return out.getvalue()
