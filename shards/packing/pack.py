"""Pictures into tar shards: a plan, one task a shard in worker processes, then the index and, last, the manifest.

Everything written is a pure function of the listed sources and the options: the number of workers, the engine, a kill
in the middle and a restart change no byte.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from shards.errors import UserError
from shards.images.decode import Picture, UndecodableError, measure
from shards.images.reencode import shrink
from shards.images.validate import Judge, condemn
from shards.layout import (
    BLOCK,
    FORMAT_VERSION,
    MAX_SHARDS,
    TAR_END,
    UNLABELLED,
    Manifest,
    member_bytes,
    padding,
    sample_key,
    shard_name,
    tar_header,
)
from shards.packing import parts, workers
from shards.packing.assembly import NothingLeftError, assemble
from shards.packing.workers import Tick, cpu_limit
from shards.sources.listing import Listing, Source
from shards.sources.read_image import read
from shards.sources.subset import draws
from shards.sources.zips import DamagedError
from shards.storage import files
from shards.storage.output import Folder

TAKEN = "another make-shards is at work in it; wait, or choose another folder"
_ORDER = 0  # use of the seed

Engine = Callable[..., list[Any]]  # called as `workers.run_tasks` is


@dataclass(frozen=True)
class Options:
    """What changes the bytes of a packing."""

    seed: int = 0  # of the order
    shard_size: int = 256_000_000  # bytes a tar at most, unless a single picture is larger
    name: str = "train"  # prefix of the tars
    judge: Judge = field(default_factory=Judge)
    max_short_side: int | None = None  # pixels; larger pictures are re-encoded
    quality: int = 92  # of re-encoded JPEGs


@dataclass(frozen=True)
class Plan:
    """Which source lies where, before anything is read: shard k holds ``order[cuts[k]:cuts[k + 1]]``."""

    order: np.ndarray  # [sources] int64: places in the listing
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
    """The plan for a listing: permuted by the seed, then cut where a shard would exceed `options.shard_size`.

    Raises UserError where more shards would come out than have names.
    """
    order = np.argsort(draws(options.seed, _ORDER, len(listing)), kind="stable")
    ends = np.cumsum(_tar_bytes(listing)[order])
    cuts = [0]
    while cuts[-1] < len(ends):
        start = cuts[-1]
        before = int(ends[start - 1]) if start else 0
        fitting = int(np.searchsorted(ends, before + options.shard_size - len(TAR_END), side="right"))
        cuts.append(max(fitting, start + 1))
    if len(cuts) - 1 > MAX_SHARDS:
        raise UserError(f"more than {MAX_SHARDS} shards would come out; use a larger --shard-size")
    return Plan(order, np.array(cuts, np.int64), _fingerprint(listing, options))


def _tar_bytes(listing: Listing) -> np.ndarray:
    """[sources] int64: bytes in a tar, with the label's member."""
    total = (listing.sizes.astype(np.int64) + (BLOCK - 1)) // BLOCK
    total += 1  # the header
    total *= BLOCK
    total[listing.labels != UNLABELLED] += member_bytes(1)
    return total


def _label_text(label: int) -> bytes:
    return str(label).encode()


def _fingerprint(listing: Listing, options: Options) -> str:
    head = [FORMAT_VERSION, listing.classes, dataclasses.asdict(options)]
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for column in (listing.rows["length"], listing.sizes, listing.labels):
        digest.update(np.ascontiguousarray(column).data)
    for name in listing.names():
        digest.update(name)
    return digest.hexdigest()


class _Task(NamedTuple):
    number: int  # of the shard
    out: Folder
    options: Options
    sources: list[tuple[int, Source]]  # place in the listing, source; in the order of the tar
    condemned: frozenset[int] = frozenset()  # places in `sources` that took too long


class _Done(NamedTuple):
    kept: bool
    judged: int


def pack(
    listing: Listing,
    out: Folder,
    options: Options,
    processes: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    run: Engine = workers.run_tasks,
) -> Packed:
    """Pack a listing into a folder that is held, or go on where a killed run stopped; `progress` hears (done, total).

    Raises UserError for whatever the user can mend; then no manifest stands and the same call again goes on.
    """
    planned = plan(listing, options)
    manifest = parts.finished(out, planned.fingerprint)
    if manifest is not None:
        out.remove_parts()  # a kill may have come between the manifest and this
        return Packed(manifest, True, planned.shards, 0)
    if not parts.claimed(out, planned.fingerprint):
        parts.refuse_foreign(out)
        parts.claim(out, planned.fingerprint)
    done = run(
        pack_shard,
        lambda number: _task(listing, out, options, planned, number),
        planned.shards,
        processes,
        lambda pictures: progress(pictures, len(listing)),
        condemn,
    )
    manifest = _assembled(listing, out, options, planned)
    out.remove_parts()
    return Packed(manifest, False, sum(shard.kept for shard in done), sum(shard.judged for shard in done))


