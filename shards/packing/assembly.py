"""Write what stands beside the shards: the index, the CSV files for people and, last, the manifest."""

import csv
import hashlib
import io
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from shards.counts import Counts
from shards.errors import UserError
from shards.layout import DUPLICATES_FILE, INDEX_FILE, MANIFEST_FILE, RECORD, REJECTED_FILE
from shards.manifest import Manifest, Rejected, Shard
from shards.packing.partial_index import PartialIndex, load_partial_index, make_part_name
from shards.storage.folders import Folder


class NothingPackedError(Exception):
    """Not one image was packed. `rejected` holds (position, source, reason) of each."""

    def __init__(self, rejected: list[tuple[int, str, str]]) -> None:
        super().__init__("no image was packed")
        self.rejected = sorted(rejected)


class SomeRejectedError(Exception):
    """Some images were rejected where none may be. ``rejected.csv`` has them all."""

    def __init__(self, rejected: tuple[Rejected, ...]) -> None:
        super().__init__("images were rejected")
        self.rejected = rejected


def write_index_and_manifest(
    out: Folder,
    shard_count: int,
    *,
    name: str,
    fingerprint: str,
    classes: tuple[str, ...],
    options: dict[str, Any],
    ignored: int,
    foreign: bool = False,
    left_out: Iterable[tuple[str, str]] = (),
    strict: bool = False,
) -> Manifest:
    """Join the partial indexes of all shards, which are read one at a time. A tar of ours without a sample is removed.

    `left_out` has the path and reason of images that were in no shard's task. They come first among the rejected. The
    arguments before it are fields of the manifest. Raises NothingPackedError where not one image is left,
    SomeRejectedError, before the index is written, where images were rejected and `strict` is set, and UserError where
    a partial index is missing.
    """
    summary = _Summary(keeps_empty=foreign)
    for part in _load_parts(out, shard_count):
        summary.add(part)
    if not summary.samples:
        raise NothingPackedError(summary.rejected)
    rejected = tuple(Rejected(*entry) for entry in (*left_out, *(named for _, *named in sorted(summary.rejected))))
    _write_table(out, REJECTED_FILE, ("image", "reason"), ((entry.source, entry.reason) for entry in rejected))
    if strict and rejected:
        raise SomeRejectedError(rejected)
    not_empty = (part for part in _load_parts(out, shard_count) if part.file not in summary.empty)
    index_sha256 = _write_index(out, not_empty, summary.samples)
    repeated = _find_duplicates(_load_parts(out, shard_count), summary.find_repeated_marks())
    duplicates = _write_table(out, DUPLICATES_FILE, ("image", "same_bytes_as"), repeated)
    manifest = Manifest(
        name=name,
        fingerprint=fingerprint,
        samples=summary.samples,
        classes=classes,
        options=options,
        shards=tuple(summary.shards),
        index_sha256=index_sha256,
        ignored=ignored,
        rejected=rejected,
        duplicates=duplicates,
        foreign=foreign,
        counts=summary.counts,
        tables={file: out.hash_file(file) or "" for file in (DUPLICATES_FILE, REJECTED_FILE)},
    )
    for file in summary.empty:  # DALI's own reader would count a sample in it
        out.remove(file)
    with out.write_file(MANIFEST_FILE) as file_:
        file_.write(manifest.to_json().encode())
    return manifest


class _Summary:
    """Collects what the manifest says about all shards. It takes eight bytes per sample, to find duplicates by."""

    def __init__(self, *, keeps_empty: bool) -> None:
        self.samples = 0
        self.shards: list[Shard] = []
        self.empty: list[str] = []  # file names of tars without a sample
        self.rejected: list[tuple[int, str, str]] = []
        self.counts = Counts()
        self._marks: list[np.ndarray] = []
        self._keeps_empty = keeps_empty

    def add(self, part: PartialIndex) -> None:
        self.rejected += part.rejected
        self.counts += part.counts
        if not len(part.records) and not self._keeps_empty:
            self.empty.append(part.file)
            return
        self.samples += len(part.records)
        self.shards.append(Shard(part.file, len(part.records), part.length, part.sha256))
        self._marks.append(_get_marks(part))

    def find_repeated_marks(self) -> np.ndarray:
        """Return the sorted marks that more than one sample has."""
        marks = np.sort(np.concatenate(self._marks))
        return np.unique(marks[1:][marks[1:] == marks[:-1]])


def _get_marks(part: PartialIndex) -> np.ndarray:
    """Return the first 8 bytes of the digests, [samples] uint64. Samples with the same mark are probably duplicates."""
    return np.ascontiguousarray(part.digests.view("<u8").reshape(-1, 2)[:, 0])


def _load_parts(out: Folder, shard_count: int) -> Iterator[PartialIndex]:
    for number in range(shard_count):
        part = load_partial_index(out, number)
        if part is None:
            raise UserError(f"{out}/{make_part_name(number)} is missing or damaged. Run the same command again.")
        yield part


def _write_index(out: Folder, parts: Iterable[PartialIndex], samples: int) -> str:
    """Write ``index.npy`` and return its sha256."""
    digest = hashlib.sha256()
    with out.write_file(INDEX_FILE) as file:
        for block in _make_index_blocks(parts, samples):
            file.write(block)
            digest.update(block)
    return digest.hexdigest()


def _make_index_blocks(parts: Iterable[PartialIndex], samples: int) -> Iterator[bytes]:
    header = io.BytesIO()
    description = np.lib.format.header_data_from_array_1_0(np.empty(0, RECORD))
    np.lib.format.write_array_header_1_0(header, {**description, "shape": (samples,)})
    yield header.getvalue()
    for shard, part in enumerate(parts):
        records = part.records.copy()
        records["shard"] = shard
        yield records.tobytes()


def _find_duplicates(parts: Iterable[PartialIndex], repeated_marks: np.ndarray) -> Iterator[tuple[str, str]]:
    """Yield (image, the first one with the same bytes), in the order of the shards."""
    first: dict[bytes, str] = {}
    for part in parts:
        for row in np.flatnonzero(np.isin(_get_marks(part), repeated_marks)).tolist():
            name = part.names[row]
            earlier = first.setdefault(part.digests[row].tobytes(), name)
            if earlier is not name:
                yield name, earlier


def _write_table(out: Folder, file_name: str, head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> int:
    """Write a CSV file and return the number of its rows. Bytes of names that are not UTF-8 are written as \\udcXX."""
    count = 0
    with out.write_file(file_name) as file:
        text = io.TextIOWrapper(file, "utf-8", errors="backslashreplace", newline="", write_through=True)
        table = csv.writer(text, lineterminator="\n")
        table.writerow(head)
        for row in rows:
            table.writerow(row)
            count += 1
        text.detach()
    return count
