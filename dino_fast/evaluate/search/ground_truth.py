"""The ground truth of a retrieval set: which images belong to which query.

Three kinds of file are read. The pickles and the JSON files of revisited Oxford and Paris have the keys `imlist`,
`qimlist` and `gnd`. An own set is a CSV file with the columns query and positives, and if needed ignored and box.
"""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dino_fast.evaluate.features import spread_evenly
from dino_fast.evaluate.search.plain_pickle import NotPlainError, PickledArray, read_plain_pickle
from dino_fast.evaluate.search.ranking import Choice, Ids
from shards.errors import UserError
from shards.text import escape_unprintable

Box = tuple[float, float, float, float]

_MAX_BYTES = 2**28
_SEPARATOR = ";"  # between the names in a cell of a CSV file
_CSV_COLUMNS = ("query", "positives", "ignored")


@dataclass(frozen=True)
class Query:
    """A query and the database images that belong to it, by their numbers in `GroundTruth.images`."""

    name: str
    """the image's name, as the file has it"""
    easy: Ids
    """images that show the same, well visible; all positives of a CSV file"""
    hard: Ids = field(default_factory=lambda: np.zeros(0, np.int64))
    """images that show the same, but are hard to recognize"""
    junk: Ids = field(default_factory=lambda: np.zeros(0, np.int64))
    """images that count neither as right nor as wrong"""
    box: Box | None = None
    """what is searched for in the query's image: left, top, right, bottom, pixels"""


@dataclass(frozen=True)
class GroundTruth:
    """A retrieval set."""

    images: tuple[str, ...]
    """names of the database images"""
    queries: tuple[Query, ...]
    levels: bool = True
    """whether positives are divided into easy and hard ones"""

    def list_choices(self) -> dict[str, Choice]:
        """Return the choices of positives that are scored, by name: easy, medium and hard, or all."""
        easy, hard, junk = ([getattr(query, level) for query in self.queries] for level in ("easy", "hard", "junk"))
        if not self.levels:
            return {"all": Choice(easy, junk)}
        return {
            "easy": Choice(easy, _join(junk, hard)),
            "medium": Choice(_join(easy, hard), junk),
            "hard": Choice(hard, _join(junk, easy)),
        }

    def find_queries_without_positives(self) -> list[str]:
        """Return the names of the queries that count nowhere."""
        return [query.name for query in self.queries if not len(query.easy) + len(query.hard)]


def limit_ground_truth(truth: GroundTruth, limit: int | None) -> GroundTruth:
    """Keep at most `limit` queries, the images that belong to them, and at most `limit` of the other images.

    Both are chosen at even distances.
    """
    if limit is None:
        return truth
    queries = [truth.queries[number] for number in spread_evenly(len(truth.queries), limit)]
    theirs = np.unique(np.concatenate([ids for query in queries for ids in (query.easy, query.hard, query.junk)]))
    others = np.setdiff1d(np.arange(len(truth.images)), theirs)
    kept = np.sort(np.concatenate([theirs, others[spread_evenly(len(others), limit)]]))

    def renumber(query: Query) -> Query:
        easy, hard, junk = (np.searchsorted(kept, ids) for ids in (query.easy, query.hard, query.junk))
        return replace(query, easy=easy, hard=hard, junk=junk)

    return GroundTruth(tuple(truth.images[number] for number in kept), tuple(map(renumber, queries)), truth.levels)


def _join(some: Sequence[Ids], others: Sequence[Ids]) -> list[Ids]:
    return [np.concatenate(pair) for pair in zip(some, others, strict=True)]


def read_ground_truth(file: Path, list_images: Iterable[str] = ()) -> GroundTruth:
    """Read a ground truth: a pickle (.pkl), JSON (.json), or CSV (.csv) file.

    list_images: the names of all images of the folder, which are the database of a CSV file. Raises UserError, which
    names the file, for one that cannot be read, or holds something else.
    """
    kind = file.suffix.lower()
    readers = {".pkl": _read_pickle, ".pickle": _read_pickle, ".json": _read_json}
    if kind not in (*readers, ".csv"):
        raise UserError(f"--ground-truth {file}: pass a .pkl, .json or .csv file.")
    try:
        content = _read_bytes(file)
        return read_csv(content, list_images) if kind == ".csv" else _read_published(readers[kind](content))
    except _BadFileError as error:
        raise UserError(f"--ground-truth {escape_unprintable(f'{file}: {error}')}") from error


class _BadFileError(Exception):
    """A file holds no ground truth. The message says why, and what to do."""


