"""Index and manifest for tars that somebody else made. The tars themselves are only read."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from shards.errors import UserError
from shards.images.decode import UndecodableError
from shards.images.validate import Judge, condemn
from shards.layout import (
    DUPLICATES_FILE,
    FORMAT_VERSION,
    INDEX_FILE,
    MANIFEST_FILE,
    PARTS,
    REJECTED_FILE,
    Manifest,
)
from shards.packing import parts
from shards.packing.assembly import NothingLeftError, assemble
from shards.packing.workers import Tick, run_tasks
from shards.sources.listing import Listing, Source
from shards.storage.output import Folder
from shards.storage.sequential import SequentialReader

_ANEW = "to index it anew, remove " + ", ".join((MANIFEST_FILE, INDEX_FILE, REJECTED_FILE, DUPLICATES_FILE, PARTS))


class _Task(NamedTuple):
    number: int  # of the tar
    folder: Folder
    file: str
    judge: Judge
    sources: list[tuple[int, Source]]  # place in the listing, source; in the order of the tar
    condemned: frozenset[int] = frozenset()  # places in `sources` that took too long


def index(
    listing: Listing,
    folder: Folder,
    judge: Judge,
    processes: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Describe the tars of a folder that is held, as `listing` found them in it; a restart goes on.

    Raises UserError for a folder that holds a packing, and where not one picture decodes.
    """
    fingerprint = _fingerprint(listing, judge)
    manifest = parts.finished(folder, fingerprint, _ANEW)
    if manifest is None:
        if not parts.claimed(folder, fingerprint, _ANEW):
            parts.refuse_tables(folder, _ANEW)
            parts.claim(folder, fingerprint)
        tars = len(listing.containers)
        # A listing of tars has their pictures tar by tar.
        starts = np.searchsorted(listing.rows["container"], np.arange(tars + 1)).tolist()
        run_tasks(
            index_shard,
            lambda number: _task(listing, folder, judge, number, range(starts[number], starts[number + 1])),
            tars,
            processes,
            lambda pictures: progress(pictures, len(listing)),
            condemn,
        )
        manifest = _assembled(listing, folder, judge, fingerprint)
    folder.remove_parts()
    return manifest


def _fingerprint(listing: Listing, judge: Judge) -> str:
    head = [FORMAT_VERSION, listing.classes, dataclasses.asdict(judge), [_file(path) for path in listing.containers]]
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for column in (listing.rows["container"], listing.rows["offset"], listing.sizes, listing.labels):
        digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()


def _file(path: str) -> str:
    return PurePosixPath(path).name


def _task(listing: Listing, folder: Folder, judge: Judge, number: int, places: range) -> _Task:
    sources = [(place, listing.source(place)) for place in places]
    return _Task(number, folder, _file(listing.containers[number]), judge, sources)


def index_shard(task: _Task, tick: Tick) -> None:
    """Read one tar from end to end and leave its part, unless a part of the same tar is there. Runs in a worker."""
    part = parts.load_part(task.folder, task.number)
    if part is None or task.folder.sha256(task.file, lambda: tick(0)) != part.sha256:
        with task.folder.open(task.file) as file:
            part = _described(task, SequentialReader(file), tick)
        parts.store_part(task.folder, task.number, part)
    tick(len(task.sources))


def _described(task: _Task, reader: SequentialReader, tick: Tick) -> parts.Part:
    collected = parts.Collector()
    for done, (place, source) in enumerate(task.sources):
        tick(done)
        try:
            task.judge.refuse(source.size, overran=done in task.condemned)
            reader.skip_to(source.offset)
            data = reader.take(source.size)
            picture = task.judge.picture(data)
        except UndecodableError as reason:
            collected.reject(place, source.name, str(reason))
        else:
            collected.keep(source.name, data, picture, source.offset, source.label)
    while reader.take(1 << 20):
        tick(len(task.sources))
    return collected.part(task.file, reader.digest.hexdigest(), reader.position)


def _assembled(listing: Listing, folder: Folder, judge: Judge, fingerprint: str) -> Manifest:
    try:
        return assemble(
            folder,
            len(listing.containers),
            name=_file(listing.containers[0]).partition(".")[0],
            fingerprint=fingerprint,
            classes=listing.classes,
            options={"format": listing.format, **dataclasses.asdict(judge)},
            ignored=listing.ignored,
            foreign=True,
        )
    except NothingLeftError as error:
        folder.remove_parts()
        _, name, reason = error.rejected[0]
        raise UserError(f"{folder}: not one of {len(listing)} pictures decodes ({name}: {reason})") from None