def refuse_overlap(source: str, out: str) -> None:
    """Raises UserError where SRC and OUT lie in one another."""
    inner, outer = map(_place, (source, out))
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise UserError(f"SRC {source} and OUT {out} lie in one another; choose an OUT beside SRC")


def _place(path: str) -> PurePath:
    """The same for the same place: stores have more than one scheme, files more than one path."""
    if not files.is_url(path):
        return Path(path).resolve()
    scheme, _, rest = path.partition("://")
    return PurePosixPath({"s3a": "s3", "gcs": "gs"}.get(scheme, scheme), rest)


def _task(listing: Listing, out: Folder, options: Options, planned: Plan, number: int) -> _Task:
    places = planned.order[planned.cuts[number] : planned.cuts[number + 1]].tolist()
    return _Task(number, out, options, [(place, listing.source(place)) for place in places])


def pack_shard(task: _Task, tick: Tick) -> _Done:
    """Write one shard and its part, unless both are there and the tar's hash is the part's. Runs in a worker."""
    file_name = shard_name(task.options.name, task.number)
    if _is_kept(task, file_name, tick):
        tick(len(task.sources))
        return _Done(kept=True, judged=0)
    with task.out.whole_file(file_name) as file:
        writer = _ShardWriter(file, file_name, task.options)
        for done, (place, source) in enumerate(task.sources):
            tick(done)
            writer.add(place, source, overran=done in task.condemned)
        part = writer.end()
    parts.store_part(task.out, task.number, part)
    tick(len(task.sources))
    return _Done(kept=False, judged=len(task.sources))


def _is_kept(task: _Task, file_name: str, tick: Tick) -> bool:
    part = parts.load_part(task.out, task.number)
    return part is not None and task.out.sha256(file_name, lambda: tick(0)) == part.sha256


class _ShardWriter:
    """One tar as it grows: members in, samples and rejections collected, every byte of the tar hashed once."""

    def __init__(self, file: BinaryIO, file_name: str, options: Options) -> None:
        self._file = file
        self._file_name = file_name
        self._options = options
        self._hash = hashlib.sha256()
        self._position = 0
        self._collected = parts.Collector()

    def add(self, place: int, source: Source, *, overran: bool) -> None:
        """Append a sample, or note why not."""
        try:
            self._options.judge.refuse(source.size, overran=overran)
            data, picture = _judged(source, self._options)
        except (UndecodableError, DamagedError) as reason:
            self._collected.reject(place, source.name, str(reason))
        except MemoryError:
            raise UserError(f"not enough memory to decode {source.name}; use a smaller --workers") from None
        else:
            self._append(sample_key(place, source.name), source, data, picture)

    def _append(self, key: str, source: Source, data: bytes, picture: Picture) -> None:
        header = tar_header(f"{key}.{picture.extension}", len(data))
        self._collected.keep(source.name, data, picture, self._position + len(header), source.label)
        self._write(header, data, padding(len(data)))
        if source.label != UNLABELLED:
            text = _label_text(source.label)
            self._write(tar_header(f"{key}.cls", len(text)), text, padding(len(text)))

    def _write(self, *blocks: bytes) -> None:
        data = b"".join(blocks)
        self._file.write(data)
        self._hash.update(data)
        self._position += len(data)

    def end(self) -> parts.Part:
        """Close the tar's structure; the file itself is the caller's."""
        self._write(TAR_END)
        return self._collected.part(self._file_name, self._hash.hexdigest(), self._position)


def _judged(source: Source, options: Options) -> tuple[bytes, Picture]:
    """The bytes to pack and what they are. Raises UndecodableError or DamagedError with the reason why not."""
    data = read(source)
    picture = options.judge.picture(data)
    if options.max_short_side is None or min(picture.height, picture.width) <= options.max_short_side:
        return data, picture
    with cpu_limit(options.judge.picture_seconds):
        data = shrink(data, picture, options.max_short_side, options.quality)
    return data, measure(data, options.judge.max_pixels)


def _assembled(listing: Listing, out: Folder, options: Options, planned: Plan) -> Manifest:
    """The index and the manifest; a packing without a picture goes, with a UserError that says so."""
    recorded = {"format": listing.format, **dataclasses.asdict(options), **dataclasses.asdict(options.judge)}
    del recorded["name"], recorded["judge"]
    try:
        return assemble(
            out,
            planned.shards,
            name=options.name,
            fingerprint=planned.fingerprint,
            classes=listing.classes,
            options=recorded,
            ignored=listing.ignored,
        )
    except NothingLeftError as error:
        for number in range(planned.shards):
            out.remove(shard_name(options.name, number))
        out.remove_parts()
        _, name, reason = error.rejected[0]
        raise UserError(
            f"{listing.root}: not one of {len(listing)} pictures decodes ({name}: {reason}); give another SRC"
        ) from None
