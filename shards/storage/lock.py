"""A lock on a folder, so that one process at a time writes into it."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from shards.errors import UserError, suggest_fix

LOCK_FILE = ".lock"


@contextlib.contextmanager
def lock_folder(folder: Path, if_locked: str) -> Iterator[None]:
    """Make `folder` and lock it for this process. The kernel releases the lock when the process dies.

    Raises UserError where the folder cannot be written or another process has locked it. `if_locked` is the message
    for the second case: what that process is, and what to do.
    """
    file = _open_and_lock(folder, if_locked)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / LOCK_FILE).unlink()
        os.close(file)


def _open_and_lock(folder: Path, if_locked: str) -> int:
    path = folder / LOCK_FILE
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}. {suggest_fix(error)}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same_file(path, file):
                return file
            os.close(file)  # its last holder removed it between our open and our lock
        except BlockingIOError:
            os.close(file)
            raise UserError(f"{folder}: {if_locked}") from None
        except OSError as error:
            os.close(file)
            raise UserError(f"{path}: {error.strerror}. Choose a folder on a file system with locks.") from error


def _is_same_file(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
