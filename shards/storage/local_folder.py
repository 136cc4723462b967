"""A shard folder on this machine or on a file server."""

import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from shards.layout import PARTS_FOLDER
from shards.storage.atomic_write import convert_write_errors, make_temporary_path, remove_temporary_files, sync_folder
from shards.storage.files import convert_errors, open_buffered
from shards.storage.hashing import hash_file
from shards.storage.lock import lock_folder

_EARLY = 4 << 20  # bytes


class _EarlyWriter(io.BufferedWriter):
    """A new file. The kernel starts to write it to the disk while more is still to come, so that fsync waits less."""

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
    """A `shards.storage.folders.Folder` on this machine. Files appear by renaming and are synced to the disk."""

    path: str
    """path of the folder"""

    def __str__(self) -> str:
        return self.path

    @property
    def work_folder(self) -> Path:
        return Path(self.path, PARTS_FOLDER)

    @contextlib.contextmanager
    def write_file(self, name: str) -> Iterator[BinaryIO]:
        path = self._path(name)
        with convert_write_errors(path), make_temporary_path(self.work_folder, name) as temporary:
            with _EarlyWriter(temporary) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(Path(path).parent)

    def read(self, name: str) -> bytes:
        with convert_errors(path := self._path(name)), open(path, "rb", buffering=0) as file:
            return file.read()

    def open(self, name: str) -> BinaryIO:
        with convert_errors(path := self._path(name)):
            return open_buffered(path, os.stat(path).st_size)

    def get_size(self, name: str) -> int | None:
        with contextlib.suppress(FileNotFoundError), convert_errors(path := self._path(name)):
            return os.stat(path).st_size
        return None

    def hash_file(self, name: str, tick: Callable[[], None] = lambda: None) -> str | None:
        with contextlib.suppress(FileNotFoundError), convert_errors(path := self._path(name)):
            return hash_file(Path(path), tick)
        return None

    def list_files(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError), convert_errors(self.path), os.scandir(self.path) as entries:
            return sorted((entry.name for entry in entries if entry.is_file()), key=os.fsencode)
        return []

    def remove(self, name: str) -> None:
        with convert_write_errors(path := self._path(name)):
            Path(path).unlink(missing_ok=True)

    def remove_parts(self) -> None:
        shutil.rmtree(self.work_folder, ignore_errors=True)

    @contextlib.contextmanager
    def lock(self, if_locked: str) -> Iterator[None]:
        with lock_folder(Path(self.path), if_locked):
            remove_temporary_files(self.work_folder)
            yield

    def _path(self, name: str) -> str:
        return os.path.join(self.path, name)
