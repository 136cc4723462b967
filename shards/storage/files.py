"""Where bytes come from: files of this machine, and objects of a store by their URLs (``s3://BUCKET/KEY``)."""

import contextlib
import fnmatch
import functools
import glob
import io
import os
import re
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

from shards.errors import UserError
from shards.storage import remote
from shards.storage.ranges import Ranges, pread

_BUFFER = 1 << 16  # bytes; of a local file, so that leaps over it stay cheap
_REMOTE_BUFFER = 4 << 20  # a request takes as long as a few MiB


def is_url(path: str) -> bool:
    """Whether `path` names a place in a store: ``scheme://…``."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


class Entry(NamedTuple):
    """An object below a URL: its POSIX path relative to that, its size in bytes."""

    path: str
    size: int


def read_whole(path: str) -> bytes:
    """All bytes of a file or URL. Raises UserError, as do all functions for input."""
    with _needed(path):
        if is_url(path):
            return remote.fetch(path)
        with open(path, "rb", buffering=0) as file:
            return file.read()


def read_range(path: str, offset: int, size: int) -> bytes:
    """`size` bytes of a file or URL from `offset`, fewer where it ends."""
    with _needed(path):
        if is_url(path):
            return remote.fetch_range(path, offset, size)
        return pread(path, offset, size)


def open_input(path: str) -> BinaryIO:
    """A file or URL to read from, seekable and buffered; an object is fetched by ranges of 4 MiB or more."""
    with _needed(path):
        return buffered(path, remote.size(path) if is_url(path) else os.stat(path).st_size)


def walk(root: str) -> Iterator[Entry]:
    """Every object below a URL, folder by folder; memory grows with the largest alone, 2 KiB an object in it."""
    pending = [""]
    while pending:
        prefix = pending.pop()
        with _needed(root):
            objects, folders = remote.listing(f"{root.rstrip('/')}/{prefix}".rstrip("/"))
        pending += [f"{prefix}{name}/" for name in reversed(folders)]
        yield from (Entry(prefix + name, size) for name, size in objects.items())


def matching(pattern: str) -> list[str]:
    """The objects that a URL with `*`, `?` or `[` names, sorted, as ``glob`` does it for files.

    One of this very name is meant by it.
    """
    with contextlib.suppress(FileNotFoundError):
        remote.size(pattern)
        return [pattern]
    scheme, _, rest = pattern.partition("://")
    bucket, *folders, last = rest.split("/")
    places = [f"{scheme}://{bucket}"]
    for folder in folders:
        places = [f"{place}/{name}" for place in places for name in _matching_folders(place, folder)]
    found = [f"{place}/{name}" for place in places for name in _fitting(_listing(place)[0], last)]
    return sorted(found, key=os.fsencode)


def _matching_folders(place: str, pattern: str) -> list[str]:
    return _fitting(_listing(place)[1], pattern) if glob.has_magic(pattern) else [pattern]


def _fitting(names: Iterable[str], pattern: str) -> list[str]:
    """Those that match; hidden ones only where the pattern starts with a dot."""
    found = fnmatch.filter(names, pattern)
    return found if pattern.startswith(".") else [name for name in found if not name.startswith(".")]


def _listing(url: str) -> tuple[dict[str, int], list[str]]:
    with contextlib.suppress(FileNotFoundError):
        return remote.listing(url)
    return {}, []


@contextlib.contextmanager
def found(path: str) -> Iterator[None]:
    """UserError for whatever the storage of `path` answers, except FileNotFoundError."""
    with remote.answers(path) if is_url(path) else _local_answers(path):
        yield


@contextlib.contextmanager
def _local_answers(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        mend = "make it readable, then run the same command again"
        raise UserError(f"cannot read {path}: {error.strerror}; {mend}") from error


@contextlib.contextmanager
def _needed(path: str) -> Iterator[None]:
    """UserError for a missing file too."""
    try:
        with found(path):
            yield
    except FileNotFoundError as error:
        if is_url(path):
            raise remote.failure(path, error) from error
        raise UserError(f"cannot read {path}: no such file; put it back, then run the same command again") from error


def buffered(path: str, size: int) -> BinaryIO:
    """A file or URL of `size` bytes to read from. Every read may raise UserError."""
    ranges = Ranges(path, size, functools.partial(read_range, path))
    return io.BufferedReader(ranges, _REMOTE_BUFFER if is_url(path) else _BUFFER)
