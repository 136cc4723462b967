"""Read byte ranges: of local files, and of anything else behind a file object."""

import functools
import io
import os
import resource
from collections.abc import Callable
from typing import Any

_OPEN_FILES = 64  # at most, at once
_CHUNK = 8 << 20  # bytes per read, where all that is left is asked for


def count_files_to_keep_open(most: int) -> int:
    """Return how many files a cache may keep open: `most`, or a quarter of what this process may open.

    A run may read three sets of shards: those that it trains on, and the two of its k-NN score.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most if limit == resource.RLIM_INFINITY else max(1, min(most, limit // 4))


class OpenFile:
    """A local file to read from. It is closed when nobody uses the object any more. Safe in threads.

    `version` distinguishes files that had the same name at different times, for caches. Raises OSError, as `read` does.
    """

    def __init__(self, path: str, *version: int) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`, or fewer where the file ends."""
        return os.pread(self._descriptor, size, offset)


_open_cached = functools.lru_cache(count_files_to_keep_open(_OPEN_FILES))(OpenFile)


def read_local_range(path: str, offset: int, size: int) -> bytes:
    """Return `size` bytes of a local file from `offset`, or fewer where it ends. Raises OSError.

    The file is kept open for the next read.
    """
    status = os.stat(path)  # a new file of the same name is opened again
    return _open_cached(path, status.st_dev, status.st_ino).read(offset, size)


class RangeFile(io.RawIOBase):
    """A file object of `size` bytes over a function ``read(offset, size)``."""

    def __init__(self, name: str, size: int, read: Callable[[int, int], bytes]) -> None:
        self.name = name
        self._size = size
        self._read_range = read
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence] + offset
        if position < 0:
            raise ValueError(f"{self.name}: seek to {position}")
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        data = self._read_next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self._read_next(_CHUNK), b""))

    def _read_next(self, size: int) -> bytes:
        data = self._read_range(self._position, max(0, min(size, self._size - self._position)))
        self._position += len(data)
        return data
