"""One writer at a time in a folder."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from shards.errors import UserError, mend_of

LOCK_FILE = ".lock"


@contextlib.contextmanager
def locked(folder: Path, taken: str) -> Iterator[None]:
    """Make `folder` and hold it for this process; the kernel lets go when the process dies.

    Raises UserError where the folder cannot be written, or another process holds it: `taken` says what that is and
    what to do.
    """
    file = _lock(folder, taken)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / LOCK_FILE).unlink()
        os.close(file)


def _lock(folder: Path, taken: str) -> int:
    path = folder / LOCK_FILE
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}; {mend_of(error)}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _names(path, file):
                return file
            os.close(file)  # its last holder unlinked it between our open and our lock
        except BlockingIOError:
            os.close(file)
            raise UserError(f"{folder}: {taken}") from None
        except OSError as error:
            os.close(file)
            raise UserError(f"{path}: {error.strerror}; choose a folder on a file system with locks") from error


def _names(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
