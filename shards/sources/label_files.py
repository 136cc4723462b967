"""Read labels from a file, for --labels: a CSV, a list in the order of the images, or ILSVRC's development kit."""

import csv
import gzip
import io
import os
import re
import tarfile
import zlib
from pathlib import PurePosixPath
from typing import IO

import numpy as np

from shards.errors import UserError
from shards.sources.labels import find_repeated, number_classes
from shards.sources.listing import Listing
from shards.storage import files

_SYNSET = re.compile(r"n\d{8}(?=\s|$)")
_GIVE_FILE = "Give a CSV file of image and class, or a file with one class per line."
_DEVKIT_LABELS = "ILSVRC2012_validation_ground_truth.txt"
_DEVKIT_CLASSES = "meta.mat"


def label_from_file(listing: Listing, path: str) -> Listing:
    """Label the images by a file: a CSV of image and class, or one class per line in the order of the images' names.

    A CSV may be separated by commas, semicolons or tabs. Labels that are all decimal are numbers of classes, as in
    `number_classes`. Numbers of ILSVRC's ground-truth file become WordNet ids by the development kit's ``meta.mat``: it
    must lie beside the file, or `path` is the kit's archive itself. Raises UserError for whatever does not fit.
    """
    if not files.is_url(path) and not os.path.isfile(path):
        what = "it is a folder" if os.path.isdir(path) else "no such file"
        raise UserError(f"cannot read --labels {path} ({what}). {_GIVE_FILE}")
    if not files.is_url(path) and tarfile.is_tarfile(path):
        lines, names = _read_devkit(path)
    else:
        lines = _read_text(path).splitlines()
        names = _read_synsets_beside(os.path.join(os.path.dirname(path), _DEVKIT_CLASSES))
    rows = [line for line in lines if line.strip()]
    if not rows:
        raise UserError(f"{path} holds no labels. {_GIVE_FILE}")
    separator = next((separator for separator in ",;\t" if separator in rows[0]), None)
    texts = _label_by_name(listing, rows, separator, path) if separator else _label_by_order(listing, rows, path)
    if all(text.isdecimal() for text in texts):
        texts = _convert_to_synsets(listing, texts, names, path)
    found: dict[str, int] = {}
    numbers = np.fromiter((found.setdefault(text, len(found)) for text in texts), np.int32, len(listing))
    return number_classes(listing, numbers, list(found), named=False)


def _read_text(path: str) -> str:
    try:
        return files.read_whole(path).decode("utf-8-sig")  # Excel begins its CSV files with a mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 ({error}). {_GIVE_FILE}") from error


def _label_by_name(listing: Listing, rows: list[str], separator: str, path: str) -> list[str]:
    """Return the class of each image by a table of image (path, or base name with or without extension) and class."""
    table = _parse_table(rows, separator, path)
    taken: dict[str, str] = {}  # key in the table → image
    texts, missing = [], []
    for name in map(os.fsdecode, listing.read_names()):
        base = PurePosixPath(name)
        key = next((key for key in (name, base.name, base.stem) if key in table), None)
        if key is None:
            missing.append(name)
            continue
        if taken.setdefault(key, name) is not name:
            raise UserError(f"{path}: {key!r} may be {taken[key]} or {name}. Give the paths of the images in SRC.")
        texts.append(table[key])
    if missing:
        raise UserError(
            f"{path} has no line for {len(missing)} of {len(listing)} images, such as {missing[0]}. Add a line with "
            "the image's path in SRC or its name, with or without extension, or remove the image from SRC."
        )
    return texts


def _parse_table(rows: list[str], separator: str, path: str) -> dict[str, str]:
    """Return image → class. ILSVRC's table has boxes behind the class, which are skipped."""
    table: dict[str, str] = {}
    try:
        for row in csv.reader(rows, delimiter=separator):
            if len(row) != 2 or not row[1].strip():
                raise UserError(
                    f"{path}: line {separator.join(row)[:80]!r} is not of the form IMAGE{separator}CLASS. Correct it."
                )
            image, label = row[0].strip(), row[1].strip()
            synset = _SYNSET.match(label)
            label = synset[0] if synset else label
            if table.setdefault(image, label) != label:
                raise UserError(
                    f"{path} gives {image!r} two classes, {table[image]!r} and {label!r}. Remove one of the lines."
                )
    except csv.Error as error:
        raise UserError(f"{path} is not a CSV file ({error}). {_GIVE_FILE}") from error
    return table


