"""Draw a contact sheet of random samples, each with its class, in the colors that training sees."""

import contextlib
import math
import os
import random
import textwrap
import unicodedata
import uuid
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from shards.errors import UserError
from shards.index import ShardIndex
from shards.inspect.rgb import UnreadableError, decode_rgb
from shards.layout import UNLABELED
from shards.text import escape_unprintable

GAP = 8  # pixels around a cell and its caption
CAPTION = 36  # pixels under a cell: two lines of text
_WIDTH = 1600  # pixels of a sheet, unless a single cell is wider
_LINE = 17  # pixels from one line of text to the next
_FONT_SIZE = 13
_PAPER, _CELL, _INK, _FAINT, _ALARM = "white", (236, 236, 236), (20, 20, 20), (110, 110, 110), (170, 20, 20)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw_contact_sheet(index: ShardIndex, count: int, seed: int, side: int = 160) -> Image.Image:
    """Draw `count` random samples (all, where there are fewer) in the order of their numbers.

    Each is scaled to fit in the center of a cell of `side` × `side` pixels. Row by row, a cell starts every side + GAP
    pixels from the left, and every side + CAPTION + GAP from the top, after a first GAP. A sample that cannot be
    decoded shows the reason instead.
    """
    ids = sorted(random.Random(seed).sample(range(len(index)), min(count, len(index))))
    columns = max(min(math.ceil(math.sqrt(len(ids))), (_WIDTH - GAP) // (side + GAP)), 1)
    rows = max(math.ceil(len(ids) / columns), 1)
    sheet = Image.new("RGB", (GAP + columns * (side + GAP), GAP + rows * (side + CAPTION + GAP)), _PAPER)
    font = ImageFont.load_default(_FONT_SIZE)
    for place, id in enumerate(ids):
        row, column = divmod(place, columns)
        corner = (GAP + column * (side + GAP), GAP + row * (side + CAPTION + GAP))
        sheet.paste(_draw_cell(index, id, side, font), corner)
        sheet.paste(_draw_caption(index, id, side, font), (corner[0], corner[1] + side))
    return sheet


def save_sheet(sheet: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a PNG file completely or not at all. Raises UserError for another extension, and where writing fails."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(f"--grid {escape_unprintable(str(path))}: the sheet is a PNG file. Use a name ending in .png.")
    try:
        write_png(sheet, path)
    except OSError as error:
        raise UserError(
            f"cannot write {escape_unprintable(str(path))}: {error.strerror or error}. Give --grid a file in a folder "
            "that exists, has room, and that you may write to."
        ) from error


def write_png(sheet: Image.Image, path: Path) -> None:
    """Write a file completely or not at all. Raises OSError where that fails."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        sheet.save(temporary, "PNG")
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _draw_cell(index: ShardIndex, id: int, side: int, font: Font) -> Image.Image:
    """Return the image on gray, or the reason why there is none."""
    cell = Image.new("RGB", (side, side), _CELL)
    try:
        image = _scale(decode_rgb(index, id), side)
    except (UnreadableError, UserError) as error:
        lines = textwrap.wrap(_convert_to_ascii(str(error)), max(side // 7, 1))  # 7 pixels: about a letter's width
        ImageDraw.Draw(cell).multiline_text((4, 2), "\n".join(lines), _ALARM, font, spacing=3)
        return cell
    cell.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return cell


def _scale(image: Image.Image, side: int) -> Image.Image:
    """Return the image scaled so that its longer side has `side` pixels."""
    longer = max(image.size)
    width, height = (max(round(length * side / longer), 1) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _draw_caption(index: ShardIndex, id: int, side: int, font: Font) -> Image.Image:
    """Return the class, and under it the number and size of the image. Without a label the first line is left out."""
    caption = Image.new("RGB", (side, CAPTION), _PAPER)
    draw = ImageDraw.Draw(caption)
    label = int(index.labels[id])
    top = 1
    if label != UNLABELED:
        draw.text((0, top), _cut_to_width(index.classes[label], side, font), _INK, font)
        top += _LINE
    numbers = f"#{id}  {index.widths[id]} x {index.heights[id]}"
    draw.text((0, top), _cut_to_width(numbers, side, font), _FAINT, font)
    return caption


def _cut_to_width(text: str, width: int, font: Font) -> str:
    """Return `text` without the end that does not fit into `width` pixels."""
    text = _convert_to_ascii(text[:width])
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


def _convert_to_ascii(text: str) -> str:
    """Return what Pillow's own font can draw: letters without accents, and escapes for all that has no such letter."""
    plain = (letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    return escape_unprintable("".join(plain)).encode("ascii", "backslashreplace").decode()
