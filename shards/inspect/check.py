"""Check every byte and every image of a shard folder against its index and manifest."""

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
from shards.images.image_info import UndecodableError
from shards.images.rules import ImageRules
from shards.index import open_records
from shards.layout import BLOCK, TAR_END, UNLABELED, count_member_bytes, make_padding, make_tar_header
from shards.manifest import Manifest, Shard, load_manifest
from shards.packing.workers import Tick, mark_as_timed_out, run_tasks
from shards.storage.folders import Folder, open_folder
from shards.storage.hashing import HashingReader

_CHUNK = 1 << 20  # bytes
_HASH_DIFFERS = "sha256 differs from the manifest's"


@dataclass(frozen=True)
class Report:
    """What was checked, and what is wrong with it."""

    images: int
    """number of images, by the manifest"""
    shards: int
    """number of shards, by the manifest"""
    bytes: int
    """bytes of the shards, by the manifest"""
    problems: tuple[str, ...]
    """one line per problem"""

    def to_json(self) -> str:
        """Return the report as JSON, with ``ok`` true where there is no problem."""
        return json.dumps({"ok": not self.problems, **dataclasses.asdict(self)}, indent=1) + "\n"


class _Task(NamedTuple):
    """One shard to check."""

    folder: Folder
    """folder that it lies in"""
    shard: Shard
    """the shard, by the manifest"""
    records: np.ndarray | None
    """[samples] of RECORD; None where there is no usable index"""
    foreign: bool
    """True for a tar of another program, of which only the bytes of the images are known"""
    rules: ImageRules
    """limits of the decoder"""
    timed_out: frozenset[int] = frozenset()
    """positions of samples that took too long"""


class _Member(NamedTuple):
    """The member of a tar that holds an image."""

    key: str | None
    """tar key; None where the header is damaged or was not written by make-shards"""
    extension: str | None
    """extension of its name; None as `key`"""
    data: bytes
    """the payload"""


