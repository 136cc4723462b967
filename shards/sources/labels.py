"""Which class a picture is of: by its folder, by a label's text, by a file of labels, by another set's numbers."""

import csv
import dataclasses
import gzip
import io
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import IO

import numpy as np

from shards.errors import UserError
from shards.layout import UNLABELLED
from shards.sources.class_levels import refuse_loose, refuse_wrong_level
from shards.sources.listing import Listing, few
from shards.storage import files

_MOST_NUMBERED = 1 << 20  # a larger number is no class's place
_SYNSET = re.compile(r"n\d{8}(?=\s|$)")
_FILE = "a CSV of picture and class, or one class a line"
_DEVKIT_LABELS = "ILSVRC2012_validation_ground_truth.txt"
_DEVKIT_CLASSES = "meta.mat"


def by_folder(listing: Listing, format: str, depth: int, folders: Iterable[str]) -> Listing:
    """Labels from the folders `depth` below the root, where the pictures lie in folders there and nowhere else.

    `folders` are names that are classes even without a picture. `format` as in `scan`. Raises UserError for pictures
    beside folders, and for folders that are certainly no classes.
    """
    if format == "flat":
        return _unlabelled(listing)
    found = {name: place for place, name in enumerate(sorted(map(os.fsencode, folders)))}
    numbers = np.empty(len(listing), np.int32)
    loose = None
    for place, name in enumerate(listing.names()):
        folder = _folder(name, depth)
        if folder is None:
            loose = loose or os.fsdecode(name)
        numbers[place] = UNLABELLED if folder is None else found.setdefault(folder, len(found))
    if loose is not None:
        refuse_loose(listing, format, loose, bool((numbers != UNLABELLED).any()))
        return _unlabelled(listing)
    names = [os.fsdecode(name) for name in found]
    if format != "folders":
        refuse_wrong_level(listing, sorted(names[place] for place in np.unique(numbers)))
    return number(dataclasses.replace(listing, format="folders"), numbers, names, named=True)


def number(
    listing: Listing, numbers: np.ndarray, texts: list[str], *, named: bool, names: tuple[str, ...] | None = None
) -> Listing:
    """The listing with classes, from `numbers` [pictures] into `texts`.

    Where not `named`, texts that are all decimal are places: in `names`, or in classes named by their own numbers.
    """
    places = None if named else _places(texts)
    if places is None:
        classes = tuple(sorted(texts, key=os.fsencode))
        place_of = {name: place for place, name in enumerate(classes)}
        places = [place_of[text] for text in texts]
    else:
        classes = names or tuple(map(str, range(max(places, default=-1) + 1)))
        _refuse_beyond(listing, places, classes)
    if len(set(classes)) < len(classes):
        raise UserError(f"{listing.root}: two classes of the name {_repeated(classes)!r}; rename one")
    return listing.labelled(classes, np.array([*places, UNLABELLED], np.int32)[numbers])


def as_in(listing: Listing, classes: tuple[str, ...], source: str) -> Listing:
    """The listing labelled by another's classes. Raises UserError for a class that those do not know."""
    if not classes:
        raise UserError(f"--classes {source}: packed without labels; give the manifest of a labelled set")
    if not listing.classes:
        raise UserError(f"{listing.root} has no labels to number by {source}; leave --classes out, or give --labels")
    place_of = {name: place for place, name in enumerate(classes)}
    used = np.unique(listing.labels[listing.labels != UNLABELLED])
    places = np.full(len(listing.classes) + 1, UNLABELLED, np.int32)
    for label in used.tolist():
        name = listing.classes[label]
        if name not in place_of:
            raise UserError(
                f"{listing.root}: class {name!r} is none of the {len(classes)} in {source} "
                f"({few(classes)}); give the manifest of the matching train set"
            )
        places[label] = place_of[name]
    return listing.labelled(classes, places[listing.labels])


