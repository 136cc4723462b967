"""List the files in a folder of images: names and sizes, sorted by the bytes of their paths, however many there are."""

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
_BLOCK = 1_000  # entries that are pickled together
_FIX = "Make it readable or take it out of SRC, then run the same command again."


class FolderWalk:
    """The files below a folder or URL whose names are `wanted`. Links are followed, and hidden names are skipped.

    Raises UserError, during the walk, for what cannot be read.
    """

    def __init__(self, root: str, wanted: Callable[[str], bool]) -> None:
        self.root = root
        self.folders: list[str] = []  # names directly below the root; known after the walk, as is `ignored`
        self.ignored = 0  # number of files that were hidden or not wanted
        self.broken_links: list[tuple[str, str]] = []  # relative path and reason; any may have led to a class folder
        self._wanted = wanted

    def files(self) -> Iterator[Entry]:
        """Yield the files in any order."""
        return self._walk_objects() if files.is_url(self.root) else self._walk_local()

    def _walk_objects(self) -> Iterator[Entry]:
        folders = set()
        for name, size in files.walk_objects(self.root):
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

    def _walk_local(self) -> Iterator[Entry]:
        pending: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", (_identify(self.root),))]
        while pending:
            prefix, above = pending.pop()
            for entry in _list_entries(os.path.join(self.root, prefix[:-1]) if prefix else self.root):
                path = prefix + entry.name
                if entry.name.startswith((".", "__MACOSX")):
                    self.ignored += 1
                elif entry.is_symlink() and (reason := _find_link_problem(entry, above)):
                    self.broken_links.append((path, reason))
                elif _is_folder(entry):
                    pending.append((path + "/", (*above, _identify(entry.path))))
                    if not prefix:
                        self.folders.append(entry.name)
                elif self._wanted(entry.name) and (size := _get_size(entry)) is not None:
                    yield os.fsencode(path), size
                else:
                    self.ignored += 1


def sort_entries(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Yield entries sorted by name. Sorted runs lie in temporary files, so that memory does not grow."""
    entries = iter(entries)
    run = sorted(itertools.islice(entries, _RUN))
    if len(run) < _RUN:
        return iter(run)
    runs = [_store_run(run)]
    while run := sorted(itertools.islice(entries, _RUN)):
        runs.append(_store_run(run))
    return heapq.merge(*map(_load_run, runs))


def _store_run(run: list[Entry]) -> IO[bytes]:
    file = tempfile.TemporaryFile(buffering=1 << 20)  # noqa: SIM115  `_load_run` closes it
    for first in range(0, len(run), _BLOCK):
        pickle.dump(run[first : first + _BLOCK], file)
    file.seek(0)
    return file


def _load_run(file: IO[bytes]) -> Iterator[Entry]:
    with file:
        while True:
            try:
                yield from pickle.load(file)
            except EOFError:
                return


def _list_entries(folder: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}. {_FIX}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        raise UserError(f"cannot read {entry.path}: {error.strerror}. {_FIX}") from error


def _find_link_problem(entry: os.DirEntry[str], above: tuple[tuple[int, int], ...]) -> str | None:
    """Return why a link cannot be followed, or None. `above` are the identities of the folders that it lies in."""
    try:
        status = entry.stat()
    except OSError as error:
        return f"link to {os.readlink(entry.path)!r}: {error.strerror}"
    if (status.st_dev, status.st_ino) in above:
        return f"link to {os.readlink(entry.path)!r}, a folder that it lies in"
    return None


def _identify(folder: str) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}. {_FIX}") from error
    return status.st_dev, status.st_ino


def _get_size(entry: os.DirEntry[str]) -> int | None:
    """Return the bytes of a regular file or of what a link leads to, or None for anything else."""
    try:
        status = entry.stat()
    except OSError as error:
        raise UserError(f"cannot read {entry.path}: {error.strerror}. {_FIX}") from error
    return status.st_size if stat.S_ISREG(status.st_mode) else None
