"""A contact sheet of samples drawn at random, each with its class, as training sees their colours."""

import contextlib
import io
import math
import os
import random
import textwrap
import unicodedata
import uuid
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from shards.errors import UserError
from shards.index import BadSample, ShardIndex
from shards.inspect.info import printable
from shards.layout import UNLABELLED

GAP = 8  # pixels around a cell and its caption
CAPTION = 36  # pixels under a cell: two lines of text
_WIDTH = 1600  # pixels of a sheet, unless a single cell is wider
_LINE = 17  # pixels from one line of text to the next
_FONT_SIZE = 13
_PAPER, _CELL, _INK, _FAINT, _ALARM = "white", (236, 236, 236), (20, 20, 20), (110, 110, 110), (170, 20, 20)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class _UnreadableError(Exception):
    """The message is the reason, for people."""


def contact_sheet(index: ShardIndex, count: int, seed: int, side: int = 160) -> Image.Image:
    """`count` samples (all, where there are fewer) drawn without replacement, in the order of their numbers.

    Each is scaled to fit in a cell of `side` × `side` pixels, centred. Row by row, a cell starts every side + GAP
    pixels from the left, and every side + CAPTION + GAP from the top, after a first GAP. One that does not decode shows
    the reason instead.
    """
    ids = sorted(random.Random(seed).sample(range(len(index)), min(count, len(index))))
    columns = max(min(math.ceil(math.sqrt(len(ids))), (_WIDTH - GAP) // (side + GAP)), 1)
    rows = max(math.ceil(len(ids) / columns), 1)
    sheet = Image.new("RGB", (GAP + columns * (side + GAP), GAP + rows * (side + CAPTION + GAP)), _PAPER)
    font = ImageFont.load_default(_FONT_SIZE)
    for place, id in enumerate(ids):
        row, column = divmod(place, columns)
        corner = (GAP + column * (side + GAP), GAP + row * (side + CAPTION + GAP))
        sheet.paste(_cell(index, id, side, font), corner)
        sheet.paste(_caption(index, id, side, font), (corner[0], corner[1] + side))
    return sheet


def save(sheet: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a PNG file, whole or not at all. Raises UserError for another extension and where writing is refused."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(f"{printable(str(path))}: the sheet is a PNG picture; give --grid a name that ends in .png")
    try:
        write_png(sheet, path)
    except OSError as error:
        raise UserError(
            f"cannot write {printable(str(path))}: {error.strerror or error}; give --grid a file in a folder that "
            "exists, has room, and that you may write to"
        ) from error


def write_png(sheet: Image.Image, path: Path) -> None:
    """Write a file, whole or not at all. Raises OSError where that is refused."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        sheet.save(temporary, "PNG")
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _cell(index: ShardIndex, id: int, side: int, font: Font) -> Image.Image:
    """The picture on grey, or why there is none."""
    cell = Image.new("RGB", (side, side), _CELL)
    try:
        picture = _scaled(_decoded(index, id), side)
    except _UnreadableError as error:
        lines = textwrap.wrap(_ascii(str(error)), max(side // 7, 1))  # 7 pixels: about a letter's width
        ImageDraw.Draw(cell).multiline_text((4, 2), "\n".join(lines), _ALARM, font, spacing=3)
        return cell
    cell.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return cell


def _decoded(index: ShardIndex, id: int) -> Image.Image:
    """A sample as 8-bit RGB without EXIF rotation, converted as the decoders of pipelines/ do."""
    try:
        (data,) = index.read([id])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, on odd pictures: they were packed nonetheless
            with Image.open(io.BytesIO(data)) as picture:
                if picture.mode.startswith("I;16"):  # Pillow's own conversion clips these to white
                    return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
                return picture.convert("RGB")
    except BadSample as error:
        raise _UnreadableError(error.reason) from error
    except UnidentifiedImageError as error:  # its own message holds an address that differs on every run
        raise _UnreadableError("no picture, or its header is damaged") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged data
        raise _UnreadableError(str(error) or type(error).__name__) from error


def _scaled(picture: Image.Image, side: int) -> Image.Image:
    """Enlarged or reduced until the longer side has `side` pixels."""
    longer = max(picture.size)
    width, height = (max(round(length * side / longer), 1) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _caption(index: ShardIndex, id: int, side: int, font: Font) -> Image.Image:
    """The class, and under it the number and the size of the picture; without a label the second line alone."""
    caption = Image.new("RGB", (side, CAPTION), _PAPER)
    draw = ImageDraw.Draw(caption)
    label = int(index.labels[id])
    top = 1
    if label != UNLABELLED:
        draw.text((0, top), _fitted(index.classes[label], side, font), _INK, font)
        top += _LINE
    numbers = f"#{id}  {index.widths[id]} x {index.heights[id]}"
    draw.text((0, top), _fitted(numbers, side, font), _FAINT, font)
    return caption


def _fitted(text: str, width: int, font: Font) -> str:
    """`text` with as much of its end left out as does not fit in `width` pixels."""
    text = _ascii(text[:width])
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


def _ascii(text: str) -> str:
    """What Pillow's own font can draw: letters without their accents, and escapes for all that has no such letter."""
    plain = (letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    return printable("".join(plain)).encode("ascii", "backslashreplace").decode()