def from_file(listing: Listing, path: str) -> Listing:
    """Labels from a file: CSV of picture and class, or one class a line in the order of the pictures' names.

    A CSV may be separated by semicolons or tabs. Labels that are all decimal are the classes' places, as in
    `number`.

    Numbers of ILSVRC's ground-truth file become WordNet ids by the development kit's ``meta.mat``: beside the file, or
    give the kit's archive itself. Raises UserError for whatever does not fit.
    """
    if not files.is_url(path) and not os.path.isfile(path):
        what = "a folder" if os.path.isdir(path) else "no such file"
        raise UserError(f"cannot read --labels {path}: {what}; give {_FILE}")
    if not files.is_url(path) and tarfile.is_tarfile(path):
        lines, names = _devkit(path)
    else:
        lines = _text(path).splitlines()
        names = _ilsvrc_names(os.path.join(os.path.dirname(path), _DEVKIT_CLASSES))
    rows = [line for line in lines if line.strip()]
    if not rows:
        raise UserError(f"{path} holds no labels; give {_FILE}")
    separator = next((separator for separator in ",;\t" if separator in rows[0]), None)
    texts = _by_name(listing, rows, separator, path) if separator else _by_order(listing, rows, path)
    if all(text.isdecimal() for text in texts):
        texts = _synsets_of(listing, texts, names, path)
    found: dict[str, int] = {}
    numbers = np.fromiter((found.setdefault(text, len(found)) for text in texts), np.int32, len(listing))
    return number(listing, numbers, list(found), named=False)


def _folder(name: bytes, depth: int) -> bytes | None:
    parts = name.split(b"/", depth + 1)
    return parts[depth] if len(parts) == depth + 2 else None


def _unlabelled(listing: Listing) -> Listing:
    return listing.labelled((), np.full(len(listing), UNLABELLED, np.int32))


def _places(texts: list[str]) -> list[int] | None:
    """The texts as places, or None where one of them is no place."""
    if not all(text.isascii() and text.isdecimal() and len(text) < 8 and text == str(int(text)) for text in texts):
        return None
    places = [int(text) for text in texts]
    return places if max(places, default=0) < _MOST_NUMBERED else None


def _repeated(texts: Sequence[str]) -> str:
    return next(text for text, count in Counter(texts).items() if count > 1)


def _refuse_beyond(listing: Listing, places: list[int], classes: tuple[str, ...]) -> None:
    if max(places, default=-1) >= len(classes):
        raise UserError(f"{listing.root}: label {max(places)}, but only {len(classes)} class names; mend the labels")


def _text(path: str) -> str:
    try:
        return files.read_whole(path).decode("utf-8-sig")  # Excel begins its CSV files with a mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8 ({error}); give {_FILE}") from error


def _by_name(listing: Listing, rows: list[str], separator: str, path: str) -> list[str]:
    """Classes by a table of picture (path, or base name with or without extension) and class."""
    table = _table(rows, separator, path)
    taken: dict[str, str] = {}  # key in the table → picture
    texts, missing = [], []
    for name in map(os.fsdecode, listing.names()):
        base = PurePosixPath(name)
        key = next((key for key in (name, base.name, base.stem) if key in table), None)
        if key is None:
            missing.append(name)
            continue
        if taken.setdefault(key, name) is not name:
            raise UserError(f"{path}: {key!r} is both {taken[key]} and {name}; give their paths in SRC")
        texts.append(table[key])
    if missing:
        raise UserError(
            f"{path} has no line for {missing[0]} ({len(missing)} of {len(listing)} pictures have none), by its path "
            "in SRC or its name with or without extension; add it, or take the picture out of SRC"
        )
    return texts


