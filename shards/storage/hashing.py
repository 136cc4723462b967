"""The sha256 of files: of a whole file at once, or on the way through a file that is read anyway."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_CHUNK = 1 << 20  # bytes


def hash_file(path: Path, tick: Callable[[], None] = lambda: None) -> str:
    """Return the sha256 of a local file, hexadecimal. `tick` is called after every MiB. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            tick()
    return digest.hexdigest()


class HashingReader:
    """Reads a file from its start to its end, and hashes every byte once, also those that it skips."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.position = 0  # bytes

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, or fewer at the end of the file."""
        data = self._file.read(size)
        self.digest.update(data)
        self.position += len(data)
        return data

    def skip_to(self, position: int) -> bool:
        """Go on to `position`, or to the end of the file. Return whether all bytes on the way were zero."""
        only_zeros = True
        while self.position < position and (data := self.read(min(_CHUNK, position - self.position))):
            only_zeros = only_zeros and not any(data)
        return only_zeros