def _read_bytes(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise _BadFileError(f"{error.strerror}. Pass the file that names queries and positives.") from error
    if len(content) > _MAX_BYTES:
        raise _BadFileError(f"it has more than {_MAX_BYTES} bytes, so it is no ground truth.")
    return content


# The files of revisited Oxford and Paris


def _read_pickle(content: bytes) -> Any:
    try:
        return read_plain_pickle(content)
    except NotPlainError as error:
        raise _BadFileError(
            f"the pickle is refused, because it holds more than data, or is damaged: {error}. Nothing in it was run."
        ) from error


def _read_json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _BadFileError(f"it is no JSON file ({str(error)[:80]}).") from error


def _read_published(value: Any) -> GroundTruth:
    keys = ("imlist", "qimlist", "gnd")
    if not isinstance(value, dict) or not all(isinstance(value.get(key), list) for key in keys):
        raise _BadFileError("it has not the lists imlist, qimlist and gnd of revisited Oxford and Paris.")
    images, names, rows = (value[key] for key in keys)
    if not images or not all(isinstance(name, str) for name in (*images, *names)):
        raise _BadFileError("imlist and qimlist are to hold names of images.")
    if len(names) != len(rows) or not all(isinstance(row, dict) for row in rows):
        raise _BadFileError(f"it has {len(names)} queries, but {len(rows)} entries of gnd.")
    queries = [_read_query(name, row, len(images)) for name, row in zip(names, rows, strict=True)]
    return GroundTruth(tuple(images), tuple(queries))


def _read_query(name: str, row: dict[Any, Any], images: int) -> Query:
    levels = {level: _read_ids(name, level, row.get(level, []), images) for level in ("easy", "hard", "junk")}
    box = row.get("bbx")
    return Query(name, **levels, box=None if box is None else _read_box(name, _unwrap(box)))


def _read_ids(name: str, level: str, value: Any, images: int) -> Ids:
    values = _unwrap(value)
    try:
        ids = np.asarray(values if isinstance(values, list | tuple | np.ndarray) else None)
    except ValueError:  # lists of several lengths
        ids = np.asarray(None)
    if ids.ndim == 1 and not len(ids):
        return np.zeros(0, np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not (ids.min() >= 0 and ids.max() < images):
        raise _BadFileError(f"{level} of query {name} is no list of numbers from 0 to {images - 1}.")
    return ids.astype(np.int64)


def _read_box(name: str, values: Any) -> Box:
    try:
        left, top, right, bottom = (float(value) for value in values)
    except (TypeError, ValueError):
        left = top = right = bottom = 0
    if not (left < right and top < bottom and all(map(np.isfinite, (left, top, right, bottom)))):
        raise _BadFileError(f"the box of query {name} is not left, top, right, bottom in pixels.")
    return left, top, right, bottom


def _unwrap(value: Any) -> Any:
    return value.values if isinstance(value, PickledArray) else value


# An own set


def read_csv(content: bytes, list_images: Iterable[str]) -> GroundTruth:
    """Read the rows of a CSV file: query;positives;ignored, with semicolons between names of one cell.

    All images of the folder are the database. The query itself is ignored, if it is one of them.
    """
    try:
        rows = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        if missing := [column for column in _CSV_COLUMNS[:2] if column not in (rows.fieldnames or ())]:
            raise _BadFileError(f"its first line has no column {missing[0]}. Begin it with query,positives,ignored")
        found = [(rows.line_num, row) for row in rows]
    except (UnicodeDecodeError, csv.Error) as error:
        raise _BadFileError(f"it is no CSV file in UTF-8 ({error}).") from error
    if not found:
        raise _BadFileError("it has no queries. Add a line for each.")
    images = tuple(list_images)
    numbers = {name: number for number, name in enumerate(images)}
    return GroundTruth(images, tuple(_read_row(line, row, numbers) for line, row in found), levels=False)


def _read_row(line: int, row: dict[str, Any], numbers: dict[str, int]) -> Query:
    name = (row["query"] or "").strip()
    if not name or None in row:
        raise _BadFileError(f"line {line} has {'no query' if not name else 'more cells than the first line'}.")
    positives, ignored = (_split(row.get(column)) for column in _CSV_COLUMNS[1:])
    if unknown := [other for other in (*positives, *ignored) if other not in numbers]:
        raise _BadFileError(f"line {line} names {unknown[0]}, which is not in --images.")
    skipped = [*ignored, *([name] if name in numbers else [])]
    easy, junk = (np.array([numbers[other] for other in names], np.int64) for names in (positives, skipped))
    box = _split(row.get("box"))
    return Query(name, easy[~np.isin(easy, junk)], junk=junk, box=_read_box(name, box) if box else None)


def _split(cell: Any) -> list[str]:
    return [part for part in (text.strip() for text in (cell or "").split(_SEPARATOR)) if part]
