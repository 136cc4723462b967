"""Write index and manifest for tars of another program. The tars themselves are only read."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from shards.errors import UserError
from shards.images.image_info import UndecodableError
from shards.images.rules import ImageRules
from shards.layout import DUPLICATES_FILE, FORMAT_VERSION, INDEX_FILE, MANIFEST_FILE, PARTS_FOLDER, REJECTED_FILE
from shards.manifest import Manifest
from shards.packing import ownership
from shards.packing.assembly import NothingPackedError, write_index_and_manifest
from shards.packing.partial_index import PartialIndex, PartialIndexBuilder, load_partial_index, store_partial_index
from shards.packing.workers import Tick, mark_as_timed_out, run_tasks
from shards.sources.listing import ImageSource, Listing
from shards.storage.folders import Folder
from shards.storage.hashing import HashingReader

_OLD_INDEX = ", ".join((MANIFEST_FILE, INDEX_FILE, REJECTED_FILE, DUPLICATES_FILE, PARTS_FOLDER))
_REMOVE_INDEX = f"To index it again, remove {_OLD_INDEX}."


class _Task(NamedTuple):
    """One tar to describe."""

    number: int
    """number of the tar"""
    folder: Folder
    """folder that it lies in"""
    file: str
    """its file name"""
    rules: ImageRules
    """which images become samples"""
    sources: list[tuple[int, ImageSource]]
    """position in the listing and image, in the order of the tar"""
    timed_out: frozenset[int] = frozenset()
    """positions in `sources` of images that took too long"""


def index_tars(
    listing: Listing,
    folder: Folder,
    rules: ImageRules,
    processes: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Write index and manifest for the tars of a folder that the caller has locked, or go on where a run stopped.

    `listing` is what was found in them. Raises UserError for a folder that holds a packing, and where not one image can
    be decoded.
    """
    fingerprint = _compute_fingerprint(listing, rules)
    manifest = ownership.load_finished(folder, fingerprint, _REMOVE_INDEX)
    if manifest is None:
        if not ownership.is_claimed(folder, fingerprint, _REMOVE_INDEX):
            ownership.refuse_index_files(folder, _REMOVE_INDEX)
            ownership.claim(folder, fingerprint)
        tars = len(listing.containers)
        # A listing of tars has their images tar by tar.
        starts = np.searchsorted(listing.rows["container"], np.arange(tars + 1)).tolist()
        run_tasks(
            _index_tar,
            lambda number: _make_task(listing, folder, rules, number, range(starts[number], starts[number + 1])),
            tars,
            processes,
            lambda images: progress(images, len(listing)),
            mark_as_timed_out,
        )
        manifest = _write_index(listing, folder, rules, fingerprint)
    folder.remove_parts()
    return manifest


def _compute_fingerprint(listing: Listing, rules: ImageRules) -> str:
    names = [_get_file_name(path) for path in listing.containers]
    head = [FORMAT_VERSION, listing.classes, dataclasses.asdict(rules), names]
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for column in (listing.rows["container"], listing.rows["offset"], listing.sizes, listing.labels):
        digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()


def _get_file_name(path: str) -> str:
    return PurePosixPath(path).name


def _make_task(listing: Listing, folder: Folder, rules: ImageRules, number: int, places: range) -> _Task:
    sources = [(place, listing.get_source(place)) for place in places]
    return _Task(number, folder, _get_file_name(listing.containers[number]), rules, sources)


def _index_tar(task: _Task, tick: Tick) -> None:
    """Read one tar from end to end and store its partial index, unless that is there. Runs in a worker."""
    part = load_partial_index(task.folder, task.number)
    if part is None or task.folder.hash_file(task.file, lambda: tick(0)) != part.sha256:
        with task.folder.open(task.file) as file:
            part = _describe_tar(task, HashingReader(file), tick)
        store_partial_index(task.folder, task.number, part)
    tick(len(task.sources))


def _describe_tar(task: _Task, reader: HashingReader, tick: Tick) -> PartialIndex:
    builder = PartialIndexBuilder()
    for done, (place, source) in enumerate(task.sources):
        tick(done)
        try:
            task.rules.refuse_unread(source.size, timed_out=done in task.timed_out)
            reader.skip_to(source.offset)
            data = reader.read(source.size)
            info = task.rules.validate(data)
        except UndecodableError as reason:
            builder.add_rejected(place, source.name, str(reason))
        else:
            builder.add_sample(source.name, data, info, source.offset, source.label)
    while reader.read(1 << 20):
        tick(len(task.sources))
    return builder.finish(task.file, reader.digest.hexdigest(), reader.position)


def _write_index(listing: Listing, folder: Folder, rules: ImageRules, fingerprint: str) -> Manifest:
    try:
        return write_index_and_manifest(
            folder,
            len(listing.containers),
            name=_get_file_name(listing.containers[0]).partition(".")[0],
            fingerprint=fingerprint,
            classes=listing.classes,
            options={"format": listing.format, **dataclasses.asdict(rules)},
            ignored=listing.ignored,
            foreign=True,
        )
    except NothingPackedError as error:
        folder.remove_parts()
        _, name, reason = error.rejected[0]
        raise UserError(
            f"{folder}: none of {len(listing)} images can be decoded ({name}: {reason}). Give another DIR."
        ) from None
