"""The parts of all shards into the index, the lists for people and, last, the manifest."""

import csv
import hashlib
import io
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from shards.errors import UserError
from shards.layout import (
    DUPLICATES_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    RECORD,
    REJECTED_FILE,
    Manifest,
    Rejected,
    Shard,
)
from shards.packing.parts import Part, load_part, part_name
from shards.storage.output import Folder


def assemble(
    out: Folder,
    shards: int,
    *,
    name: str,
    fingerprint: str,
    classes: tuple[str, ...],
    options: dict[str, Any],
    ignored: int,
    foreign: bool = False,
) -> Manifest:
    """Write what stands beside the tars; a tar of ours without a sample goes. The parts are read one at a time.

    Raises NothingLeftError where not one picture is left, and UserError where a part is gone.
    """
    summary = _Summary(keeps_empty=foreign)
    for part in _parts(out, shards):
        summary.add(part)
    if not summary.samples:
        raise NothingLeftError(summary.rejected)
    in_index = (part for part in _parts(out, shards) if part.file not in summary.empty)
    index_sha256 = _write_index(out, in_index, summary.samples)
    duplicates = _write_table(
        out, DUPLICATES_FILE, ("picture", "same_bytes_as"), _duplicates(_parts(out, shards), summary.repeated())
    )
    rejected = [Rejected(source, reason) for _, source, reason in sorted(summary.rejected)]
    _write_table(out, REJECTED_FILE, ("picture", "reason"), ((entry.source, entry.reason) for entry in rejected))
    manifest = Manifest(
        name=name,
        fingerprint=fingerprint,
        samples=summary.samples,
        classes=classes,
        options=options,
        shards=tuple(summary.shards),
        index_sha256=index_sha256,
        ignored=ignored,
        rejected=tuple(rejected),
        duplicates=duplicates,
        foreign=foreign,
        tables={file: out.sha256(file) or "" for file in (DUPLICATES_FILE, REJECTED_FILE)},
    )
    for file in summary.empty:  # DALI's own reader would count a sample in it
        out.remove(file)
    with out.whole_file(MANIFEST_FILE) as file_:
        file_.write(manifest.to_json().encode())
    return manifest


class NothingLeftError(Exception):
    """Not one picture was kept; holds what was rejected: (place, source, reason)."""

    def __init__(self, rejected: list[tuple[int, str, str]]) -> None:
        super().__init__("nothing left")
        self.rejected = sorted(rejected)


class _Summary:
    """What the manifest says of the parts. Eight bytes a sample are held, to find duplicates by."""

    def __init__(self, *, keeps_empty: bool) -> None:
        self.samples = 0
        self.shards: list[Shard] = []
        self.empty: list[str] = []
        self.rejected: list[tuple[int, str, str]] = []
        self._marks: list[np.ndarray] = []
        self._keeps_empty = keeps_empty

    def add(self, part: Part) -> None:
        self.rejected += part.rejected
        if not len(part.records) and not self._keeps_empty:
            self.empty.append(part.file)
            return
        self.samples += len(part.records)
        self.shards.append(Shard(part.file, len(part.records), part.length, part.sha256))
        self._marks.append(_marks(part))

    def repeated(self) -> np.ndarray:
        """The sorted marks that more than one sample bears."""
        marks = np.sort(np.concatenate(self._marks))
        return np.unique(marks[1:][marks[1:] == marks[:-1]])


def _marks(part: Part) -> np.ndarray:
    """[samples] uint64: the first 8 bytes of the digests. Samples of one mark are nearly certainly duplicates."""
    return np.ascontiguousarray(part.digests.view("<u8").reshape(-1, 2)[:, 0])


def _parts(out: Folder, shards: int) -> Iterator[Part]:
    for number in range(shards):
        part = load_part(out, number)
        if part is None:
            raise UserError(f"{out}/{part_name(number)} is gone or damaged; run the same command again")
        yield part


def _write_index(out: Folder, parts: Iterable[Part], samples: int) -> str:
    """Write ``index.npy``; its sha256."""
    digest = hashlib.sha256()
    with out.whole_file(INDEX_FILE) as file:
        for block in _index_blocks(parts, samples):
            file.write(block)
            digest.update(block)
    return digest.hexdigest()


def _index_blocks(parts: Iterable[Part], samples: int) -> Iterator[bytes]:
    header = io.BytesIO()
    description = np.lib.format.header_data_from_array_1_0(np.empty(0, RECORD))
    np.lib.format.write_array_header_1_0(header, {**description, "shape": (samples,)})
    yield header.getvalue()
    for shard, part in enumerate(parts):
        records = part.records.copy()
        records["shard"] = shard
        yield records.tobytes()


def _duplicates(parts: Iterable[Part], repeated: np.ndarray) -> Iterator[tuple[str, str]]:
    """(picture, the first one with the same bytes), in the order of the shards."""
    first: dict[bytes, str] = {}
    for part in parts:
        for row in np.flatnonzero(np.isin(_marks(part), repeated)).tolist():
            name = part.names[row]
            earlier = first.setdefault(part.digests[row].tobytes(), name)
            if earlier is not name:
                yield name, earlier


def _write_table(out: Folder, file_name: str, head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> int:
    """Write a CSV file, bytes of names that are no UTF-8 as \\udcXX; how many rows."""
    count = 0
    with out.whole_file(file_name) as file:
        text = io.TextIOWrapper(file, "utf-8", errors="backslashreplace", newline="", write_through=True)
        table = csv.writer(text, lineterminator="\n")
        table.writerow(head)
        for row in rows:
            table.writerow(row)
            count += 1
        text.detach()
    return count
