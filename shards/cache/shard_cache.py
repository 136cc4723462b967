"""Verified copies of shards in a local directory of bounded size, for remote or slow storage.

All processes of a machine may share one directory. A copy is named by its sha256. Whoever reads it holds a shared lock
(flock) on it, which ends with the process at the latest. A copy that nobody holds stays while there is room, for
another rank or the next epoch. It is verified again before it is used, because the machine may have crashed after it
was written. Room is made by removing the oldest copies first, under one lock for the directory.
"""

import contextlib
import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from shards.cache.copies import FileVersion, LockedFile, make_room, remove_unless_locked
from shards.cache.interface import Outcome, explain_slow_storage
from shards.errors import UserError
from shards.manifest import Shard
from shards.storage.folders import Folder
from shards.storage.hashing import hash_file

CACHE_BYTES = 64 << 30  # the default limit

_CHUNK = 8 << 20  # bytes per read
_TIMEOUT = 600.0  # seconds to wait for another process
_POLL = 0.05  # seconds between two attempts while another process is busy
_PAUSE = 1.0  # seconds before a failed download is retried
_FIX = "Make it writable or free some space there, lower --data.cache_bytes, or name another folder with --data.cache."


class ShardCache:
    """A `shards.cache.interface.Cache` of the shards of `folder`: copies in `directory`, at most `limit` bytes.

    The directory is made where there is none. `read` serves any shard, and fetches what is not there. Safe in threads.
    A pickle is a cache over the same directory that holds nothing yet. Raises UserError for a directory that cannot be
    written, and for a limit below the largest shard.
    """

    def __init__(
        self, folder: Folder, shards: Sequence[Shard], directory: str | os.PathLike[str], limit: int = CACHE_BYTES
    ) -> None:
        self.directory = Path(directory)
        self.limit = limit
        self._folder, self._shards = folder, shards
        self._held: dict[int, LockedFile] = {}
        self._verified: dict[str, FileVersion] = {}  # by sha256: the copies that this process has verified
        self._changing_held = threading.Lock()
        with self._convert_errors():
            self.directory.mkdir(parents=True, exist_ok=True)
        with self.lock_directory():
            pass
        self.require_room(1)

    def __reduce__(self) -> tuple[type["ShardCache"], tuple[Folder, Sequence[Shard], Path, int]]:
        return type(self), (self._folder, self._shards, self.directory, self.limit)

    def require_room(self, count: int) -> None:
        """Raise UserError unless any `count` shards fit within the limit."""
        needed = sum(sorted((shard.bytes for shard in self._shards), reverse=True)[:count])
        if needed > self.limit:
            raise UserError(
                f"{self.directory}: {min(count, len(self._shards))} shards must fit at once, which takes up to "
                f"{needed} bytes, more than --data.cache_bytes {self.limit}. Raise it, or lower --data.shuffle_window."
            )

    def acquire(self, number: int) -> Outcome:
        """Try to get a verified copy of a shard and hold it. Does not wait for other processes.

        Raises UserError where the storage does not answer, the disk is full, or the shard is not what the manifest
        says, twice.
        """
        if number in self._held:
            return Outcome.HELD
        copy = self._try_open(number)
        if isinstance(copy, Outcome):
            return copy
        with self._changing_held:
            self._held.setdefault(number, copy)
        return Outcome.HELD

    def fetch(self, number: int, timeout: float = _TIMEOUT) -> None:
        """Acquire a shard, and wait up to `timeout` seconds for other processes. Raises UserError after that."""
        self._wait(number, lambda: self.acquire(number), timeout)

    def release(self, number: int) -> None:
        """Let go of a shard. Its copy stays until its room is needed."""
        with self._changing_held:
            copy = self._held.pop(number, None)
        if copy is not None:
            with contextlib.suppress(OSError):  # then it counts as older than it is
                copy.mark_as_used()

    def close(self) -> None:
        """Let go of all shards."""
        for number in list(self._held):
            self.release(number)

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Return `size` bytes of a shard from `offset`, or fewer where it ends.

        A shard that is not held is fetched for this read alone. Raises UserError as `fetch` does, and where the disk
        does not answer.
        """
        copy = self._held.get(number) or self._open(number)
        with self._convert_errors():
            return copy.read(offset, size)

    def explain_delay(self, number: int, outcome: Outcome, seconds: float) -> str:
        name = f"{self._folder}/{self._shards[number].file}"
        if outcome is Outcome.FULL:
            return (
                f"{name}: no room in {self.directory} for {seconds:.0f} s, where other shards are in use. Raise "
                f"--data.cache_bytes ({self.limit}), or lower --data.shuffle_window."
            )
        return explain_slow_storage(name, seconds)

    @contextlib.contextmanager
    def lock_directory(self) -> Iterator[None]:
        """Lock the directory while the block looks through it. Raises UserError where that takes too long."""
        path = self.directory / ".lock"
        with self._convert_errors():
            lock = LockedFile(path, os.O_CREAT)
            deadline = time.monotonic() + _TIMEOUT
            while not lock.try_lock(fcntl.LOCK_EX):
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{path}: locked by another process for {_TIMEOUT:.0f} s. End it, or name another folder "
                        "with --data.cache."
                    )
                time.sleep(_POLL / 10)
            try:
                yield
            finally:
                lock.try_lock(fcntl.LOCK_UN)  # now: an exception that is kept would keep the lock's frame, too

    # Getting a copy

    def _open(self, number: int) -> LockedFile:
        """Return a verified copy. Waits for other processes."""
        opened: list[LockedFile] = []

        def attempt() -> Outcome:
            copy = self._try_open(number)
            if isinstance(copy, Outcome):
                return copy
            opened.append(copy)
            return Outcome.HELD

        self._wait(number, attempt, _TIMEOUT)
        return opened[0]

    def _wait(self, number: int, attempt: Callable[[], Outcome], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while (outcome := attempt()) is not Outcome.HELD:
            if time.monotonic() > deadline:
                raise UserError(self.explain_delay(number, outcome, timeout))
            time.sleep(_POLL)

    def _try_open(self, number: int) -> LockedFile | Outcome:
        """Return a verified copy with a shared lock on it, or why there is none yet."""
        shard = self._shards[number]
        with self._convert_errors():
            present = self._open_present(shard)
            if present is not None:
                return present
            new = self._reserve(shard)
        return new if isinstance(new, Outcome) else self._fill(new, shard)

    def _open_present(self, shard: Shard) -> LockedFile | Outcome | None:
        """Return the copy that is there. Return None where there is none; a damaged one is removed."""
        path = self._path(shard, "tar")
        try:
            copy = LockedFile(path)
        except FileNotFoundError:
            return None
        if copy.version() != self._verified.get(shard.sha256) and copy.try_lock(fcntl.LOCK_EX):  # so nobody holds it
            if not copy.is_at(path):
                return Outcome.BUSY
            if copy.version().size != shard.bytes or hash_file(path) != shard.sha256:
                path.unlink()
                return None
        # Others hold only what they have verified. A file that was removed between two locks is looked for again.
        if not copy.try_lock(fcntl.LOCK_SH) or not copy.is_at(path):
            return Outcome.BUSY
        self._verified[shard.sha256] = copy.version()
        return copy

    def _reserve(self, shard: Shard) -> LockedFile | Outcome:
        """Return a locked empty file that takes up the shard's room, or BUSY where another process has one."""
        part = self._path(shard, "part")
        with self.lock_directory():
            if self._path(shard, "tar").exists() or not remove_unless_locked(part):
                return Outcome.BUSY
            if not make_room(self.directory, shard.bytes, self.limit):
                return Outcome.FULL
            copy = LockedFile(part, os.O_CREAT | os.O_EXCL)
            copy.try_lock(fcntl.LOCK_EX)
            copy.resize(shard.bytes)
            return copy

    def _fill(self, copy: LockedFile, shard: Shard) -> LockedFile | Outcome:
        """Download a shard into its file, and give the file its final name once the bytes are right."""
        part, path = self._path(shard, "part"), self._path(shard, "tar")
        try:
            self._download_with_retry(copy, shard)
            with self.lock_directory():  # nobody looks through the directory meanwhile and counts neither name
                os.rename(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        self._verified[shard.sha256] = copy.version()
        # The kind of lock does not change in one step: another process may lock the file in between.
        return copy if copy.try_lock(fcntl.LOCK_SH) and copy.is_at(path) else Outcome.BUSY

    def _download_with_retry(self, copy: LockedFile, shard: Shard) -> None:
        """Download a shard, and once more where the network or the bytes fail."""
        try:
            self._download(copy, shard)
        except _DirectoryError:
            raise
        except UserError:
            time.sleep(_PAUSE)
            self._download(copy, shard)

    def _download(self, copy: LockedFile, shard: Shard) -> None:
        url = f"{self._folder}/{shard.file}"
        digest, length = hashlib.sha256(), 0
        try:
            with self._folder.open(shard.file) as file:
                # Asking for one byte more than there should be shows whether there are more.
                while chunk := file.read(min(_CHUNK, shard.bytes + 1 - length)):
                    digest.update(chunk)
                    with self._convert_errors():
                        copy.write(chunk[: shard.bytes - length], length)
                    length += len(chunk)
        except FileNotFoundError:
            raise UserError(f"{url}: no such file. Put it back, then run the same command again.") from None
        if length != shard.bytes or digest.hexdigest() != shard.sha256:
            raise UserError(
                f"{url}: twice not the bytes that the manifest describes. Run 'make-shards check {self._folder}', then "
                "put back or pack again the files that it names."
            )

    def _path(self, shard: Shard, extension: str) -> Path:
        return self.directory / f"{shard.sha256}.{extension}"

    @contextlib.contextmanager
    def _convert_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _DirectoryError(f"cannot use {self.directory}: {error.strerror or error}. {_FIX}") from error


class _DirectoryError(UserError):
    """The cache's own directory fails, not the storage."""
