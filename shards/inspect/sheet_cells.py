"""What contact sheets are made of: cells with an image in each, captions under them, and the PNG file."""

import contextlib
import os
import textwrap
import unicodedata
import uuid
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from shards.text import escape_unprintable

GAP = 8  # pixels around a cell and its caption
CAPTION = 36  # pixels under a cell: two lines of text
PAPER = "white"
_LINE = 17  # pixels from one line of text to the next
_FONT_SIZE = 13
_CELL, _INK, _FAINT, _ALARM = (236, 236, 236), (20, 20, 20), (110, 110, 110), (170, 20, 20)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def load_font() -> Font:
    """Return the font of captions."""
    return ImageFont.load_default(_FONT_SIZE)


def write_png(sheet: Image.Image, path: Path) -> None:
    """Write a file completely or not at all. Raises OSError where that fails."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        sheet.save(temporary, "PNG")
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def draw_cell(image: Image.Image | str, side: int, font: Font) -> Image.Image:
    """Return a square with the image in its center, scaled to fit, on gray; or with the reason why there is none."""
    cell = Image.new("RGB", (side, side), _CELL)
    if isinstance(image, str):
        lines = textwrap.wrap(_convert_to_ascii(image), max(side // 7, 1))  # 7 pixels: about a letter's width
        ImageDraw.Draw(cell).multiline_text((4, 2), "\n".join(lines), _ALARM, font, spacing=3)
        return cell
    scaled = _scale(image, side)
    cell.paste(scaled, ((side - scaled.width) // 2, (side - scaled.height) // 2))
    return cell


def draw_caption(name: str | None, details: str, side: int, font: Font) -> Image.Image:
    """Return two lines of text that are cut to the width of a cell. Without a name the first line is left out."""
    caption = Image.new("RGB", (side, CAPTION), PAPER)
    draw = ImageDraw.Draw(caption)
    top = 1
    if name is not None:
        draw.text((0, top), _cut_to_width(name, side, font), _INK, font)
        top += _LINE
    draw.text((0, top), _cut_to_width(details, side, font), _FAINT, font)
    return caption


def _scale(image: Image.Image, side: int) -> Image.Image:
    """Return the image scaled so that its longer side has `side` pixels."""
    longer = max(image.size)
    width, height = (max(round(length * side / longer), 1) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


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
