"""The kernel's page cache as a cache of local shards: each is read once from end to end before its samples are."""

import os
from collections.abc import Sequence
from pathlib import Path

from shards.cache.interface import Outcome, explain_slow_storage
from shards.errors import UserError
from shards.manifest import Shard

_CHUNK = 8 << 20  # bytes per read


class PageCache:
    """A `shards.cache.interface.Cache` of the shards of a local folder.

    Where `world` processes of a machine read the same shards, each `rank` of them reads ahead its part alone.
    """

    def __init__(self, folder: str | os.PathLike[str], shards: Sequence[Shard], rank: int = 0, world: int = 1) -> None:
        self._folder, self._shards, self._rank, self._world = Path(folder), shards, rank, world

    def acquire(self, number: int) -> Outcome:
        """Read a shard if it is this rank's. Raises UserError where it cannot be read."""
        if number % self._world == self._rank:
            read_ahead(self._folder / self._shards[number].file)
        return Outcome.HELD

    def release(self, number: int) -> None:
        """Do nothing: the kernel decides what to drop."""

    def require_room(self, count: int) -> None:
        """Do nothing: the kernel makes room, and what it drops can be read again."""

    def explain_delay(self, number: int, outcome: Outcome, seconds: float) -> str:
        return explain_slow_storage(f"{self._folder}/{self._shards[number].file}", seconds)


def read_ahead(path: Path) -> None:
    """Read a file from end to end, so that the kernel keeps it in memory. Raises UserError."""
    buffer = bytearray(_CHUNK)
    try:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. Check the storage, then run the same command again.") from error
