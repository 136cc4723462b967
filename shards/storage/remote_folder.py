"""A shard folder in an object store."""

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from shards.errors import UserError
from shards.layout import PARTS_FOLDER
from shards.storage import remote
from shards.storage.atomic_write import convert_write_errors, make_temporary_path, remove_temporary_files
from shards.storage.files import open_buffered
from shards.storage.hashing import hash_file
from shards.storage.lock import lock_folder

_REMOVERS = 8  # threads


@dataclass(frozen=True)
class RemoteFolder:
    """A `shards.storage.folders.Folder` in an object store.

    Files are written in `work_folder`, uploaded, and read back. `work_folder` takes as much room as the shards that are
    being written. `lock` works on this machine only, since such stores have no lock that dies with its holder. Two
    machines that pack the same plan write the same bytes, and a plan in ``.parts`` keeps out another plan.
    """

    url: str
    """URL of the folder, without a slash at its end"""

    def __str__(self) -> str:
        return self.url

    @property
    def work_folder(self) -> Path:
        mark = hashlib.sha256(os.fsencode(self.url)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"make-shards-{os.getuid()}-{mark}"

    @contextlib.contextmanager
    def write_file(self, name: str) -> Iterator[BinaryIO]:
        work = self.work_folder
        with convert_write_errors(_with_hint(work)), make_temporary_path(_make_private(work), name) as temporary:
            with temporary.open("xb", buffering=1 << 20) as file:
                yield file
            remote.upload(temporary, self._url(name), hash_file(temporary))

    def read(self, name: str) -> bytes:
        return remote.read_object(self._url(name))

    def open(self, name: str) -> BinaryIO:
        return open_buffered(url := self._url(name), remote.get_size(url))

    def get_size(self, name: str) -> int | None:
        with contextlib.suppress(FileNotFoundError):
            return remote.get_size(self._url(name))
        return None

    def hash_file(self, name: str, tick: Callable[[], None] = lambda: None) -> str | None:
        with contextlib.suppress(FileNotFoundError):
            return remote.hash_object(self._url(name), tick)
        return None

    def list_files(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return sorted(remote.list_folder(self.url)[0], key=os.fsencode)
        return []

    def remove(self, name: str) -> None:
        remote.remove_object(self._url(name))

    def remove_parts(self) -> None:
        parts = RemoteFolder(self._url(PARTS_FOLDER))
        with ThreadPoolExecutor(_REMOVERS) as threads:
            list(threads.map(parts.remove, parts.list_files()))
        shutil.rmtree(self.work_folder, ignore_errors=True)

    @contextlib.contextmanager
    def lock(self, if_locked: str) -> Iterator[None]:
        beside = _make_private(Path(f"{self.work_folder}.lock"))  # `work_folder` is removed while the lock is held
        lock = lock_folder(beside, f"lock of {self.url}: {if_locked}")
        with _remove_if_empty(beside), lock, _remove_if_empty(_make_private(self.work_folder)):
            remove_temporary_files(self.work_folder)
            yield

    def _url(self, name: str) -> str:
        return f"{self.url}/{name}"


def _make_private(folder: Path) -> Path:
    """Make a folder for this user alone, since others may write where it lies. Return it.

    Raises UserError where it belongs to somebody else.
    """
    with convert_write_errors(_with_hint(folder)):
        with contextlib.suppress(FileExistsError):
            folder.mkdir(0o700)
        status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise UserError(f"{folder}: not a folder of yours. Remove it, or set TMPDIR to a folder that belongs to you.")
    return folder


def _with_hint(folder: Path) -> str:
    return f"{folder} (in TMPDIR)"


@contextlib.contextmanager
def _remove_if_empty(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()
