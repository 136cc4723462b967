"""What finished shards leave for the index and the manifest, and whose packing a folder holds."""

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Sequence

import numpy as np

from shards.errors import UserError
from shards.images.structure import Picture
from shards.layout import (
    DUPLICATES_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    PARTS,
    PLAN_FILE,
    RECORD,
    REJECTED_FILE,
    Manifest,
    load_manifest,
    size_problem,
)
from shards.storage.files import is_url
from shards.storage.output import Folder

OTHER_OUT = "choose another OUT, or remove it first"
DIGEST = np.dtype("V16")  # the first half of a payload's sha256


@dataclasses.dataclass(frozen=True)
class Part:
    """What one finished shard leaves."""

    file: str  # of the tar
    sha256: str  # of the tar
    length: int  # of the tar, bytes
    records: np.ndarray  # [samples] of RECORD
    digests: np.ndarray  # [samples] of DIGEST
    names: Sequence[str]  # [samples]: paths in the source
    rejected: Sequence[tuple[int, str, str]]  # place in the source, path in the source, reason

    def to_bytes(self) -> bytes:
        """A line of JSON, then the arrays."""
        arrays = self.records.tobytes() + self.digests.tobytes()
        head = {
            "file": self.file,
            "sha256": self.sha256,
            "length": self.length,
            "samples": len(self.records),
            "arrays_sha256": hashlib.sha256(arrays).hexdigest(),
            "names": list(self.names),
            "rejected": list(self.rejected),
        }
        return json.dumps(head).encode() + b"\n" + arrays

    @classmethod
    def from_bytes(cls, data: bytes) -> "Part":
        """Read what `to_bytes` wrote. Raises ValueError, KeyError or TypeError for anything else."""
        line, _, arrays = data.partition(b"\n")
        head = json.loads(line)
        if hashlib.sha256(arrays).hexdigest() != head["arrays_sha256"]:
            raise ValueError("damaged")
        cut = int(head["samples"]) * RECORD.itemsize
        records, digests = np.frombuffer(arrays[:cut], RECORD), np.frombuffer(arrays[cut:], DIGEST)
        rejected = [(int(place), str(name), str(reason)) for place, name, reason in head["rejected"]]
        return cls(head["file"], head["sha256"], head["length"], records, digests, head["names"], rejected)


class Collector:
    """What becomes a part, sample by sample."""

    def __init__(self) -> None:
        self._records: list[tuple[int, ...]] = []
        self._digests: list[bytes] = []
        self._names: list[str] = []
        self._rejected: list[tuple[int, str, str]] = []

    def keep(self, name: str, data: bytes, picture: Picture, offset: int, label: int) -> None:
        """A sample whose payload `data` lies at `offset` of the tar. Its shard's number is known when all are done."""
        size = (picture.height, picture.width)
        self._records.append((0, offset, len(data), *size, label, zlib.crc32(data)))
        self._digests.append(hashlib.sha256(data).digest()[: DIGEST.itemsize])
        self._names.append(name)

    def reject(self, place: int, name: str, reason: str) -> None:
        """A picture that was left out."""
        self._rejected.append((place, name, reason))

    def part(self, file: str, sha256: str, length: int) -> Part:
        """The part of the finished tar."""
        records, digests = np.array(self._records, RECORD), np.frombuffer(b"".join(self._digests), DIGEST)
        return Part(file, sha256, length, records, digests, self._names, self._rejected)


def part_name(number: int) -> str:
    """Where the part of shard `number` lies."""
    return f"{PARTS}/{number:06d}.part"


def load_part(out: Folder, number: int) -> Part | None:
    """The part of shard `number`, or None where there is none or it is damaged, so that the shard is done again."""
    try:
        return Part.from_bytes(out.read(part_name(number)))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def store_part(out: Folder, number: int, part: Part) -> None:
    """Keep a part until the manifest stands."""
    with out.whole_file(part_name(number)) as file:
        file.write(part.to_bytes())


def claimed(out: Folder, fingerprint: str, mend: str = OTHER_OUT) -> bool:
    """Whether `out` was begun for this very packing. Raises UserError, with the `mend`, where it was for another."""
    try:
        holder = json.loads(out.read(PLAN_FILE))["fingerprint"]
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError):
        holder = None
    if holder != fingerprint:
        raise UserError(f"{out} holds another, unfinished packing (other sources or options); {mend}")
    return True


def claim(out: Folder, fingerprint: str) -> None:
    """Mark `out` as the place of a packing."""
    with out.whole_file(PLAN_FILE) as file:
        file.write(json.dumps({"fingerprint": fingerprint}).encode())


def finished(out: Folder, fingerprint: str, mend: str = OTHER_OUT) -> Manifest | None:
    """The manifest where `out` holds this very packing, whole; None where there is no manifest.

    Raises UserError where `out` holds another one, with the `mend`, or its shards are not as long as they should be.
    """
    if out.size(MANIFEST_FILE) is None:
        return None
    manifest = load_manifest(out)
    if manifest.fingerprint != fingerprint:
        raise UserError(f"{out} holds another packing (other sources or options); {mend}")
    problem = next(filter(None, (size_problem(out, shard) for shard in manifest.shards)), None)
    if problem:
        raise UserError(f"{problem}; remove {out} and pack again")
    return manifest


def refuse_foreign(out: Folder, ours: Sequence[str] = ()) -> None:
    """Raises UserError where anything but `ours` lies in `out` that a new packing would mix with: SRC, perhaps."""
    names = out.names() if is_url(str(out)) else sorted(os.listdir(str(out)), key=os.fsencode)
    visible = [name for name in names if not name.startswith(".") and name not in ours]
    if visible:
        raise UserError(f"{out} holds {visible[0]}, which is no part of this packing; choose a new or empty OUT")


def refuse_tables(out: Folder, mend: str) -> None:
    """Raises UserError, with the `mend`, where files lie in `out` that an index would replace."""
    for name in (DUPLICATES_FILE, INDEX_FILE, REJECTED_FILE):
        if out.size(name) is not None:
            raise UserError(f"{out} holds {name}, but no {MANIFEST_FILE}; {mend}")
