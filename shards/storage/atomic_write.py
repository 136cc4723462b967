"""Write local files so that they appear complete under their name, or not at all."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from shards.errors import UserError, suggest_fix


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk. A rename is safe only after that. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def make_temporary_path(folder: Path, name: str) -> Iterator[Path]:
    """Make `folder` and give the block a new path in it, for the file `name`. What is left there is removed.

    No other process or machine gets the same path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{os.path.basename(name)}.{uuid.uuid4().hex}.tmp"
    try:
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a file of text completely or not at all. Raises UserError where that fails."""
    with convert_write_errors(str(path)), make_temporary_path(path.parent, path.name) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
        temporary.replace(path)


def remove_temporary_files(folder: Path) -> None:
    """Remove the temporary files that killed processes left in `folder`."""
    for leftover in folder.glob("*.tmp"):
        with contextlib.suppress(OSError):
            leftover.unlink()


@contextlib.contextmanager
def convert_write_errors(path: str) -> Iterator[None]:
    """Turn OSError into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}. {suggest_fix(error)}") from error
