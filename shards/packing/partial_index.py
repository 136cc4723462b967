"""The partial index of one finished shard, stored in ``.parts`` until the index of the whole folder is written."""

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Sequence

import numpy as np

from shards.counts import Counts
from shards.images.exif import AS_STORED
from shards.images.image_info import ImageInfo
from shards.layout import PARTS_FOLDER, RECORD
from shards.storage.folders import Folder

DIGEST = np.dtype("V16")  # the first half of a payload's sha256


@dataclasses.dataclass(frozen=True)
class PartialIndex:
    """What is known about one finished shard."""

    file: str
    """file name of the tar"""
    sha256: str
    """sha256 of the tar, hexadecimal"""
    length: int
    """bytes of the tar"""
    records: np.ndarray
    """[samples] of RECORD"""
    digests: np.ndarray
    """[samples] of DIGEST"""
    names: Sequence[str]
    """[samples]: paths in the source"""
    rejected: Sequence[tuple[int, str, str]]
    """rejected images: position in the source, path in the source, reason"""
    counts: Counts
    """what is worth knowing of the images"""

    def to_bytes(self) -> bytes:
        """Return a line of JSON, then the arrays."""
        arrays = self.records.tobytes() + self.digests.tobytes()
        head = {
            "file": self.file,
            "sha256": self.sha256,
            "length": self.length,
            "samples": len(self.records),
            "arrays_sha256": hashlib.sha256(arrays).hexdigest(),
            "names": list(self.names),
            "rejected": list(self.rejected),
            "counts": self.counts.to_dict(),
        }
        return json.dumps(head).encode() + b"\n" + arrays

    @classmethod
    def from_bytes(cls, data: bytes) -> "PartialIndex":
        """Read what `to_bytes` wrote. Raises ValueError, KeyError or TypeError for anything else."""
        line, _, arrays = data.partition(b"\n")
        head = json.loads(line)
        if hashlib.sha256(arrays).hexdigest() != head["arrays_sha256"]:
            raise ValueError("damaged")
        cut = int(head["samples"]) * RECORD.itemsize
        records, digests = np.frombuffer(arrays[:cut], RECORD), np.frombuffer(arrays[cut:], DIGEST)
        rejected = [(int(place), str(name), str(reason)) for place, name, reason in head["rejected"]]
        counts = Counts(**head["counts"])
        return cls(head["file"], head["sha256"], head["length"], records, digests, head["names"], rejected, counts)


class PartialIndexBuilder:
    """Collects a partial index image by image."""

    def __init__(self) -> None:
        self._records: list[tuple[int, ...]] = []
        self._digests: list[bytes] = []
        self._names: list[str] = []
        self._rejected: list[tuple[int, str, str]] = []
        self._counts = Counts()

    def add_sample(self, name: str, data: bytes, info: ImageInfo, offset: int, label: int) -> None:
        """Add a sample whose payload `data` lies at `offset` of the tar.

        The number of its shard is not known before all shards are done.
        """
        self._records.append((0, offset, len(data), info.height, info.width, label, zlib.crc32(data)))
        self._digests.append(hashlib.sha256(data).digest()[: DIGEST.itemsize])
        self._names.append(name)
        turned = int(info.orientation != AS_STORED)
        self.count(Counts(turned_in_training=turned, gray16=int(info.gray16), gray16_largest=info.largest))

    def count(self, counts: Counts) -> None:
        """Add what is worth knowing of a sample besides its own info."""
        if counts != Counts():
            self._counts += counts

    def add_rejected(self, place: int, name: str, reason: str) -> None:
        """Add an image that was not packed."""
        self._rejected.append((place, name, reason))

    def finish(self, file: str, sha256: str, length: int) -> PartialIndex:
        """Return the partial index of the finished tar."""
        records, digests = np.array(self._records, RECORD), np.frombuffer(b"".join(self._digests), DIGEST)
        return PartialIndex(file, sha256, length, records, digests, self._names, self._rejected, self._counts)


def make_part_name(number: int) -> str:
    """Return the name of the file that holds the partial index of shard `number`."""
    return f"{PARTS_FOLDER}/{number:06d}.part"


def load_partial_index(out: Folder, number: int) -> PartialIndex | None:
    """Return the partial index of shard `number`, or None where it is missing or damaged. Then the shard is redone."""
    try:
        return PartialIndex.from_bytes(out.read(make_part_name(number)))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def store_partial_index(out: Folder, number: int, part: PartialIndex) -> None:
    """Write the partial index of shard `number`."""
    with out.write_file(make_part_name(number)) as file:
        file.write(part.to_bytes())
