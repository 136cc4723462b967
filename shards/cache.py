"""Whole shards at hand: a bounded folder of verified copies for remote or slow storage, and the page cache for disks.

All processes of a machine may share one folder of copies. A copy is called by its sha256, and whoever reads it holds a
shared lock (flock) on it, which ends with the process at the latest. A copy that nobody holds stays while there is
room, for another rank or the next epoch, and is verified again before it is used, because whoever wrote it may have
ended with the machine. Room is made, oldest copies first, under one lock for the folder.
"""

import contextlib
import enum
import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from shards.errors import UserError
from shards.layout import Shard, file_sha256
from shards.storage.output import Folder
from shards.storage.ranges import OpenFile

CACHE_BYTES = 64 << 30  # unless another limit is asked for

_CHUNK = 8 << 20  # bytes a read
_PATIENCE = 600.0  # seconds to wait for another process
_POLL = 0.05  # seconds between looks at what other processes do
_PAUSE = 1.0  # seconds before what failed is tried again
_OURS = re.compile(r"[0-9a-f]{64}\.(tar|part)")
_MEND = "make it writable or free some space there, lower --data.cache_bytes, or name another folder with --data.cache"


class Outcome(enum.Enum):
    """What came of an attempt to have a shard at hand."""

    HELD = "held"
    BUSY = "busy"  # another process, or thread, is fetching or verifying it
    FULL = "full"  # there is no room until something is released


class Shelf(Protocol):
    """Where shards are put at hand before they are read. Safe in threads."""

    def take(self, number: int) -> Outcome:
        """Put a shard at hand and keep it there until it is released; does not wait for other processes."""

    def release(self, number: int) -> None:
        """Have no further use for a shard, if it was taken."""

    def require(self, count: int) -> None:
        """Raises UserError unless any `count` shards can be at hand at once."""

    def late(self, number: int, outcome: Outcome, seconds: float) -> str:
        """Why a shard is not at hand after so long, and what to do, in one line."""


class PageCache:
    """The shards of a local folder, read once from end to end so that the kernel has them in memory.

    Where `world` processes of a machine read the same shards, each `rank` of them warms its part alone.
    """

    def __init__(self, folder: str | os.PathLike[str], shards: Sequence[Shard], rank: int = 0, world: int = 1) -> None:
        self._folder, self._shards, self._rank, self._world = Path(folder), shards, rank, world

    def take(self, number: int) -> Outcome:
        """Raises UserError where the shard cannot be read."""
        if number % self._world == self._rank:
            readahead(self._folder / self._shards[number].file)
        return Outcome.HELD

    def release(self, number: int) -> None:
        """The kernel knows best what to forget."""

    def require(self, count: int) -> None:
        """The kernel makes room, and what it forgets can be read again."""

    def late(self, number: int, outcome: Outcome, seconds: float) -> str:
        return _too_slow(f"{self._folder}/{self._shards[number].file}", seconds)


def readahead(path: Path) -> None:
    """Read a file from end to end. Raises UserError."""
    buffer = bytearray(_CHUNK)
    try:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; see to the storage, then run the same command again") from error


class _Version(NamedTuple):
    """What changes when another file, or other bytes, come to lie under a name."""

    device: int
    inode: int
    mtime: int  # nanoseconds
    size: int  # bytes


