"""Where pictures come from: a folder listed once, sorted, with labels where its subfolders are classes.

A kind of source is a function that returns a `Listing`, and a branch of `read` that fetches one source's bytes.
"""

import os
import stat
from dataclasses import dataclass
from typing import NamedTuple

from shards.errors import UserError
from shards.layout import UNLABELLED

# Pictures of the last four are looked at as well, to be left out by name and reason: shards hold JPEG, PNG and WebP.
CANDIDATES = frozenset((".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
FORMATS = ("auto", "folders", "flat")


class Source(NamedTuple):
    """One picture: its POSIX path relative to the root, its size in bytes, its label (-1: unlabelled)."""

    path: str
    size: int
    label: int


@dataclass(frozen=True)
class Listing:
    """All sources below `root`, sorted by the bytes of their paths."""

    root: str
    format: str  # "folders" or "flat"
    sources: list[Source]
    classes: tuple[str, ...]  # empty where unlabelled
    ignored: int  # files that are no pictures by their names, and everything whose name starts with a dot


class _Found(NamedTuple):
    files: list[tuple[str, int]]  # relative path, bytes
    folders: list[str]  # names directly below the root
    ignored: int


def scan(root: str | os.PathLike[str], format: str = "auto") -> Listing:
    """List a folder. Pictures in subfolders only: each folder directly below the root is a class, in sorted order.

    `format` "folders" insists on that, "flat" takes all pictures at any depth without labels, "auto" looks.
    Raises UserError for a missing or unreadable folder, one without pictures, and pictures beside class folders.
    """
    root = os.fspath(root)
    if not os.path.isdir(root):
        what = "not a folder" if os.path.exists(root) else "no such folder"
        raise UserError(f"{root}: {what}; give the folder that holds the pictures as SRC")
    found = _walk(root)
    if not found.files:
        raise UserError(f"{root}: no pictures (JPEG, PNG or WebP files) in it; give the folder that holds them as SRC")
    files = sorted(found.files, key=lambda file: os.fsencode(file[0]))
    if _format_of(root, files, format) == "flat":
        return Listing(root, "flat", [Source(path, size, UNLABELLED) for path, size in files], (), found.ignored)
    classes = tuple(sorted(found.folders, key=os.fsencode))
    label = {name: place for place, name in enumerate(classes)}
    sources = [Source(path, size, label[path.split("/", 1)[0]]) for path, size in files]
    return Listing(root, "folders", sources, classes, found.ignored)


def read(root: str, source: Source) -> bytes:
    """The bytes of one source. Raises UserError where the file is unreadable or has another size than when listed."""
    path = os.path.join(root, source.path)
    try:
        with open(path, "rb", buffering=0) as file:
            data = file.read()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {_MEND}") from error
    if len(data) != source.size:
        raise UserError(f"{path} changed while it was being packed; leave SRC alone and run the same command again")
    return data


_MEND = "make it readable or take it out of SRC, then run the same command again"


def _format_of(root: str, files: list[tuple[str, int]], format: str) -> str:
    """ "folders" or "flat", by where the pictures lie."""
    if format == "flat":
        return "flat"
    top = [path for path, _ in files if "/" not in path]
    if not top:
        return "folders"
    if format == "folders":
        raise UserError(f"{root}: {top[0]} lies in no class folder; move it into one, or use --format flat")
    if len(top) < len(files):
        raise UserError(
            f"{root}: pictures ({top[0]}, …) beside folders of pictures; use --format flat to pack all of them "
            "without labels, or move those into class folders"
        )
    return "flat"


def _walk(root: str) -> _Found:
    """All candidates below `root`, links followed. Raises UserError for what cannot be looked at."""
    files: list[tuple[str, int]] = []
    folders: list[str] = []
    ignored = 0
    pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", (_identity(root),))]
    while pending:
        prefix, above = pending.pop()
        for entry in _entries(os.path.join(root, prefix[:-1]) if prefix else root):
            path = prefix + entry.name
            if entry.name.startswith("."):
                ignored += 1
            elif entry.is_dir():
                pending.append((path + "/", (*above, _below(entry, above))))
                if not prefix:
                    folders.append(entry.name)
            elif (size := _candidate_size(entry)) is not None:
                files.append((path, size))
            else:
                ignored += 1
    return _Found(files, folders, ignored)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}; {_MEND}") from error


def _below(entry: os.DirEntry[str], above: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The identity of a folder, which must not be one of those that it lies in."""
    identity = _identity(entry.path)
    if identity in above:
        raise UserError(f"{entry.path} links to a folder that it lies in; take the link out of SRC")
    return identity


def _identity(folder: str) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}; {_MEND}") from error
    return status.st_dev, status.st_ino


def _candidate_size(entry: os.DirEntry[str]) -> int | None:
    """Bytes of a file that is a picture by its name; None for anything else."""
    if os.path.splitext(entry.name)[1].lower() not in CANDIDATES:
        return None
    try:
        status = entry.stat()
    except OSError as error:
        raise UserError(f"cannot read {entry.path}: {error.strerror}; {_MEND}") from error
    return status.st_size if stat.S_ISREG(status.st_mode) else None
