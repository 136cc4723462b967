"""The folder that shards are packed into or read from, on this machine or in an object store."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol

from shards.errors import UserError
from shards.storage.files import is_url
from shards.storage.local_folder import LocalFolder
from shards.storage.remote_folder import RemoteFolder


class Folder(Protocol):
    """A folder that shards are packed into, or were. A pickle works in any process that sees the same storage.

    A name is that of a file in the folder or in ``.parts`` (".parts/000003.part"). ``f"{folder}/{name}"`` is its path
    or URL. Every failure of the storage is a UserError. `read` and `open` raise FileNotFoundError for a missing file.
    """

    @property
    def work_folder(self) -> Path:
        """A local folder for temporary and converted files. It is the same in every run, and may not exist yet."""

    def write_file(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """Give the block a file to write to. It appears under its name when the block ends without an exception."""

    def read(self, name: str) -> bytes:
        """Return all bytes of a file."""

    def open(self, name: str) -> BinaryIO:
        """Open a file to read, seekable and buffered."""

    def get_size(self, name: str) -> int | None:
        """Return the length of a file in bytes, or None where there is none."""

    def hash_file(self, name: str, tick: Callable[[], None] = lambda: None) -> str | None:
        """Return the sha256 of a file, hexadecimal, or None where there is none. `tick` is called between reads."""

    def list_files(self) -> list[str]:
        """Return the sorted names of the files directly in the folder. They are none where there is no folder."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    def remove_parts(self) -> None:
        """Remove what only a restart needs: ``.parts`` and `work_folder`."""

    def lock(self, if_locked: str) -> contextlib.AbstractContextManager[None]:
        """Lock the folder for this process until the block ends or the process dies. Temporary files are removed.

        Raises UserError where another process has locked it. `if_locked` says what that process is and what to do.
        """


def open_folder(path: str) -> Folder:
    """Return the folder at a path or URL. Raises UserError for a URL without a bucket."""
    if not is_url(path):
        return LocalFolder(os.fspath(Path(path)))  # without a slash at its end
    url = path.rstrip("/")
    if not is_url(url):
        raise UserError(f"{path}: the URL has no bucket. Write it like {path.partition(':')[0]}://BUCKET/FOLDER.")
    return RemoteFolder(url)
