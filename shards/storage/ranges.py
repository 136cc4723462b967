"""Reading by ranges: local files by number of byte, and file objects over whatever is read so."""

import functools
import io
import os
from collections.abc import Callable
from typing import Any

_OPEN_FILES = 64
_CHUNK = 8 << 20  # bytes a read, where all that is left is asked for


class OpenFile:
    """A local file to read from, closed when nobody has a use for it any more. Safe in threads.

    `version`: what tells it from others of that name, for caches. Raises OSError, as `read` does.
    """

    def __init__(self, path: str, *version: int) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, fewer where the file ends."""
        return os.pread(self._descriptor, size, offset)


_opened = functools.lru_cache(_OPEN_FILES)(OpenFile)


def pread(path: str, offset: int, size: int) -> bytes:
    """`size` bytes of a local file from `offset`, fewer where it ends. It is kept open. Raises OSError."""
    status = os.stat(path)  # another file of that name is opened anew
    return _opened(path, status.st_dev, status.st_ino).read(offset, size)


class Ranges(io.RawIOBase):
    """`size` bytes that ``read(offset, size)`` delivers piece by piece, as a file."""

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
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self._next(_CHUNK), b""))

    def _next(self, size: int) -> bytes:
        data = self._read_range(self._position, max(0, min(size, self._size - self._position)))
        self._position += len(data)
        return data
