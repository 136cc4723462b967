"""The files in a cache's directory: copies of shards with locks on them, and their removal."""

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from shards.storage.ranges import OpenFile

_COPY_NAME = re.compile(r"[0-9a-f]{64}\.(tar|part)")


class FileVersion(NamedTuple):
    """What changes when another file, or other bytes, get the same name."""

    device: int
    """number of the device"""
    inode: int
    """number of the file on the device"""
    mtime: int
    """time of the last change, nanoseconds"""
    size: int
    """bytes"""


class LockedFile(OpenFile):
    """A file that can be locked (flock). The lock ends when the object does."""

    def __init__(self, path: Path, flags: int = 0) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o644)

    def try_lock(self, kind: int) -> bool:
        """Change to a lock of this kind (``fcntl.LOCK_…``).

        Return False, and hold no lock, where another process's lock is in the way.
        """
        try:
            fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def is_at(self, path: Path) -> bool:
        """Return whether `path` is still the name of this file."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._descriptor), os.stat(path))
        return False

    def version(self) -> FileVersion:
        """Return the version of the file as it is now."""
        status = os.fstat(self._descriptor)
        return FileVersion(status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)

    def mark_as_used(self) -> None:
        """Set the time of access to now. The file that was used last is removed last."""
        os.utime(self._descriptor, ns=(time.time_ns(), os.fstat(self._descriptor).st_mtime_ns))

    def resize(self, size: int) -> None:
        """Set the length in bytes, so that the room counts as taken before it is written."""
        os.truncate(self._descriptor, size)

    def write(self, chunk: bytes, offset: int) -> None:
        """Write bytes at an offset."""
        view = memoryview(chunk)
        while view:
            written = os.pwrite(self._descriptor, view, offset)
            view, offset = view[written:], offset + written


class Copy(NamedTuple):
    """A copy of a shard in the directory, complete or not. The one to remove first sorts first."""

    used: int
    """time of the last use, nanoseconds"""
    size: int
    """bytes"""
    path: Path
    """the file"""


def list_copies(directory: Path) -> Iterator[Copy]:
    """Yield the copies in a directory."""
    for entry in os.scandir(directory):
        if _COPY_NAME.fullmatch(entry.name):
            with contextlib.suppress(FileNotFoundError):  # removed just now
                status = entry.stat()
                yield Copy(status.st_atime_ns, status.st_size, Path(entry.path))


def remove_unless_locked(path: Path) -> bool:
    """Remove a copy unless somebody has locked it. Return whether it is gone.

    The caller must have locked the directory.
    """
    try:
        copy = LockedFile(path)
    except FileNotFoundError:
        return True
    if not copy.try_lock(fcntl.LOCK_EX) or not copy.is_at(path):
        return False
    path.unlink()
    return True


def make_room(directory: Path, size: int, limit: int) -> bool:
    """Remove copies that nobody uses, the oldest first, until `size` more bytes are within `limit` bytes.

    Return whether they are. The caller must have locked the directory.
    """
    copies = sorted(list_copies(directory))
    used = sum(copy.size for copy in copies)
    for copy in copies:
        if used + size <= limit:
            break
        if remove_unless_locked(copy.path):
            used -= copy.size
    return used + size <= limit
