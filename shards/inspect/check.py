"""Every byte and every picture of a shard folder held against its index and manifest."""

import dataclasses
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from shards.errors import UserError
from shards.images.decode import UndecodableError
from shards.images.validate import Judge, condemn
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
from shards.packing.workers import Tick, run_tasks
from shards.storage.output import Folder, out_folder
from shards.storage.sequential import SequentialReader

_CHUNK = 1 << 20
_DIFFERS = "sha256 differs from the manifest's"


@dataclass(frozen=True)
class Report:
    """What was looked at, and what is wrong with it: one line a problem."""

    pictures: int
    shards: int
    bytes: int  # of the shards, by the manifest
    problems: tuple[str, ...]

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps({"ok": not self.problems, **dataclasses.asdict(self)}, indent=1) + "\n"


class _Task(NamedTuple):
    folder: Folder
    shard: Shard
    records: np.ndarray | None  # of this shard; None where there is no usable index
    classes: int  # how many; 0: unlabelled
    foreign: bool  # another maker's tar: only its pictures' bytes are known
    judge: Judge
    condemned: frozenset[int] = frozenset()  # places of samples that took too long


def check(
    path: str | os.PathLike[str], workers: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> Report:
    """Verify hashes, tar structure, checksums, labels, sizes, and that every picture decodes.

    `progress` hears (done, total) pictures. Raises UserError where there is no manifest to hold anything against.
    """
    folder = out_folder(os.fspath(path))
    manifest = load_manifest(folder)
    problems = [*_table_problems(folder, manifest), *_unknown_files(folder, manifest)]
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
        return _Task(folder, manifest.shards[number], own, len(manifest.classes), manifest.foreign, judge)

    judge = Judge(
        max_pixels=manifest.options.get("max_pixels", Judge.max_pixels),
        picture_seconds=manifest.options.get("picture_seconds", Judge.picture_seconds),
    )
    found = run_tasks(
        check_shard,
        task,
        len(manifest.shards),
        workers,
        lambda pictures: progress(pictures, manifest.samples),
        condemn,
    )
    problems += [problem for shard in found for problem in shard]
    return Report(manifest.samples, len(manifest.shards), sum(s.bytes for s in manifest.shards), tuple(problems))


def _table_problems(folder: Folder, manifest: Manifest) -> Iterator[str]:
    for name, expected in sorted(manifest.tables.items()):
        if (sha256 := folder.sha256(name)) != expected:
            yield f"{name}: {'no such file' if sha256 is None else _DIFFERS}"


def _unknown_files(folder: Folder, manifest: Manifest) -> Iterator[str]:
    known = {shard.file for shard in manifest.shards}
    for name in sorted(folder.names()):
        if name.endswith(".tar") and name not in known:
            yield f"{name}: a shard that the manifest does not know"


def _grouped(records: np.ndarray, starts: np.ndarray) -> bool:
    """Whether records ``starts[k]:starts[k + 1]`` are those of shard k."""
    expected = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    return bool(np.array_equal(records["shard"], expected))


def check_shard(task: _Task, tick: Tick) -> list[str]:
    """The problems of one shard. Runs in a worker."""
    name = task.shard.file
    size = task.folder.size(name)
    if size is None:
        return [f"{name}: no such file"]
    try:
        with task.folder.open(name) as file:
            return list(_shard_problems(task, SequentialReader(file), size, tick))
    except OSError as error:
        return [f"{name}: {error.strerror or error}"]


def _shard_problems(task: _Task, reader: SequentialReader, size: int, tick: Tick) -> Iterator[str]:
    name = task.shard.file
    if size != task.shard.bytes:
        yield f"{name}: {size} bytes where the manifest says {task.shard.bytes}"
    if task.records is not None:
        for done, record in enumerate(task.records):
            tick(done)
            where, problems = _sample_problems(task, reader, record, overran=done in task.condemned)
            yield from (f"{where}: {problem}" for problem in problems)
        end = reader.position
        if not task.foreign and (not reader.skip_to(size) or size - end != len(TAR_END)):
            yield f"{name}, offset {end}: something follows that the index does not know, or the end is missing"
    while reader.take(_CHUNK):
        tick(task.shard.samples)
    tick(task.shard.samples)
    if reader.digest.hexdigest() != task.shard.sha256:
        yield f"{name}: {_DIFFERS}"


def _sample_problems(task: _Task, reader: SequentialReader, record: np.void, *, overran: bool) -> tuple[str, list[str]]:
    """Where the sample lies, and what is wrong with it."""
    offset, label = int(record["offset"]), int(record["label"])
    where = f"{task.shard.file}, offset {offset}"
    problems: list[str] = []
    if task.foreign:
        reader.skip_to(offset)
        key, extension, data = None, None, reader.take(int(record["size"]))
    else:
        key, extension, data, problems = _member_problems(reader, record)
        where = f"{task.shard.file}, key {key or '?'}, offset {offset}"
    problems += _picture_problems(task, record, data, extension, overran=overran)
    if label != UNLABELLED and not task.foreign:
        problems += _label_problems(reader, label, key)
    if not UNLABELLED <= label < task.classes:
        problems.append(f"label {label} is none of {task.classes} classes")
    return where, problems


def _member_problems(reader: SequentialReader, record: np.void) -> tuple[str | None, str | None, bytes, list[str]]:
    """Key and extension of a member of ours, None where its header is damaged; its payload; what is wrong around it."""
    offset, size = int(record["offset"]), int(record["size"])
    problems = []
    if offset - BLOCK != reader.position:
        problems.append(f"the index does not account for what the tar holds from offset {reader.position}")
        reader.skip_to(offset - BLOCK)
    member = _member_name(reader.take(BLOCK), size)
    data = reader.take(size)
    if member is None:
        problems.append("the tar header is damaged or not the one the index describes")
    if reader.take(len(padding(size))) != padding(size):
        problems.append("the padding after the picture is damaged")
    if member is None:
        return None, None, data, problems
    key, _, extension = member.partition(".")
    return key, extension, data, problems


def _label_problems(reader: SequentialReader, label: int, key: str | None) -> list[str]:
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


def _picture_problems(task: _Task, record: np.void, data: bytes, extension: str | None, *, overran: bool) -> list[str]:
    if len(data) != record["size"]:
        return [f"the file ends after {len(data)} of {record['size']} bytes"]
    if zlib.crc32(data) != record["crc32"]:
        return ["crc32 differs from the index: the picture's bytes are damaged"]
    try:
        task.judge.refuse(len(data), overran=overran)
        picture = task.judge.picture(data)
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
