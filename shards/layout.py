"""Every decision about the format of a shard folder: names, tar members, the index record, the manifest.

A folder of shards holds ``NAME-000000.tar`` …, ``index.npy`` (one `RECORD` a sample, in the order of the shards),
``rejected.csv`` and ``duplicates.csv`` for people, and ``manifest.json``, which is written last: a folder without it is
unfinished. Where ``make-shards index`` was run on tars of other makers, those have whatever names they have.
"""

import dataclasses
import hashlib
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from shards.errors import UserError
from shards.manifest_checks import refuse_forged

if TYPE_CHECKING:
    from shards.storage.output import Folder

FORMAT_VERSION = 2
INDEX_FILE = "index.npy"
MANIFEST_FILE = "manifest.json"
REJECTED_FILE = "rejected.csv"
DUPLICATES_FILE = "duplicates.csv"
PARTS = ".parts"  # in a folder that is being packed into: what a restart finds
PLAN_FILE = f"{PARTS}/plan.json"  # whose packing that is
BLOCK = 512  # bytes: tar headers and payloads start on multiples of it
TAR_END = bytes(2 * BLOCK)
UNLABELLED = -1
MAX_SHARDS = 1_000_000  # six digits in the file name
MAX_PICTURE_BYTES = 1 << 30  # one pread delivers it whole, and no photograph comes near

RECORD = np.dtype(
    [
        ("shard", "<u4"),  # place in the manifest's list of shards
        ("offset", "<u8"),  # bytes, of the picture's payload in the tar
        ("size", "<u4"),  # bytes
        ("height", "<u4"),  # pixels as stored: EXIF orientation is not applied
        ("width", "<u4"),
        ("label", "<i4"),  # place in the manifest's classes; -1: unlabelled
        ("crc32", "<u4"),  # zlib.crc32 of the payload
    ]
)


def shard_name(name: str, number: int) -> str:
    """``train-000003.tar`` for name "train" and shard number 3."""
    return f"{name}-{number:06d}.tar"


def sample_key(number: int, path: str) -> str:
    """The tar key of the source at place `number` of the sorted sources: ASCII, without dots, at most 70 characters.

    Readers of WebDataset cut a member's name at its first dot, and USTAR has 100 bytes for it.
    """
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", PurePosixPath(path).stem)
    return f"{number:09d}-{stem[:60]}"


def padding(size: int) -> bytes:
    """The zeros that follow a payload of `size` bytes in a tar."""
    return bytes(-size % BLOCK)


def member_bytes(size: int) -> int:
    """Bytes that a member with a payload of `size` bytes takes in a tar, header and padding included."""
    return BLOCK + size + -size % BLOCK


def tar_header(name: str, size: int) -> bytes:
    """A USTAR header, 512 bytes: mode 0644, owner 0, mtime the integer 0 (anything else would need PAX headers)."""
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def file_sha256(path: Path, tick: Callable[[], None] = lambda: None) -> str:
    """The sha256 of a file in hexadecimal, read by the MiB with `tick` called between. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            tick()
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Shard:
    """One tar: its file name, how many samples it holds, its length in bytes, its sha256 in hexadecimal."""

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A picture that was left out: its path in the source, and why."""

    source: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says. It holds nothing of the machine, the clock or the number of workers."""

    name: str
    fingerprint: str  # of the plan: the sources' names, sizes and labels, and the options
    samples: int
    classes: tuple[str, ...]  # empty where unlabelled
    options: dict[str, Any]
    shards: tuple[Shard, ...]
    index_sha256: str
    ignored: int  # files in the source folder that are no pictures by their names
    rejected: tuple[Rejected, ...]
    duplicates: int = 0  # samples whose bytes are those of an earlier one
    foreign: bool = False  # the tars are another maker's: `make-shards index` described them
    tables: dict[str, str] = dataclasses.field(default_factory=dict)  # sha256 of the lists for people, by file name
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The text of ``manifest.json``: the fields, and the ``sha256`` of them all."""
        fields = dataclasses.asdict(self)
        return json.dumps({**fields, "sha256": _fields_sha256(fields)}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Read what `to_json` wrote. Raises NewerError for a newer format version, ValueError for anything else."""
        fields = _parsed(text)
        if fields.pop("sha256", None) != _fields_sha256(fields):
            raise ValueError("its sha256 is not that of its content, so it is damaged, or was changed by hand")
        refuse_forged(fields)
        fields["classes"] = tuple(fields["classes"])
        fields["shards"] = tuple(Shard(**shard) for shard in fields["shards"])
        fields["rejected"] = tuple(Rejected(**entry) for entry in fields["rejected"])
        return cls(**fields)


class NewerError(ValueError):
    """A manifest of a newer format version."""


def _parsed(text: str) -> dict[str, Any]:
    """The fields of a manifest of this format version. Raises ValueError for anything else."""
    try:
        fields = json.loads(text)
    except RecursionError:
        fields = None
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if type(version) is not int:
        raise ValueError("no make-shards manifest")
    if version > FORMAT_VERSION:
        raise NewerError(f"format version {version}, newer than this program's {FORMAT_VERSION}")
    if version < FORMAT_VERSION:
        raise ValueError(f"format version {version}, older than this program's {FORMAT_VERSION}")
    return dict(fields)


def _fields_sha256(fields: dict[str, Any]) -> str:
    """Of their JSON on one line, sorted by name, in ASCII: whatever the layout of the file."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode("ascii")).hexdigest()


def load_manifest(folder: "Folder") -> Manifest:
    """The manifest of a finished folder. Raises UserError where it is missing or unreadable."""
    path = f"{folder}/{MANIFEST_FILE}"
    try:
        return Manifest.from_json(folder.read(MANIFEST_FILE).decode())
    except FileNotFoundError:
        raise UserError(_unfinished(folder)) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; make it readable") from error
    except NewerError as error:
        raise UserError(f"{path}: {error}; update dino_fast") from error
    except ValueError as error:
        mend = "pack again into another folder (tars of another maker: remove it and index them again)"
        raise UserError(f"{path}: {error}; {mend}") from error


def _unfinished(folder: "Folder") -> str:
    """Why there is no manifest, and what to do."""
    if folder.size(PLAN_FILE) is not None:
        return f"{folder}: no {MANIFEST_FILE} yet, so unfinished; run the same make-shards command again to finish it"
    what = f"no {MANIFEST_FILE} in it, so no shards" if folder.names() else "no such folder, or no shards in it"
    return (
        f"{folder}: {what}; give a folder that 'make-shards pack' made (with --split-val: its train or val), or run "
        f"'make-shards index {folder}' for tars that somebody else made"
    )


def size_problem(folder: "Folder", shard: Shard) -> str | None:
    """What is wrong with the length of a shard's file, in one line, or None."""
    actual = folder.size(shard.file)
    if actual is None:
        return f"{folder}/{shard.file}: no such file"
    if actual != shard.bytes:
        return f"{folder}/{shard.file}: {actual} bytes where the manifest says {shard.bytes}"
    return None
