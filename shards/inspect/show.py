"""Draw a contact sheet of random samples, each with its class, in the colors that training sees."""

import math
import os
import random
from pathlib import Path

from PIL import Image

from shards.errors import UserError
from shards.index import ShardIndex
from shards.inspect.rgb import UnreadableError, decode_rgb
from shards.inspect.sheet_cells import CAPTION, GAP, PAPER, draw_caption, draw_cell, load_font, write_png
from shards.layout import UNLABELED
from shards.text import escape_unprintable

_WIDTH = 1600  # pixels of a sheet, unless a single cell is wider


def draw_contact_sheet(index: ShardIndex, count: int, seed: int, side: int = 160) -> Image.Image:
    """Draw `count` random samples (all, where there are fewer) in the order of their numbers.

    Each is scaled to fit in the center of a cell of `side` × `side` pixels. Row by row, a cell starts every side + GAP
    pixels from the left, and every side + CAPTION + GAP from the top, after a first GAP. A sample that cannot be
    decoded shows the reason instead.
    """
    ids = sorted(random.Random(seed).sample(range(len(index)), min(count, len(index))))
    columns = max(min(math.ceil(math.sqrt(len(ids))), (_WIDTH - GAP) // (side + GAP)), 1)
    rows = max(math.ceil(len(ids) / columns), 1)
    sheet = Image.new("RGB", (GAP + columns * (side + GAP), GAP + rows * (side + CAPTION + GAP)), PAPER)
    font = load_font()
    for place, id in enumerate(ids):
        row, column = divmod(place, columns)
        corner = (GAP + column * (side + GAP), GAP + row * (side + CAPTION + GAP))
        label = int(index.labels[id])
        name = None if label == UNLABELED else index.classes[label]
        details = f"#{id}  {index.widths[id]} x {index.heights[id]}"
        sheet.paste(draw_cell(_read(index, id), side, font), corner)
        sheet.paste(draw_caption(name, details, side, font), (corner[0], corner[1] + side))
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


def _read(index: ShardIndex, id: int) -> Image.Image | str:
    """Return a sample's image, or the reason why there is none."""
    try:
        return decode_rgb(index, id)
    except (UnreadableError, UserError) as error:
        return str(error)
