"""Where a packing goes: a folder of this machine, or one of an object store, behind the same few functions."""

import contextlib
import hashlib
import io
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from shards.errors import UserError, mend_of
from shards.layout import PARTS, file_sha256
from shards.storage import remote
from shards.storage.files import buffered, found, is_url
from shards.storage.lock import locked

_EARLY = 4 << 20  # bytes
_REMOVERS = 8  # threads


class Folder(Protocol):
    """A folder that is being packed into, or was. A pickle of it works in any process that sees the same storage.

    A name is that of a file in the folder, or in ``.parts`` (".parts/000003.part"); ``f"{folder}/{name}"`` is its path
    or URL. UserError for every failure of the storage; `read` and `open` raise FileNotFoundError where there is no
    such file.
    """

    @property
    def work(self) -> Path:
        """A folder of this machine for temporary and staged files, the same in every run; it need not exist yet."""

    def whole_file(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A file to write to, which appears under its name when the block ends well; or never."""

    def read(self, name: str) -> bytes:
        """All bytes of a file."""

    def open(self, name: str) -> BinaryIO:
        """A file to read from, seekable and buffered."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""

    def sha256(self, name: str, tick: Callable[[], None] = lambda: None) -> str | None:
        """The sha256 of a file in hexadecimal, with `tick` called between reads; None where there is none."""

    def names(self) -> list[str]:
        """The files directly in the folder, sorted; none where there is no folder."""

    def remove(self, name: str) -> None:
        """Take a file away, if it is there."""

    def remove_parts(self) -> None:
        """Take away what only a restart needs: ``.parts`` and `work`."""

    def held(self, taken: str) -> contextlib.AbstractContextManager[None]:
        """Hold the folder for this process, until the block ends or the process dies; files left half-written go.

        Raises UserError where another one holds it: `taken` says what that is and what to do.
        """


def out_folder(path: str) -> Folder:
    """The folder of a path or URL. Raises UserError for a URL without a bucket."""
    if not is_url(path):
        return LocalFolder(os.fspath(Path(path)))  # without a slash at its end
    url = path.rstrip("/")
    if not is_url(url):
        raise UserError(f"{path}: names no bucket; write it like {path.partition(':')[0]}://BUCKET/FOLDER")
    return RemoteFolder(url)


class _EarlyWriter(io.BufferedWriter):
    """A new file whose writing to the disk begins while more is still to come, so that syncing it waits for little."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "x"), 1 << 20)
        self._waiting = 0  # bytes

    def write(self, data: Any) -> int:
        self._waiting += (written := super().write(data))
        if self._waiting >= _EARLY:
            self.flush()
            os.posix_fadvise(self.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # the kernel begins, and does not wait
            self._waiting = 0
        return written


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine or of a file server. Files appear by renaming, synced to the disk."""

    path: str

    def __str__(self) -> str:
        return self.path

    @property
    def work(self) -> Path:
        return Path(self.path, PARTS)

    @contextlib.contextmanager
    def whole_file(self, name: str) -> Iterator[BinaryIO]:
        with _refused(path := os.path.join(self.path, name)), _temporary(self.work, name) as temporary:
            with _EarlyWriter(temporary) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(Path(path).parent)

    def read(self, name: str) -> bytes:
        with found(path := os.path.join(self.path, name)), open(path, "rb", buffering=0) as file:
            return file.read()

    def open(self, name: str) -> BinaryIO:
        with found(path := os.path.join(self.path, name)):
            return buffered(path, os.stat(path).st_size)

    def size(self, name: str) -> int | None:
        with contextlib.suppress(FileNotFoundError), found(path := os.path.join(self.path, name)):
            return os.stat(path).st_size
        return None

    def sha256(self, name: str, tick: Callable[[], None] = lambda: None) -> str | None:
        with contextlib.suppress(FileNotFoundError), found(path := os.path.join(self.path, name)):
            return file_sha256(Path(path), tick)
        return None

    def names(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError), found(self.path), os.scandir(self.path) as entries:
            return sorted((entry.name for entry in entries if entry.is_file()), key=os.fsencode)
        return []

    def remove(self, name: str) -> None:
        with _refused(path := os.path.join(self.path, name)):
            Path(path).unlink(missing_ok=True)

    def remove_parts(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)

    @contextlib.contextmanager
    def held(self, taken: str) -> Iterator[None]:
        with locked(Path(self.path), taken):
            _clear(self.work)
            yield


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of an object store. Files are written in `work`, uploaded, and read back before they count as there.

    `work` takes as much as the shards that are being written. `held` holds on this machine only, since such stores
    have no lock that dies with its holder: two machines that pack the same plan write the same bytes, and another
    plan is refused by what lies in ``.parts``.
    """

    url: str  # without a slash at its end

    def __str__(self) -> str:
        return self.url

    @property
    def work(self) -> Path:
        mark = hashlib.sha256(os.fsencode(self.url)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"make-shards-{os.getuid()}-{mark}"

    @contextlib.contextmanager
    def whole_file(self, name: str) -> Iterator[BinaryIO]:
        with _refused(f"{self.work} (TMPDIR says where)"), _temporary(_private(self.work), name) as temporary:
            with temporary.open("xb", buffering=1 << 20) as file:
                yield file
            remote.upload(temporary, f"{self}/{name}", file_sha256(temporary))

    def read(self, name: str) -> bytes:
        return remote.fetch(f"{self}/{name}")

    def open(self, name: str) -> BinaryIO:
        return buffered(url := f"{self}/{name}", remote.size(url))

    def size(self, name: str) -> int | None:
        with contextlib.suppress(FileNotFoundError):
            return remote.size(f"{self}/{name}")
        return None

    def sha256(self, name: str, tick: Callable[[], None] = lambda: None) -> str | None:
        with contextlib.suppress(FileNotFoundError):
            return remote.sha256(f"{self}/{name}", tick)
        return None

    def names(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return sorted(remote.listing(self.url)[0], key=os.fsencode)
        return []

    def remove(self, name: str) -> None:
        remote.remove(f"{self}/{name}")

    def remove_parts(self) -> None:
        parts = RemoteFolder(f"{self}/{PARTS}")
        with ThreadPoolExecutor(_REMOVERS) as threads:
            list(threads.map(parts.remove, parts.names()))
        shutil.rmtree(self.work, ignore_errors=True)

    @contextlib.contextmanager
    def held(self, taken: str) -> Iterator[None]:
        beside = _private(Path(f"{self.work}.lock"))  # `work` goes while it is held
        lock = locked(beside, f"lock of {self.url}: {taken}")
        with _removed_if_empty(beside), lock, _removed_if_empty(_private(self.work)):
            _clear(self.work)
            yield


def _private(folder: Path) -> Path:
    """The folder, made for this user alone: others may write where it lies. Raises UserError where it is another's."""
    with _refused(f"{folder} (TMPDIR says where)"):
        with contextlib.suppress(FileExistsError):
            folder.mkdir(0o700)
        status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise UserError(f"{folder}: somebody else's, or no folder; remove it, or set TMPDIR to a folder of your own")
    return folder


def sync_folder(folder: Path) -> None:
    """A rename is on the disk when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _temporary(work: Path, name: str) -> Iterator[Path]:
    """A new name in `work`, which is made; no process or machine has it twice. Nothing is left under it."""
    work.mkdir(parents=True, exist_ok=True)
    temporary = work / f"{os.path.basename(name)}.{uuid.uuid4().hex}.tmp"
    try:
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _clear(work: Path) -> None:
    """Take away what a killed process left."""
    for leftover in work.glob("*.tmp"):
        with contextlib.suppress(OSError):
            leftover.unlink()


@contextlib.contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def _refused(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; {mend_of(error)}") from error
