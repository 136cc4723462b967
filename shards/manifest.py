"""The manifest of a shard folder: what was packed, how, and the sha256 of every file."""

import dataclasses
import hashlib
import json
import os
from typing import Any, Protocol

from shards.counts import Counts
from shards.errors import UserError
from shards.layout import FORMAT_VERSION, MANIFEST_FILE, PLAN_FILE
from shards.manifest_checks import refuse_forged_fields


class ReadableFolder(Protocol):
    """The part of `shards.storage.folders.Folder` that is needed here. ``str(folder)`` is its path or URL."""

    def read(self, name: str) -> bytes:
        """Return all bytes of a file. Raises FileNotFoundError."""

    def get_size(self, name: str) -> int | None:
        """Return the length of a file in bytes, or None where there is none."""

    def list_files(self) -> list[str]:
        """Return the names of the files in the folder."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """One tar."""

    file: str
    """file name"""
    samples: int
    """number of samples in it"""
    bytes: int
    """length in bytes"""
    sha256: str
    """sha256 of the file, hexadecimal"""


@dataclasses.dataclass(frozen=True)
class Rejected:
    """An image that was not packed."""

    source: str
    """path in the source"""
    reason: str
    """why it was not packed, in one line"""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``. It depends on neither the machine, the clock nor the number of workers."""

    name: str
    """prefix of the tars"""
    fingerprint: str
    """sha256 of the plan: names, sizes and labels of the sources, and the options"""
    samples: int
    """number of samples in all shards"""
    classes: tuple[str, ...]
    """names of the classes, in the order of their labels; empty for unlabeled images"""
    options: dict[str, Any]
    """options of the packing, by name"""
    shards: tuple[Shard, ...]
    """the tars, in the order of the index"""
    index_sha256: str
    """sha256 of ``index.npy``, hexadecimal"""
    ignored: int
    """number of files in the source whose names are not those of images"""
    rejected: tuple[Rejected, ...]
    """images that were not packed"""
    duplicates: int = 0
    """number of samples whose bytes are those of an earlier sample"""
    foreign: bool = False
    """True for tars of another program, which ``make-shards index`` described"""
    counts: Counts = dataclasses.field(default_factory=Counts)
    """images with something that is worth knowing; absent in the file where there are none"""
    tables: dict[str, str] = dataclasses.field(default_factory=dict)
    """sha256 of the CSV files, by file name"""
    format_version: int = FORMAT_VERSION
    """version of this format"""

    def to_json(self) -> str:
        """Return the text of ``manifest.json``: the fields, and the ``sha256`` of all of them."""
        fields = {**dataclasses.asdict(self), "counts": self.counts.to_dict()}
        if not fields["counts"]:
            del fields["counts"]  # older programs do not know them
        return json.dumps({**fields, "sha256": _hash_fields(fields)}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Read what `to_json` wrote. Raises NewerError for a newer format version, ValueError for anything else."""
        fields = _parse(text)
        if fields.pop("sha256", None) != _hash_fields(fields):
            raise ValueError("its sha256 does not match its content, so it is damaged or was edited by hand")
        refuse_forged_fields(fields)
        fields["counts"] = Counts(**fields.get("counts", {}))
        fields["classes"] = tuple(fields["classes"])
        fields["shards"] = tuple(Shard(**shard) for shard in fields["shards"])
        fields["rejected"] = tuple(Rejected(**entry) for entry in fields["rejected"])
        return cls(**fields)


class NewerError(ValueError):
    """A manifest has a newer format version."""


def load_manifest(folder: ReadableFolder) -> Manifest:
    """Return the manifest of a finished folder. Raises UserError where it is missing or unreadable."""
    path = f"{folder}/{MANIFEST_FILE}"
    try:
        return Manifest.from_json(folder.read(MANIFEST_FILE).decode())
    except FileNotFoundError:
        raise UserError(_explain_missing(folder)) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}. Make it readable.") from error
    except NewerError as error:
        raise UserError(f"{path}: {error}. Update dino_fast.") from error
    except ValueError as error:
        fix = "Pack again into another folder. For tars of another program, remove this file and index them again."
        raise UserError(f"{path}: {error}. {fix}") from error


def find_size_problem(folder: ReadableFolder, shard: Shard) -> str | None:
    """Return what is wrong with the length of a shard's file, in one line, or None."""
    actual = folder.get_size(shard.file)
    if actual is None:
        return f"{folder}/{shard.file}: no such file"
    if actual != shard.bytes:
        return f"{folder}/{shard.file}: the file has {actual} bytes, the manifest says {shard.bytes}"
    return None


def _parse(text: str) -> dict[str, Any]:
    """Return the fields of a manifest of this format version. Raises ValueError for anything else."""
    try:
        fields = json.loads(text)
    except RecursionError:
        fields = None
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if type(version) is not int:
        raise ValueError("not a make-shards manifest")
    if version > FORMAT_VERSION:
        raise NewerError(f"format version {version} is newer than this program's {FORMAT_VERSION}")
    if version < FORMAT_VERSION:
        raise ValueError(f"format version {version} is older than this program's {FORMAT_VERSION}")
    return dict(fields)


def _hash_fields(fields: dict[str, Any]) -> str:
    """Return the sha256 of the fields as JSON on one line, in ASCII, sorted by name."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode("ascii")).hexdigest()


def _explain_missing(folder: ReadableFolder) -> str:
    """Return why a folder has no manifest, and what to do."""
    if folder.get_size(PLAN_FILE) is not None:
        return f"{folder}: packing is not finished (no {MANIFEST_FILE} yet). Run the same make-shards command again."
    place = str(folder)
    if folder.list_files():
        what = f"not a shard folder (no {MANIFEST_FILE} in it)"
    elif "://" in place:  # the store cannot tell the two apart
        what = "no such folder, or no shards in it"
    elif os.path.exists(place):
        what = "no shards in it"
    else:
        what = "no such folder" if os.path.isabs(place) else f"no such folder in {os.getcwd()}"
    return (
        f"{folder}: {what}. Give a folder that 'make-shards pack' made (with --split-val: its train or val). Images "
        f"are packed by 'make-shards pack IMAGES SHARDS', and tars of another program indexed by 'make-shards index "
        f"TARS'."
    )
