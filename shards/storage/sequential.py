"""A shard read from end to end."""

import hashlib
from typing import BinaryIO

_CHUNK = 1 << 20


class SequentialReader:
    """Reads and skips ahead; every byte on the way is hashed once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.position = 0

    def take(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end of the file."""
        data = self._file.read(size)
        self.digest.update(data)
        self.position += len(data)
        return data

    def skip_to(self, position: int) -> bool:
        """Go on to `position`, or to the end of the file; whether nothing but zeros was on the way."""
        blank = True
        while self.position < position and (data := self.take(min(_CHUNK, position - self.position))):
            blank = blank and not any(data)
        return blank