def _label_by_order(listing: Listing, rows: list[str], path: str) -> list[str]:
    """Return the class of each image by line, where the images are sorted by base name."""
    names = [PurePosixPath(os.fsdecode(name)).name for name in listing.read_names()]
    _refuse_blanks(rows, names, path)
    if len(rows) != len(listing):
        raise UserError(f"{path} has {len(rows)} labels for {len(listing)} images. Give the file that belongs to them.")
    if len(set(names)) < len(names):
        raise UserError(
            f"{listing.root}: two images have the name {find_repeated(names)}. Give a CSV file of path and class."
        )
    texts = [""] * len(names)
    for row, place in zip(rows, sorted(range(len(names)), key=names.__getitem__), strict=True):
        texts[place] = row.strip()
    return texts


def _refuse_blanks(rows: list[str], names: list[str], path: str) -> None:
    """Raise UserError where blanks separate images and classes. They may also be part of a class name."""
    known = {*names, *(PurePosixPath(name).stem for name in names)}
    for row in rows:
        first, *others = row.split(maxsplit=1)
        if others and first in known:
            raise UserError(f"{path}: line {row[:80]!r} begins with an image. Put commas between images and classes.")


def _read_devkit(path: str) -> tuple[list[str], dict[int, str] | None]:
    """Return the lines of the ground truth, and WordNet ids by ILSVRC number, from the kit's archive."""
    try:
        with tarfile.open(path) as kit:
            members = {PurePosixPath(member.name).name: member for member in kit if member.isfile()}
            if not {_DEVKIT_LABELS, _DEVKIT_CLASSES} <= members.keys():
                raise UserError(
                    f"{path} holds no {_DEVKIT_LABELS} with {_DEVKIT_CLASSES}. Give ILSVRC2012_devkit_t12.tar.gz."
                )
            labels, classes = (_read_file(kit, members[name]) for name in (_DEVKIT_LABELS, _DEVKIT_CLASSES))
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or cut off ({error}). Download it again.") from error
    return labels.decode().splitlines(), _read_synsets(io.BytesIO(classes), path)


def _read_file(kit: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = kit.extractfile(member)
    return file.read() if file else b""


def _read_synsets_beside(path: str) -> dict[int, str] | None:
    """Return WordNet ids by ILSVRC number where the kit's table lies beside the ground truth, else None."""
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        return _read_synsets(file, path)


def _read_synsets(file: IO[bytes], path: str) -> dict[int, str]:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(
            f"{path}: reading ILSVRC's table of classes needs scipy. Install it with 'pip install scipy'."
        ) from None
    try:
        table = loadmat(file, squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table}
    except Exception as error:  # scipy raises nearly anything on a damaged file
        raise UserError(
            f"{path} is not a table of ILSVRC classes ({error}). Take it from the development kit again."
        ) from error


def _convert_to_synsets(listing: Listing, numbers: list[str], names: dict[int, str] | None, path: str) -> list[str]:
    """Return ILSVRC's numbers as WordNet ids, and the numbers of other sets as they are."""
    if names is None:
        if "ILSVRC2012_val" in listing.read_name(0):
            raise UserError(
                f"{path} numbers the classes in ILSVRC's own order. Give ILSVRC2012_devkit_t12.tar.gz, which knows "
                "their WordNet ids, or a CSV file of image and WordNet id."
            )
        return numbers
    for text in numbers:
        if int(text) not in names:
            raise UserError(f"{path}: {text} is not the number of an ILSVRC class. Give the kit's own ground truth.")
    return [names[int(text)] for text in numbers]
