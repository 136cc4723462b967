"""A folder of pictures, walked once: names and sizes, sorted by the bytes of their paths, whatever their number."""

import heapq
import itertools
import os
import pickle
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import IO

from shards.errors import UserError
from shards.storage import files

Entry = tuple[bytes, int]  # relative path, bytes
_RUN = 250_000  # entries that are sorted in memory
_BLOCK = 1_000
_MEND = "make it readable or take it out of SRC, then run the same command again"


class Tree:
    """Files below a folder or URL that are `wanted` by their names, links followed, nothing that starts with a dot.

    Raises UserError, while it is walked, for what cannot be looked at and for links in circles.
    """

    def __init__(self, root: str, wanted: Callable[[str], bool]) -> None:
        self.root = root
        self.folders: list[str] = []  # names directly below the root; known when the walk is over, as is
        self.ignored = 0  # how many were hidden or not wanted
        self._wanted = wanted

    def files(self) -> Iterator[Entry]:
        """The files in any order."""
        return self._objects() if files.is_url(self.root) else self._walk()

    def _objects(self) -> Iterator[Entry]:
        folders = set()
        for name, size in files.walk(self.root):
            parts = name.split("/")
            if any(part.startswith(".") for part in parts):
                self.ignored += 1
                continue
            if len(parts) > 1:
                folders.add(parts[0])
            if self._wanted(name):
                yield os.fsencode(name), size
            else:
                self.ignored += 1
        self.folders = list(folders)

    def _walk(self) -> Iterator[Entry]:
        pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", (_identity(self.root),))]
        while pending:
            prefix, above = pending.pop()
            for entry in _entries(os.path.join(self.root, prefix[:-1]) if prefix else self.root):
                path = prefix + entry.name
                if entry.name.startswith((".", "__MACOSX")):
                    self.ignored += 1
                elif _is_folder(entry):
                    pending.append((path + "/", (*above, _below(entry, above))))
                    if not prefix:
                        self.folders.append(entry.name)
                elif self._wanted(entry.name) and (size := _size(entry)) is not None:
                    yield os.fsencode(path), size
                else:
                    if entry.is_symlink():
                        _size(entry)  # a link that leads nowhere may have led to a class folder
                    self.ignored += 1


def in_order(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Sorted by name; runs of them lie in temporary files, so that memory does not grow with their number."""
    entries = iter(entries)
    run = sorted(itertools.islice(entries, _RUN))
    if len(run) < _RUN:
        return iter(run)
    runs = [_stored(run)]
    while run := sorted(itertools.islice(entries, _RUN)):
        runs.append(_stored(run))
    return heapq.merge(*map(_loaded, runs))


def _stored(run: list[Entry]) -> IO[bytes]:
    file = tempfile.TemporaryFile(buffering=1 << 20)  # noqa: SIM115  `_loaded` closes it
    for first in range(0, len(run), _BLOCK):
        pickle.dump(run[first : first + _BLOCK], file)
    file.seek(0)
    return file


def _loaded(file: IO[bytes]) -> Iterator[Entry]:
    with file:
        while True:
            try:
                yield from pickle.load(file)
            except EOFError:
                return


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}; {_MEND}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link to itself, say
        raise UserError(f"cannot read {entry.path}: {error.strerror}; {_MEND}") from error


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


def _size(entry: os.DirEntry[str]) -> int | None:
    """Bytes of a regular file, or of what a link leads to; None for anything else."""
    try:
        status = entry.stat()
    except OSError as error:
        raise UserError(f"cannot read {entry.path}: {error.strerror}; {_MEND}") from error
    return status.st_size if stat.S_ISREG(status.st_mode) else None
