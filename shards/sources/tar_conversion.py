"""Convert archives that cannot be read by offsets into plain tars in the work folder. A restart finds them there."""

import hashlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from shards.errors import UserError, suggest_fix
from shards.sources import parquet, tars
from shards.sources.fields import AS_FOUND, Fields
from shards.storage import files


def decompress_tar(path: str, work_folder: Path) -> str:
    """Return the path of a plain tar with the content of a compressed one."""
    return _convert(path, work_folder, lambda source, target: tars.decompress(source, target, path))


def convert_parquet(path: str, work_folder: Path, tick: Callable[[int], None], fields: Fields) -> str:
    """Return the path of a tar with the samples of a parquet table. `tick` is called with the number of rows done."""

    def convert(source: BinaryIO, target: BinaryIO) -> None:
        parquet.convert_to_tar(source, path, target, tick, fields)

    return _convert(path, work_folder, convert, repr(fields) if fields != AS_FOUND else "")


def find_label_column(path: str, fields: Fields) -> parquet.LabelColumn | None:
    """Return the label column of a parquet table, or None where there is none."""
    with files.open_input(path) as file:
        return parquet.find_label_column(file, path, fields)


def list_columns(path: str) -> list[str]:
    """Return the columns of a parquet table that could be taken for labels."""
    with files.open_input(path) as file:
        return parquet.list_label_columns(file, path)


def _convert(path: str, work_folder: Path, convert: Callable[[BinaryIO, BinaryIO], None], how: str = "") -> str:
    """Return the converted file of `path`. It is made completely or not at all. `how` tells two conversions apart."""
    with files.open_input(path) as source:
        target = work_folder / f"staged-{_identify(path, source, how)}.tar"
        if target.exists():
            return str(target)
        temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
        try:
            work_folder.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("wb", buffering=1 << 20) as file:
                    convert(source, file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror or error}. {suggest_fix(error)}") from error
    return str(target)


def _identify(path: str, file: BinaryIO, how: str) -> str:
    """Return a hash of path, length and, for a local file, time of change, and of `how` it is converted.

    So a new file of the same name is converted again.
    """
    changed = 0 if files.is_url(path) else os.stat(path).st_mtime_ns
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    return hashlib.sha256(os.fsencode(f"{path}\0{length}\0{changed}{how}")).hexdigest()[:16]
