"""The accuracy of each class, for JSON and for people."""

from collections.abc import Sequence
from typing import Any

from shards.text import shorten

MOST_ROWS = 20  # with more classes, only the best and the worst are printed
_ENDS = 5
_COLUMNS = 40  # of a terminal, for a class's name


def list_classes(names: Sequence[str], images: Sequence[int], hits: Sequence[int]) -> list[dict[str, Any]]:
    """Return a row for each class: its name, its number of images, and its top-1 in percent, None without images."""
    return [
        {"class": name, "images": count, "top1": 100 * right / count if count else None}
        for name, count, right in zip(names, images, hits, strict=True)
    ]


def format_class_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the rows of `list_classes` as lines: all of up to 20, or else the five best and the five worst."""
    scored = sorted((row for row in rows if row["images"]), key=lambda row: -row["top1"])
    if len(rows) <= MOST_ROWS:
        return [_format_row(row) for row in rows]
    best, worst = scored[:_ENDS], scored[_ENDS:][-_ENDS:]
    return ["the best classes:", *map(_format_row, best), "the worst classes:", *map(_format_row, worst)]


def _format_row(row: dict[str, Any]) -> str:
    top1 = "     –  " if row["top1"] is None else f"{row['top1']:6.2f} %"
    return f"  {top1}  {row['images']:6d} images  {shorten(row['class'], _COLUMNS)}"
