"""A contact sheet of queries and their nearest images."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from shards.errors import UserError, suggest_fix
from shards.inspect.sheet_cells import CAPTION, GAP, PAPER, draw_caption, draw_cell, load_font, write_png

MOST_ROWS = 100
MOST_NEIGHBORS = 20
SIDE = 144  # pixels of a cell


class SheetCell(NamedTuple):
    """An image of the sheet with what is written under it."""

    image: Image.Image | str
    """the image, or the reason why there is none"""
    name: str
    """the first line"""
    details: str
    """the second line"""


def draw_neighbor_sheet(rows: Iterable[list[SheetCell]]) -> Image.Image:
    """Draw a row for each query: its cell, and after a double gap those of its neighbors.

    Row by row, a cell starts every SIDE + GAP pixels from the left, the neighbors GAP pixels further, and every SIDE +
    CAPTION + GAP from the top, after a first GAP.
    """
    strips = [_draw_row(row) for row in rows]
    width = max(strip.width for strip in strips)
    sheet = Image.new("RGB", (width, GAP + sum(strip.height for strip in strips)), PAPER)
    for number, strip in enumerate(strips):
        sheet.paste(strip, (0, GAP + number * strip.height))
    return sheet


def _draw_row(row: list[SheetCell]) -> Image.Image:
    font = load_font()
    strip = Image.new("RGB", (2 * GAP + len(row) * (SIDE + GAP), SIDE + CAPTION + GAP), PAPER)
    for column, cell in enumerate(row):
        left = GAP + column * (SIDE + GAP) + (GAP if column else 0)
        strip.paste(draw_cell(cell.image, SIDE, font), (left, 0))
        strip.paste(draw_caption(cell.name, cell.details, SIDE, font), (left, SIDE))
    return strip


def save_neighbor_sheet(rows: Iterable[list[SheetCell]], path: Path) -> None:
    """Write `draw_neighbor_sheet` as a PNG file, whole or not at all. Raises UserError where that is refused."""
    try:
        write_png(draw_neighbor_sheet(rows), path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}. {suggest_fix(error)}") from error