def _table(rows: list[str], separator: str, path: str) -> dict[str, str]:
    """Picture → class. ILSVRC's table has boxes behind the class, which are passed over."""
    table: dict[str, str] = {}
    try:
        for row in csv.reader(rows, delimiter=separator):
            if len(row) != 2 or not row[1].strip():
                raise UserError(f"{path}: line {separator.join(row)[:80]!r} is not PICTURE{separator}CLASS; mend it")
            picture, label = row[0].strip(), row[1].strip()
            synset = _SYNSET.match(label)
            label = synset[0] if synset else label
            if table.setdefault(picture, label) != label:
                raise UserError(f"{path} gives {picture!r} two classes, {table[picture]!r} and {label!r}; take one out")
    except csv.Error as error:
        raise UserError(f"{path} is no CSV ({error}); give {_FILE}") from error
    return table


def _by_order(listing: Listing, rows: list[str], path: str) -> list[str]:
    """Classes by line, the pictures sorted by base name."""
    names = [PurePosixPath(os.fsdecode(name)).name for name in listing.names()]
    _refuse_table(rows, names, path)
    if len(rows) != len(listing):
        raise UserError(
            f"{path} has {len(rows)} labels for {len(listing)} pictures; give the file that belongs to them"
        )
    if len(set(names)) < len(names):
        raise UserError(f"{listing.root}: two pictures are called {_repeated(names)}; give a CSV of path and class")
    texts = [""] * len(names)
    for row, place in zip(rows, sorted(range(len(names)), key=names.__getitem__), strict=True):
        texts[place] = row.strip()
    return texts


def _refuse_table(rows: list[str], names: list[str], path: str) -> None:
    """Raises UserError where pictures and classes are separated by blanks, which class names may hold as well."""
    known = {*names, *(PurePosixPath(name).stem for name in names)}
    for row in rows:
        first, *others = row.split(maxsplit=1)
        if others and first in known:
            raise UserError(f"{path}: line {row[:80]!r} names a picture; put commas between pictures and classes")


def _devkit(path: str) -> tuple[list[str], dict[int, str] | None]:
    try:
        with tarfile.open(path) as kit:
            members = {PurePosixPath(member.name).name: member for member in kit if member.isfile()}
            if not {_DEVKIT_LABELS, _DEVKIT_CLASSES} <= members.keys():
                raise UserError(
                    f"{path} holds no {_DEVKIT_LABELS} with {_DEVKIT_CLASSES}; give ILSVRC2012_devkit_t12.tar.gz"
                )
            labels, classes = (_member(kit, members[name]) for name in (_DEVKIT_LABELS, _DEVKIT_CLASSES))
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or cut off ({error}); get it anew") from error
    return labels.decode().splitlines(), _synsets(io.BytesIO(classes), path)


def _member(kit: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = kit.extractfile(member)
    return file.read() if file else b""


def _ilsvrc_names(path: str) -> dict[int, str] | None:
    """WordNet ids by ILSVRC number, where the kit's table lies beside the ground truth."""
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        return _synsets(file, path)


def _synsets(file: IO[bytes], path: str) -> dict[int, str]:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f"{path}: reading ILSVRC's table of classes needs scipy; pip install scipy") from None
    try:
        table = loadmat(file, squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table}
    except Exception as error:  # scipy raises nearly anything on a damaged file
        raise UserError(
            f"{path}: no table of ILSVRC classes ({error}); take it from the development kit anew"
        ) from error


def _synsets_of(listing: Listing, numbers: list[str], names: dict[int, str] | None, path: str) -> list[str]:
    """ILSVRC's numbers as WordNet ids; other sets' numbers as they are."""
    if names is None:
        if "ILSVRC2012_val" in listing.name(0):
            raise UserError(
                f"{path} numbers the classes in an order of its own; give ILSVRC2012_devkit_t12.tar.gz, which knows "
                "their WordNet ids, or a CSV of picture and WordNet id"
            )
        return numbers
    for text in numbers:
        if int(text) not in names:
            raise UserError(f"{path}: {text} is no ILSVRC class's number; give the ground truth that came with the kit")
    return [names[int(text)] for text in numbers]
