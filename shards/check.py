"""Every byte and every picture of a shard folder held against its index and manifest."""

import hashlib
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from shards.errors import UserError
from shards.index import open_records
from shards.layout import (
    BLOCK,
    TAR_END,
    UNLABELLED,
    Manifest,
    Shard,
    load_manifest,
    member_bytes,
    padding,
    tar_header,
)
from shards.picture import UndecodableError, decode
from shards.workers import Tick, run_tasks

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Report:
    """What was looked at, and what is wrong with it: one line a problem."""

    pictures: int
    shards: int
    bytes: int  # of the shards, by the manifest
    problems: tuple[str, ...]


class _Task(NamedTuple):
    folder: Path
    shard: Shard
    records: np.ndarray | None  # of this shard; None where there is no usable index
    classes: int  # how many; 0: unlabelled


def check(
    folder: str | os.PathLike[str], workers: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> Report:
    """Verify hashes, tar structure, checksums, labels, sizes, and that every picture decodes.

    `progress` hears (done, total) pictures. Raises UserError where there is no manifest to hold anything against.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    problems = list(_foreign_files(folder, manifest))
    records: np.ndarray | None = None
    try:
        records = open_records(folder, manifest)
    except UserError as error:
        problems.append(f"{error} (shards are checked by their hashes alone)")
    starts = np.cumsum([0, *(shard.samples for shard in manifest.shards)])
    if records is not None and not _grouped(records, starts):
        problems.append(f"{folder}: the index does not number the samples shard by shard as the manifest counts them")
        records = None

    def task(number: int) -> _Task:
        own = None if records is None else np.array(records[starts[number] : starts[number + 1]])
        return _Task(folder, manifest.shards[number], own, len(manifest.classes))

    found = run_tasks(
        check_shard, task, len(manifest.shards), workers, lambda pictures: progress(pictures, manifest.samples)
    )
    problems += [problem for shard in found for problem in shard]
    return Report(manifest.samples, len(manifest.shards), sum(s.bytes for s in manifest.shards), tuple(problems))


def _foreign_files(folder: Path, manifest: Manifest) -> Iterator[str]:
    known = {shard.file for shard in manifest.shards}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in known:
            yield f"{path.name}: a shard that the manifest does not know"


def _grouped(records: np.ndarray, starts: np.ndarray) -> bool:
    """Whether records ``starts[k]:starts[k + 1]`` are those of shard k."""
    expected = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    return bool(np.array_equal(records["shard"], expected))


class _Reader:
    """A shard read from end to end: every byte is hashed once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.position = 0

    def take(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end of the file."""
        data = self._file.read(size)
        self.digest.update(data)
        self.position += len(data)
        return data

    def skip_to(self, position: int) -> bool:
        """Go on to `position`; whether nothing but zeros was on the way."""
        blank = True
        while self.position < position and (data := self.take(min(_CHUNK, position - self.position))):
            blank = blank and not any(data)
        return blank


def check_shard(task: _Task, tick: Tick) -> list[str]:
    """The problems of one shard. Runs in a worker."""
    name = task.shard.file
    try:
        with (task.folder / name).open("rb", buffering=_CHUNK) as file:
            return list(_shard_problems(task, _Reader(file), os.fstat(file.fileno()).st_size, tick))
    except OSError as error:
        return [f"{name}: {error.strerror}"]


def _shard_problems(task: _Task, reader: _Reader, size: int, tick: Tick) -> Iterator[str]:
    name = task.shard.file
    if size != task.shard.bytes:
        yield f"{name}: {size} bytes where the manifest says {task.shard.bytes}"
    if task.records is not None:
        for done, record in enumerate(task.records):
            tick(done)
            where, problems = _sample_problems(task, reader, record)
            yield from (f"{where}: {problem}" for problem in problems)
        end = reader.position
        if not reader.skip_to(size) or size - end != len(TAR_END):
            yield f"{name}, offset {end}: something follows that the index does not know, or the end is missing"
    while reader.take(_CHUNK):
        tick(task.shard.samples)
    tick(task.shard.samples)
    if reader.digest.hexdigest() != task.shard.sha256:
        yield f"{name}: sha256 differs from the manifest's"


def _sample_problems(task: _Task, reader: _Reader, record: np.void) -> tuple[str, list[str]]:
    """Where the sample lies, and what is wrong with it."""
    offset, size, label = int(record["offset"]), int(record["size"]), int(record["label"])
    problems = []
    if offset - BLOCK != reader.position:
        problems.append(f"the index does not account for what the tar holds from offset {reader.position}")
        reader.skip_to(offset - BLOCK)
    header = reader.take(BLOCK)
    data = reader.take(size)
    blank = reader.take(len(padding(size))) == padding(size)
    member = _member_name(header, size)
    key, _, extension = (member or "?.").partition(".")
    if member is None:
        problems.append("the tar header is damaged or not the one the index describes")
    if not blank:
        problems.append("the padding after the picture is damaged")
    problems += _picture_problems(record, data, extension if member else None)
    if label != UNLABELLED:
        problems += _label_problems(reader, label, key if member else None)
    if not UNLABELLED <= label < task.classes:
        problems.append(f"label {label} is none of {task.classes} classes")
    return f"{task.shard.file}, key {key}, offset {offset}", problems


def _label_problems(reader: _Reader, label: int, key: str | None) -> list[str]:
    """The member that holds the label; its name is held against `key` where that is known."""
    text = str(label).encode()
    header = reader.take(BLOCK)
    name = _member_name(header, len(text)) or ""
    rest = reader.take(member_bytes(len(text)) - BLOCK)
    if name.endswith(".cls") and key in (None, name.removesuffix(".cls")) and rest == text + padding(len(text)):
        return []
    return [f"the label in the tar is not the index's ({label}), or its member is damaged"]


def _member_name(header: bytes, size: int) -> str | None:
    """The member's name where the header is byte for byte the one that packing writes for it."""
    try:
        name = tarfile.TarInfo.frombuf(header, "ascii", "strict").name
        return name if header == tar_header(name, size) else None
    except (tarfile.HeaderError, UnicodeError):
        return None


def _picture_problems(record: np.void, data: bytes, extension: str | None) -> list[str]:
    if len(data) != record["size"]:
        return [f"the file ends after {len(data)} of {record['size']} bytes"]
    if zlib.crc32(data) != record["crc32"]:
        return ["crc32 differs from the index: the picture's bytes are damaged"]
    try:
        picture = decode(data)
    except UndecodableError as reason:
        return [f"does not decode: {reason}"]
    problems = []
    if (picture.height, picture.width) != (record["height"], record["width"]):
        problems.append(
            f"the picture is {picture.height} pixels high and {picture.width} wide where the index says "
            f"{record['height']} and {record['width']}"
        )
    if extension is not None and picture.extension != extension:
        problems.append(f"the bytes are {picture.extension}, the name says {extension}")
    return problems
