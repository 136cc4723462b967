"""Text for people: safe on any terminal, short enough for a line, with units."""

import itertools
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence


def escape_unprintable(text: str) -> str:
    """Return `text` as one line that cannot harm a terminal.

    Control characters, and bytes that are not UTF-8, are escaped.
    """
    return "".join(character if character.isprintable() else _escape(character) for character in text)


def shorten(text: str, columns: int) -> str:
    """Return `escape_unprintable(text)` in at most `columns` columns of a terminal. Long text loses its middle."""
    text = escape_unprintable(text)
    if sum(map(_count_columns, text)) <= columns:
        return text
    tail = (columns - 3) // 2
    return f"{_cut_to_columns(text, columns - 3 - tail)}...{_cut_to_columns(text[::-1], tail)[::-1]}"


def find_reason(error: Exception) -> str:
    """Return the first line of an exception's text without its full stop, or else the name of its class."""
    return (next(iter(str(error).splitlines()), "") or type(error).__name__).rstrip(".")


def list_first(names: Sequence[str]) -> str:
    """Return the first three names, with an ellipsis where there are more."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def format_count(count: int, noun: str) -> str:
    """Return a number with its noun: "1 image", "2 images", "1,000 classes"."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{'' if count == 1 else plural}"


def format_bytes(size: float) -> str:
    """Return a size to three digits in decimal units, which are those of ``--shard-size``: "256 MB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} PB"


def _escape(character: str) -> str:
    if 0xDC80 <= ord(character) <= 0xDCFF:  # how Python stores a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def _count_columns(character: str) -> int:
    """Return how many columns of a terminal a character takes."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _cut_to_columns(text: str, columns: int) -> str:
    ends = list(itertools.accumulate(map(_count_columns, text)))
    return text[: bisect_right(ends, columns)]
