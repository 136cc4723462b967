"""Pictures into tar shards: a plan, one task a shard in worker processes, then the index and, last, the manifest.

Everything written is a pure function of the sorted sources and the options: the number of workers, a kill in the middle
and a restart change no byte.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from shards import folder, sources
from shards.errors import UserError
from shards.layout import (
    FORMAT_VERSION,
    INDEX_FILE,
    MANIFEST_FILE,
    MAX_SHARDS,
    RECORD,
    TAR_END,
    UNLABELLED,
    Manifest,
    Rejected,
    Shard,
    file_sha256,
    member_bytes,
    padding,
    sample_key,
    shard_name,
    tar_header,
)
from shards.lock import locked
from shards.picture import Picture, UndecodableError, decode
from shards.sources import Listing, Source
from shards.workers import Tick, run_tasks


@dataclass(frozen=True)
class Options:
    """What changes the bytes of a packing."""

    seed: int = 0  # of the order
    shard_size: int = 256_000_000  # bytes a tar at most, unless a single picture is larger
    name: str = "train"  # prefix of the tars


@dataclass(frozen=True)
class Plan:
    """Which source lies where, before anything is read: shard k holds ``order[cuts[k]:cuts[k + 1]]``."""

    order: np.ndarray  # [sources] int64: places in the sorted sources
    cuts: np.ndarray  # [shards + 1] int64
    fingerprint: str  # sha256 of the sources' names, sizes and labels, the classes and the options

    @property
    def shards(self) -> int:
        """How many shards."""
        return len(self.cuts) - 1


@dataclass(frozen=True)
class Packed:
    """What `pack` did."""

    manifest: Manifest
    was_complete: bool  # nothing was to do
    kept: int  # shards found finished
    judged: int  # pictures decoded in this run, the rejected ones included


def plan(listing: Listing, options: Options) -> Plan:
    """The plan for sorted sources: permuted by the seed, then cut where a shard would exceed `options.shard_size`.

    Raises UserError where more shards would come out than have names.
    """
    # Raw draws and a stable sort: numpy promises no version-independent stream for `permutation` itself.
    draws = np.random.PCG64(options.seed).random_raw(len(listing.sources))
    order = np.argsort(draws, kind="stable")
    sizes = np.fromiter((_tar_bytes(source) for source in listing.sources), np.int64, len(listing.sources))
    ends = np.cumsum(sizes[order]) + len(TAR_END)
    cuts = [0]
    while cuts[-1] < len(ends):
        start = cuts[-1]
        before = ends[start - 1] - len(TAR_END) if start else 0
        fitting = int(np.searchsorted(ends, before + options.shard_size, side="right"))
        cuts.append(max(fitting, start + 1))
    if len(cuts) - 1 > MAX_SHARDS:
        raise UserError(f"more than {MAX_SHARDS} shards would come out; use a larger --shard-size")
    return Plan(order, np.array(cuts, np.int64), _fingerprint(listing, options))


def _tar_bytes(source: Source) -> int:
    label = b"" if source.label == UNLABELLED else _label_text(source.label)
    return member_bytes(source.size) + (member_bytes(len(label)) if label else 0)


def _label_text(label: int) -> bytes:
    return str(label).encode()


def _fingerprint(listing: Listing, options: Options) -> str:
    head = [FORMAT_VERSION, listing.classes, options.seed, options.shard_size, options.name]
    digest = hashlib.sha256(json.dumps(head).encode())
    for source in listing.sources:
        digest.update(b"\0%b\0%d\0%d" % (os.fsencode(source.path), source.size, source.label))
    return digest.hexdigest()


class _Task(NamedTuple):
    number: int  # of the shard
    root: str
    out: Path
    name: str
    sources: list[tuple[int, Source]]  # place in the sorted sources, source; in the order of the tar


class _Done(NamedTuple):
    kept: bool
    judged: int


def pack(
    listing: Listing,
    out: str | os.PathLike[str],
    options: Options,
    workers: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Packed:
    """Pack a listing into the folder `out`, or go on where a killed run stopped; `progress` hears (done, total).

    Raises UserError for whatever the user can mend; then no manifest stands and the same call again goes on.
    """
    out = Path(out)
    _refuse_overlap(Path(listing.root), out)
    planned = plan(listing, options)
    with locked(out, "another make-shards is packing into it; wait, or choose another OUT"):
        manifest = folder.finished_or_claimed(out, planned.fingerprint)
        if manifest is not None:
            folder.remove_parts(out)  # a kill may have come between the manifest and this
            return Packed(manifest, True, planned.shards, 0)
        done = run_tasks(
            pack_shard,
            lambda number: _task(listing, out, options, planned, number),
            planned.shards,
            workers,
            lambda pictures: progress(pictures, len(listing.sources)),
        )
        manifest = _merge(listing, out, options, planned)
        folder.remove_parts(out)
    return Packed(manifest, False, sum(shard.kept for shard in done), sum(shard.judged for shard in done))


def _refuse_overlap(source: Path, out: Path) -> None:
    inner, outer = source.resolve(), out.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise UserError(f"SRC {source} and OUT {out} lie in one another; choose an OUT beside SRC")


def _task(listing: Listing, out: Path, options: Options, planned: Plan, number: int) -> _Task:
    places = planned.order[planned.cuts[number] : planned.cuts[number + 1]].tolist()
    return _Task(number, listing.root, out, options.name, [(place, listing.sources[place]) for place in places])


def pack_shard(task: _Task, tick: Tick) -> _Done:
    """Write one shard and its part, unless both are there and the tar's hash is the part's. Runs in a worker."""
    path = task.out / shard_name(task.name, task.number)
    if _is_kept(task, path, tick):
        tick(len(task.sources))
        return _Done(kept=True, judged=0)
    with folder.whole_file(task.out, path) as file:
        writer = _ShardWriter(file, task.number)
        for done, (place, source) in enumerate(task.sources):
            tick(done)
            writer.add(place, source, sources.read(task.root, source))
        part = writer.end()
    with folder.whole_file(task.out, folder.part_path(task.out, task.number)) as file:
        file.write(part.to_bytes())
    tick(len(task.sources))
    return _Done(kept=False, judged=len(task.sources))


def _is_kept(task: _Task, path: Path, tick: Tick) -> bool:
    part = folder.load_part(task.out, task.number)
    try:
        return part is not None and file_sha256(path, lambda: tick(0)) == part.sha256
    except OSError:
        return False


class _ShardWriter:
    """One tar as it grows: members in, records and rejections kept, every byte hashed once."""

    def __init__(self, file: BinaryIO, number: int) -> None:
        self._file = file
        self._number = number
        self._hash = hashlib.sha256()
        self._position = 0
        self._records: list[tuple[int, ...]] = []
        self._rejected: list[tuple[int, str]] = []

    def add(self, place: int, source: Source, data: bytes) -> None:
        """Append a sample, or note why not."""
        try:
            picture = decode(data)
        except UndecodableError as reason:
            self._rejected.append((place, str(reason)))
            return
        except MemoryError:
            raise UserError(f"not enough memory to decode {source.path}; use a smaller --workers") from None
        self._append(sample_key(place, source.path), source.label, data, picture)

    def _append(self, key: str, label: int, data: bytes, picture: Picture) -> None:
        header = tar_header(f"{key}.{picture.extension}", len(data))
        offset = self._position + len(header)
        size = (picture.height, picture.width)
        self._records.append((self._number, offset, len(data), *size, label, zlib.crc32(data)))
        members = [header, data, padding(len(data))]
        if label != UNLABELLED:
            text = _label_text(label)
            members += [tar_header(f"{key}.cls", len(text)), text, padding(len(text))]
        self._write(b"".join(members))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._position += len(data)

    def end(self) -> folder.Part:
        """Close the tar's structure; the file itself is the caller's."""
        self._write(TAR_END)
        records = np.array(self._records, RECORD)
        return folder.Part(self._hash.hexdigest(), self._position, records, self._rejected)


def _merge(listing: Listing, out: Path, options: Options, planned: Plan) -> Manifest:
    """The parts into the index, then the manifest. Raises UserError where not one picture decoded."""
    parts = [_part(out, number) for number in range(planned.shards)]
    rejected = [
        Rejected(listing.sources[place].path, reason)
        for place, reason in sorted(entry for part in parts for entry in part.rejected)
    ]
    if len(rejected) == len(listing.sources):
        folder.discard(out, options.name, planned.shards)
        raise UserError(
            f"{listing.root}: not one of {len(rejected)} pictures decodes "
            f"({rejected[0].source}: {rejected[0].reason}); give another SRC"
        )
    manifest = Manifest(
        name=options.name,
        fingerprint=planned.fingerprint,
        samples=len(listing.sources) - len(rejected),
        classes=listing.classes,
        options={"format": listing.format, "seed": options.seed, "shard_size": options.shard_size},
        shards=tuple(
            Shard(shard_name(options.name, number), len(part.records), part.length, part.sha256)
            for number, part in enumerate(parts)
        ),
        index_sha256=_write_index(out, np.concatenate([part.records for part in parts])),
        ignored=listing.ignored,
        rejected=tuple(rejected),
    )
    with folder.whole_file(out, out / MANIFEST_FILE) as file:
        file.write(manifest.to_json().encode())
    return manifest


def _part(out: Path, number: int) -> folder.Part:
    part = folder.load_part(out, number)
    if part is None:
        raise UserError(f"{folder.part_path(out, number)} is gone or damaged; run the same command again")
    return part


def _write_index(out: Path, records: np.ndarray) -> str:
    """Write ``index.npy``; its sha256."""
    with folder.whole_file(out, out / INDEX_FILE) as file:
        np.lib.format.write_array(file, records, version=(1, 0), allow_pickle=False)
    return file_sha256(out / INDEX_FILE)