def check(
    path: str | os.PathLike[str], workers: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> Report:
    """Check hashes, tar structure, checksums, labels and sizes, and that every image can be decoded.

    `progress` is called with (images done, images in total). Raises UserError where there is no manifest to check
    against.
    """
    folder = open_folder(os.fspath(path))
    manifest = load_manifest(folder)
    problems = [*_check_tables(folder, manifest), *_find_unknown_shards(folder, manifest)]
    starts = np.cumsum([0, *(shard.samples for shard in manifest.shards)])
    records = _load_records(folder, manifest, starts, problems)
    rules = ImageRules(
        max_pixels=manifest.options.get("max_pixels", ImageRules.max_pixels),
        image_seconds=manifest.options.get("image_seconds", ImageRules.image_seconds),
    )

    def make_task(number: int) -> _Task:
        own = None if records is None else np.array(records[starts[number] : starts[number + 1]])
        return _Task(folder, manifest.shards[number], own, manifest.foreign, rules)

    found = run_tasks(
        _check_shard,
        make_task,
        len(manifest.shards),
        workers,
        lambda images: progress(images, manifest.samples),
        mark_as_timed_out,
    )
    problems += [problem for shard in found for problem in shard]
    return Report(manifest.samples, len(manifest.shards), sum(s.bytes for s in manifest.shards), tuple(problems))


def _check_tables(folder: Folder, manifest: Manifest) -> Iterator[str]:
    for name, expected in sorted(manifest.tables.items()):
        if (sha256 := folder.hash_file(name)) != expected:
            yield f"{name}: {'no such file' if sha256 is None else _HASH_DIFFERS}"


def _find_unknown_shards(folder: Folder, manifest: Manifest) -> Iterator[str]:
    known = {shard.file for shard in manifest.shards}
    for name in sorted(folder.list_files()):
        if name.endswith(".tar") and name not in known:
            yield f"{name}: a tar that the manifest does not list"


def _load_records(folder: Folder, manifest: Manifest, starts: np.ndarray, problems: list[str]) -> np.ndarray | None:
    """Return the index, or None after adding to `problems` why it cannot be used."""
    try:
        records = open_records(folder, manifest)
    except UserError as error:
        problems.append(f"{error} (Without the index, only the hashes of the shards are checked.)")
        return None
    if not _is_in_shard_order(records, starts):
        problems.append(f"{folder}: the index does not number the samples shard by shard, as the manifest counts them")
        return None
    return records


def _is_in_shard_order(records: np.ndarray, starts: np.ndarray) -> bool:
    """Return whether records ``starts[k]:starts[k + 1]`` are those of shard k."""
    expected = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    return bool(np.array_equal(records["shard"], expected))


def _check_shard(task: _Task, tick: Tick) -> list[str]:
    """Return the problems of one shard. Runs in a worker."""
    name = task.shard.file
    size = task.folder.get_size(name)
    if size is None:
        return [f"{name}: no such file"]
    try:
        with task.folder.open(name) as file:
            return list(_find_shard_problems(task, HashingReader(file), size, tick))
    except OSError as error:
        return [f"{name}: {error.strerror or error}"]


def _find_shard_problems(task: _Task, reader: HashingReader, size: int, tick: Tick) -> Iterator[str]:
    name = task.shard.file
    if size != task.shard.bytes:
        yield f"{name}: the file has {size} bytes, the manifest says {task.shard.bytes}"
    if task.records is not None:
        for done, record in enumerate(task.records):
            tick(done)
            where, problems = _check_sample(task, reader, record, timed_out=done in task.timed_out)
            yield from (f"{where}: {problem}" for problem in problems)
        end = reader.position
        if not task.foreign and (not reader.skip_to(size) or size - end != len(TAR_END)):
            yield f"{name}, offset {end}: the end of the tar is missing, or data follow that are not in the index"
    while reader.read(_CHUNK):
        tick(task.shard.samples)
    tick(task.shard.samples)
    if reader.digest.hexdigest() != task.shard.sha256:
        yield f"{name}: {_HASH_DIFFERS}"


def _check_sample(task: _Task, reader: HashingReader, record: np.void, *, timed_out: bool) -> tuple[str, list[str]]:
    """Return where the sample lies, and what is wrong with it."""
    offset, label = int(record["offset"]), int(record["label"])
    where = f"{task.shard.file}, offset {offset}"
    problems: list[str] = []
    if task.foreign:
        reader.skip_to(offset)
        member = _Member(None, None, reader.read(int(record["size"])))
    else:
        member, problems = _read_member(reader, record)
        where = f"{task.shard.file}, key {member.key or '?'}, offset {offset}"
    problems += _check_image(task, record, member, timed_out=timed_out)
    if label != UNLABELED and not task.foreign:
        problems += _check_label(reader, label, member.key)
    return where, problems


def _read_member(reader: HashingReader, record: np.void) -> tuple[_Member, list[str]]:
    """Read a member that make-shards wrote. Return it, and what is wrong around its payload."""
    offset, size = int(record["offset"]), int(record["size"])
    problems = []
    if offset - BLOCK != reader.position:
        problems.append(f"the tar holds data at offset {reader.position} that are not in the index")
        reader.skip_to(offset - BLOCK)
    name = _parse_name(reader.read(BLOCK), size)
    data = reader.read(size)
    if name is None:
        problems.append("the tar header is damaged, or is not the one that the index describes")
    if reader.read(len(make_padding(size))) != make_padding(size):
        problems.append("the padding after the image is damaged")
    if name is None:
        return _Member(None, None, data), problems
    key, _, extension = name.partition(".")
    return _Member(key, extension, data), problems


def _check_label(reader: HashingReader, label: int, key: str | None) -> list[str]:
    """Check the member that holds the label, also against `key` where that is known."""
    text = str(label).encode()
    header = reader.read(BLOCK)
    name = _parse_name(header, len(text)) or ""
    rest = reader.read(count_member_bytes(len(text)) - BLOCK)
    is_right_name = name.endswith(".cls") and key in (None, name.removesuffix(".cls"))
    if is_right_name and rest == text + make_padding(len(text)):
        return []
    return [f"the label in the tar is not the one in the index ({label}), or its member is damaged"]


def _parse_name(header: bytes, size: int) -> str | None:
    """Return the member's name where the header is byte for byte the one that packing writes for it."""
    try:
        name = tarfile.TarInfo.frombuf(header, "ascii", "strict").name
        return name if header == make_tar_header(name, size) else None
    except (tarfile.HeaderError, UnicodeError):
        return None


def _check_image(task: _Task, record: np.void, member: _Member, *, timed_out: bool) -> list[str]:
    if len(member.data) != record["size"]:
        return [f"the file ends after {len(member.data)} of {record['size']} bytes"]
    if zlib.crc32(member.data) != record["crc32"]:
        return ["its crc32 differs from the index, so the image's bytes are damaged"]
    try:
        task.rules.refuse_unread(len(member.data), timed_out=timed_out)
        info = task.rules.validate(member.data)
    except UndecodableError as reason:
        return [f"the image cannot be decoded ({reason})"]
    problems = []
    if (info.height, info.width) != (record["height"], record["width"]):
        problems.append(
            f"the image is {info.width} x {info.height} pixels, the index says {record['width']} x {record['height']}"
        )
    if member.extension is not None and info.extension != member.extension:
        problems.append(f"the bytes are {info.extension}, but the name says {member.extension}")
    return problems
