"""Archives that cannot be read by offsets, as plain tars beside the packing: made once, found again by a restart."""

import hashlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from shards.errors import UserError, mend_of
from shards.sources import parquet, tars
from shards.storage import files


def decompressed(path: str, stage: Path) -> str:
    """The plain tar of a compressed one."""
    return _made(path, stage, lambda source, target: tars.decompress(source, target, path))


def from_parquet(path: str, stage: Path, tick: Callable[[int], None]) -> str:
    """A parquet table as a tar of samples; `tick` hears how many rows of it are done."""
    return _made(path, stage, lambda source, target: parquet.to_tar(source, path, target, tick))


def label_column(path: str) -> parquet.LabelColumn | None:
    """Where the labels of a parquet table are."""
    with files.open_input(path) as file:
        return parquet.label_column(file, path)


def _made(path: str, stage: Path, make: Callable[[BinaryIO, BinaryIO], None]) -> str:
    """The staged file of `path`, made whole or not at all."""
    with files.open_input(path) as source:
        target = stage / f"staged-{_identity(path, source)}.tar"
        if target.exists():
            return str(target)
        temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
        try:
            stage.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("wb", buffering=1 << 20) as file:
                    make(source, file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror or error}; {mend_of(error)}") from error
    return str(target)


def _identity(path: str, file: BinaryIO) -> str:
    """Path, length and, for a local file, time of change: another file of that name is staged anew."""
    changed = 0 if files.is_url(path) else os.stat(path).st_mtime_ns
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    return hashlib.sha256(os.fsencode(f"{path}\0{length}\0{changed}")).hexdigest()[:16]