class _Copy(OpenFile):
    """A cached shard with a lock on it, for as long as this lives."""

    def __init__(self, path: Path, flags: int = 0) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o644)

    def locks(self, how: int) -> bool:
        """Change to another lock; False, and none, where somebody else's stands in the way."""
        try:
            fcntl.flock(self._descriptor, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def is_at(self, path: Path) -> bool:
        """Whether that is still its name."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._descriptor), os.stat(path))
        return False

    def version(self) -> _Version:
        status = os.fstat(self._descriptor)
        return _Version(status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)

    def touch(self) -> None:
        """Note that it was of use just now."""
        os.utime(self._descriptor, ns=(time.time_ns(), os.fstat(self._descriptor).st_mtime_ns))

    def resize(self, size: int) -> None:
        """Take up that much of the limit before it is written."""
        os.truncate(self._descriptor, size)

    def write(self, chunk: bytes, offset: int) -> None:
        """Put bytes at an offset."""
        view = memoryview(chunk)
        while view:
            written = os.pwrite(self._descriptor, view, offset)
            view, offset = view[written:], offset + written


class ShardCache:
    """Copies of the shards of `folder` in `directory` (made where there is none), `limit` bytes of them in all.

    What was taken is held until it is released; `read` serves any shard, and fetches what is not there. Safe in
    threads; a pickle is a cache over the same directory that holds nothing yet. Raises UserError for a directory that
    cannot be written, and a limit below the largest shard.
    """

    def __init__(
        self, folder: Folder, shards: Sequence[Shard], directory: str | os.PathLike[str], limit: int = CACHE_BYTES
    ) -> None:
        self.directory = Path(directory)
        self.limit = limit
        self._folder, self._shards = folder, shards
        self._held: dict[int, _Copy] = {}
        self._verified: dict[str, _Version] = {}  # of the copies that this process found right, by sha256
        self._taking = threading.Lock()
        with self._refused():
            self.directory.mkdir(parents=True, exist_ok=True)
        with self._locked():
            pass
        self.require(1)

    def __reduce__(self) -> tuple[type["ShardCache"], tuple[Folder, Sequence[Shard], Path, int]]:
        return type(self), (self._folder, self._shards, self.directory, self.limit)

    def require(self, count: int) -> None:
        """Raises UserError unless any `count` shards fit within the limit."""
        need = sum(sorted((shard.bytes for shard in self._shards), reverse=True)[:count])
        if need > self.limit:
            raise UserError(
                f"{self.directory}: {min(count, len(self._shards))} shards must fit at once, which takes up to {need} "
                f"bytes, more than --data.cache_bytes {self.limit}: raise it, or lower --data.window"
            )

    def take(self, number: int) -> Outcome:
        """Have a verified copy of a shard and hold it; does not wait for other processes.

        Raises UserError where the storage does not answer or the disk is full, and where twice the shard was not what
        the manifest says.
        """
        if number in self._held:
            return Outcome.HELD
        copy = self._attempt(number)
        if isinstance(copy, Outcome):
            return copy
        with self._taking:
            self._held.setdefault(number, copy)
        return Outcome.HELD

    def fetch(self, number: int, limit: float = _PATIENCE) -> None:
        """As `take`, but waits up to `limit` seconds for other processes; then a UserError says for what."""
        self._wait(number, lambda: self.take(number), limit)

    def release(self, number: int) -> None:
        """Let go of a shard. Its copy stays until its room is needed."""
        with self._taking:
            copy = self._held.pop(number, None)
        if copy is not None:
            with contextlib.suppress(OSError):  # then it counts as older than it is
                copy.touch()

    def close(self) -> None:
        """Let go of all shards."""
        for number in list(self._held):
            self.release(number)

    def read(self, number: int, offset: int, size: int) -> bytes:
        """`size` bytes of a shard from `offset`, fewer where it ends. One that is not held is fetched for this read.

        Raises UserError as `fetch` does, and where the disk does not answer.
        """
        copy = self._held.get(number) or self._borrowed(number)
        with self._refused():
            return copy.read(offset, size)

    def _borrowed(self, number: int) -> _Copy:
        found: list[_Copy] = []

        def attempt() -> Outcome:
            copy = self._attempt(number)
            if isinstance(copy, Outcome):
                return copy
            found.append(copy)
            return Outcome.HELD

        self._wait(number, attempt, _PATIENCE)
        return found[0]

    def _wait(self, number: int, attempt: Callable[[], Outcome], limit: float) -> None:
        deadline = time.monotonic() + limit
        while (outcome := attempt()) is not Outcome.HELD:
            if time.monotonic() > deadline:
                raise UserError(self.late(number, outcome, limit))
            time.sleep(_POLL)

    def late(self, number: int, outcome: Outcome, seconds: float) -> str:
        name = f"{self._folder}/{self._shards[number].file}"
        if outcome is Outcome.FULL:
            return (
                f"{name}: no room in {self.directory} for {seconds:.0f} s, where other shards are in use: raise "
                f"--data.cache_bytes ({self.limit}), or lower --data.window"
            )
        return _too_slow(name, seconds)

    # One attempt

    def _attempt(self, number: int) -> _Copy | Outcome:
        """A verified copy with a shared lock on it, or why there is none yet."""
        shard = self._shards[number]
        with self._refused():
            present = self._present(shard)
            if present is not None:
                return present
            claimed = self._claimed(shard)
        return claimed if isinstance(claimed, Outcome) else self._filled(claimed, shard)

    def _present(self, shard: Shard) -> _Copy | Outcome | None:
        """The copy that is there; None where there is none, or only one that is damaged, which is removed."""
        path = self._path(shard, "tar")
        try:
            copy = _Copy(path)
        except FileNotFoundError:
            return None
        if copy.version() != self._verified.get(shard.sha256) and copy.locks(fcntl.LOCK_EX):  # so nobody holds it
            if not copy.is_at(path):
                return Outcome.BUSY
            if copy.version().size != shard.bytes or file_sha256(path) != shard.sha256:
                path.unlink()
                return None
        # Others hold what they verified. Whatever was removed between two locks is looked for anew.
        if not copy.locks(fcntl.LOCK_SH) or not copy.is_at(path):
            return Outcome.BUSY
        self._verified[shard.sha256] = copy.version()
        return copy

    def _claimed(self, shard: Shard) -> _Copy | Outcome:
        """An empty file that takes up the shard's room, locked; BUSY where another process has one."""
        part = self._path(shard, "part")
        with self._locked():
            if self._path(shard, "tar").exists() or not _abandoned(part):
                return Outcome.BUSY
            if not self._make_room(shard.bytes):
                return Outcome.FULL
            copy = _Copy(part, os.O_CREAT | os.O_EXCL)
            copy.locks(fcntl.LOCK_EX)
            copy.resize(shard.bytes)
            return copy

    def _make_room(self, size: int) -> bool:
        """Remove what nobody holds, oldest first, until `size` more bytes are within the limit; whether they are."""
        files = sorted(_files(self.directory))
        used = sum(file.size for file in files)
        for file in files:
            if used + size <= self.limit:
                break
            if _abandoned(file.path):
                used -= file.size
        return used + size <= self.limit

    def _filled(self, copy: _Copy, shard: Shard) -> _Copy | Outcome:
        """Fetch the bytes of a shard into its file, and give that its name once they are right."""
        part, path = self._path(shard, "part"), self._path(shard, "tar")
        try:
            self._download(copy, shard)
            with self._locked():  # nobody looks through the folder meanwhile and counts neither
                os.rename(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        self._verified[shard.sha256] = copy.version()
        # The lock is not changed in one go: another process may have it in between.
        return copy if copy.locks(fcntl.LOCK_SH) and copy.is_at(path) else Outcome.BUSY

    def _download(self, copy: _Copy, shard: Shard) -> None:
        """Once more where it goes wrong, be it the way or the bytes."""
        try:
            self._download_once(copy, shard)
        except _DiskError:
            raise
        except UserError:
            time.sleep(_PAUSE)
            self._download_once(copy, shard)

    def _download_once(self, copy: _Copy, shard: Shard) -> None:
        url = f"{self._folder}/{shard.file}"
        digest, length = hashlib.sha256(), 0
        try:
            with self._folder.open(shard.file) as file:
                # One byte more than there should be shows that there are more.
                while chunk := file.read(min(_CHUNK, shard.bytes + 1 - length)):
                    digest.update(chunk)
                    with self._refused():
                        copy.write(chunk[: shard.bytes - length], length)
                    length += len(chunk)
        except FileNotFoundError:
            raise UserError(f"{url}: no such file; put it back, then run the same command again") from None
        if length != shard.bytes or digest.hexdigest() != shard.sha256:
            raise UserError(
                f"{url}: not the bytes that the manifest describes, twice; run 'make-shards check {self._folder}', and "
                "put back or pack again what it names"
            )

    def _path(self, shard: Shard, ending: str) -> Path:
        return self.directory / f"{shard.sha256}.{ending}"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the folder for as long as it takes to look through it."""
        path = self.directory / ".lock"
        with self._refused():
            lock = _Copy(path, os.O_CREAT)
            deadline = time.monotonic() + _PATIENCE
            while not lock.locks(fcntl.LOCK_EX):
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{path}: locked by another process for {_PATIENCE:.0f} s; end it, or name another folder "
                        "with --data.cache"
                    )
                time.sleep(_POLL / 10)
            try:
                yield
            finally:
                lock.locks(fcntl.LOCK_UN)  # now: an exception that is kept would keep the lock's frame, too

    @contextlib.contextmanager
    def _refused(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _DiskError(f"cannot use {self.directory}: {error.strerror or error}; {_MEND}") from error


class _DiskError(UserError):
    """The cache's own folder is at fault, not the storage."""


class _File(NamedTuple):
    """A copy, finished or not; the one to go first comes first."""

    used: int  # nanoseconds, when it was of use for the last time
    size: int  # bytes
    path: Path


def _files(directory: Path) -> Iterator[_File]:
    for entry in os.scandir(directory):
        if _OURS.fullmatch(entry.name):
            with contextlib.suppress(FileNotFoundError):  # removed just now
                status = entry.stat()
                yield _File(status.st_atime_ns, status.st_size, Path(entry.path))


def _abandoned(path: Path) -> bool:
    """Remove a file unless somebody holds it; whether it is gone. For whoever has the folder's lock."""
    try:
        copy = _Copy(path)
    except FileNotFoundError:
        return True
    if not copy.locks(fcntl.LOCK_EX) or not copy.is_at(path):
        return False
    path.unlink()
    return True


def _too_slow(name: str, seconds: float) -> str:
    return f"{name}: not at hand within {seconds:.0f} s; see to the storage, then run the same command again"
