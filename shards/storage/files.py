"""Read input by its path or URL: files on this machine, and objects in a store (``s3://BUCKET/KEY``)."""

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
from shards.storage.ranges import RangeFile, read_local_range

_BUFFER = 1 << 16  # bytes of a local file; small, so that skipping stays cheap
_REMOTE_BUFFER = 4 << 20  # bytes; a request takes as long as a few MiB


def is_url(path: str) -> bool:
    """Return whether `path` is the URL of something in a store: ``scheme://…``."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


class Entry(NamedTuple):
    """An object below a URL."""

    path: str
    """POSIX path relative to the URL"""
    size: int
    """bytes"""


def read_whole(path: str) -> bytes:
    """Return all bytes of a file or URL. Raises UserError, as all functions for input do."""
    with _require_file(path):
        if is_url(path):
            return remote.read_object(path)
        with open(path, "rb", buffering=0) as file:
            return file.read()


def read_range(path: str, offset: int, size: int) -> bytes:
    """Return `size` bytes of a file or URL from `offset`, or fewer where it ends."""
    with _require_file(path):
        if is_url(path):
            return remote.read_object_range(path, offset, size)
        return read_local_range(path, offset, size)


def open_input(path: str) -> BinaryIO:
    """Open a file or URL to read, seekable and buffered. An object is fetched in ranges of 4 MiB or more."""
    with _require_file(path):
        return open_buffered(path, remote.get_size(path) if is_url(path) else os.stat(path).st_size)


def open_buffered(path: str, size: int) -> BinaryIO:
    """Open a file or URL of `size` bytes to read. Every read may raise UserError."""
    ranges = RangeFile(path, size, functools.partial(read_range, path))
    return io.BufferedReader(ranges, _REMOTE_BUFFER if is_url(path) else _BUFFER)


def walk_objects(root: str) -> Iterator[Entry]:
    """Yield every object below a URL, folder by folder. Memory is 2 KiB per object of the largest folder."""
    pending = [""]
    while pending:
        prefix = pending.pop()
        with _require_file(root):
            objects, folders = remote.list_folder(f"{root.rstrip('/')}/{prefix}".rstrip("/"))
        pending += [f"{prefix}{name}/" for name in reversed(folders)]
        yield from (Entry(prefix + name, size) for name, size in objects.items())


def find_objects(pattern: str) -> list[str]:
    """Return the URLs that match a URL with `*`, `?` or `[`, sorted, by the rules of ``glob``.

    An object whose name is exactly `pattern` is returned alone.
    """
    with contextlib.suppress(FileNotFoundError):
        remote.get_size(pattern)
        return [pattern]
    scheme, _, rest = pattern.partition("://")
    bucket, *folders, last = rest.split("/")
    places = [f"{scheme}://{bucket}"]
    for folder in folders:
        places = [f"{place}/{name}" for place in places for name in _find_folders(place, folder)]
    found = [f"{place}/{name}" for place in places for name in _filter_names(_list_or_empty(place)[0], last)]
    return sorted(found, key=os.fsencode)


def _find_folders(place: str, pattern: str) -> list[str]:
    return _filter_names(_list_or_empty(place)[1], pattern) if glob.has_magic(pattern) else [pattern]


def _filter_names(names: Iterable[str], pattern: str) -> list[str]:
    """Return the names that match; hidden ones only where the pattern starts with a dot."""
    found = fnmatch.filter(names, pattern)
    return found if pattern.startswith(".") else [name for name in found if not name.startswith(".")]


def _list_or_empty(url: str) -> tuple[dict[str, int], list[str]]:
    with contextlib.suppress(FileNotFoundError):
        return remote.list_folder(url)
    return {}, []


@contextlib.contextmanager
def convert_errors(path: str) -> Iterator[None]:
    """Turn whatever the storage of `path` raises into UserError, except FileNotFoundError."""
    with remote.convert_errors(path) if is_url(path) else _convert_local_errors(path):
        yield


@contextlib.contextmanager
def _convert_local_errors(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        fix = "Make it readable, then run the same command again."
        raise UserError(f"cannot read {path}: {error.strerror}. {fix}") from error


@contextlib.contextmanager
def _require_file(path: str) -> Iterator[None]:
    """Convert errors as `convert_errors` does, and FileNotFoundError as well."""
    try:
        with convert_errors(path):
            yield
    except FileNotFoundError as error:
        if is_url(path):
            raise remote.make_error(path, error) from error
        raise UserError(f"cannot read {path}: no such file. Put it back, then run the same command again.") from error
