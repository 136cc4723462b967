"""The folder that is being packed: one packer at a time, files that appear whole or not at all, what a restart finds.

``OUT/.parts`` holds ``plan.json`` (whose packing this is), a part a finished shard, and all temporary files; it goes
when the manifest stands.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from shards.errors import UserError, mend_of
from shards.layout import INDEX_FILE, MANIFEST_FILE, RECORD, Manifest, load_manifest, shard_name, size_problem

PARTS = ".parts"
_PLAN_FILE = "plan.json"


@dataclasses.dataclass(frozen=True)
class Part:
    """What a finished shard leaves for the index and the manifest."""

    sha256: str  # of the tar
    length: int  # of the tar, bytes
    records: np.ndarray  # [samples] of RECORD
    rejected: list[tuple[int, str]]  # place in the sorted sources, reason

    def to_bytes(self) -> bytes:
        """A line of JSON, then the records."""
        records = self.records.tobytes()
        head = {
            "sha256": self.sha256,
            "length": self.length,
            "rejected": self.rejected,
            "records_sha256": hashlib.sha256(records).hexdigest(),
        }
        return json.dumps(head).encode() + b"\n" + records

    @classmethod
    def from_bytes(cls, data: bytes) -> "Part":
        """Read what `to_bytes` wrote. Raises ValueError, KeyError or TypeError for anything else."""
        line, _, records = data.partition(b"\n")
        head = json.loads(line)
        if hashlib.sha256(records).hexdigest() != head["records_sha256"]:
            raise ValueError("records are damaged")
        rejected = [(int(number), str(reason)) for number, reason in head["rejected"]]
        return cls(head["sha256"], head["length"], np.frombuffer(records, RECORD), rejected)


def part_path(out: Path, number: int) -> Path:
    """Where the part of shard `number` lies."""
    return out / PARTS / f"{number:06d}.part"


def load_part(out: Path, number: int) -> Part | None:
    """The part of shard `number`, or None where there is none or it is damaged, so that the shard is done again."""
    try:
        return Part.from_bytes(part_path(out, number).read_bytes())
    except (OSError, ValueError, KeyError, TypeError):
        return None


def finished_or_claimed(out: Path, fingerprint: str) -> Manifest | None:
    """The manifest where `out` already holds this very packing, whole; else None, and `out` is marked as its place.

    Raises UserError where `out` holds another packing, finished or not, or files of ours that nobody vouches for.
    """
    other = f"{out} holds another packing (other sources or options); choose another OUT, or remove it first"
    if (out / MANIFEST_FILE).exists():
        manifest = load_manifest(out)
        if manifest.fingerprint != fingerprint:
            raise UserError(other)
        problem = next(filter(None, (size_problem(out, shard) for shard in manifest.shards)), None)
        if problem:
            raise UserError(f"{problem}; remove {out} and pack again")
        return manifest
    plan = out / PARTS / _PLAN_FILE
    if plan.exists():
        if _claimed_by(plan) != fingerprint:
            raise UserError(other.replace("another packing", "another, unfinished packing"))
    else:
        _refuse_foreign(out)
        _claim(out, plan, fingerprint)
    for leftover in (out / PARTS).glob("*.tmp"):
        leftover.unlink(missing_ok=True)
    return None


def _claimed_by(plan: Path) -> str:
    try:
        return str(json.loads(plan.read_text())["fingerprint"])
    except (ValueError, KeyError, TypeError):
        return ""
    except OSError as error:
        raise UserError(f"{plan}: {error.strerror}; make it readable") from error


def _refuse_foreign(out: Path) -> None:
    foreign = sorted(path.name for pattern in ("*.tar", INDEX_FILE) for path in out.glob(pattern))
    if foreign:
        raise UserError(f"{out} holds {foreign[0]}, which is no part of this packing; choose another OUT, or remove it")


def _claim(out: Path, plan: Path, fingerprint: str) -> None:
    try:
        plan.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; {mend_of(error)}") from error
    with whole_file(out, plan) as file:
        file.write(json.dumps({"fingerprint": fingerprint}).encode())


@contextlib.contextmanager
def whole_file(out: Path, path: Path) -> Iterator[BinaryIO]:
    """A file below `out` to write to, which appears under its name, synced, when the block ends well; or never.

    Raises UserError for what the file system refuses.
    """
    # The process id keeps a dying worker of a killed run and its successor in the restart apart.
    temporary = out / PARTS / f"{path.name}.{os.getpid()}.tmp"
    try:
        try:
            with temporary.open("wb", buffering=1 << 20) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; {mend_of(error)}") from error


def sync_folder(folder: Path) -> None:
    """A rename is on the disk when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_parts(out: Path) -> None:
    """Packing is over: what only a restart needs goes."""
    shutil.rmtree(out / PARTS, ignore_errors=True)


def discard(out: Path, name: str, shards: int) -> None:
    """Take away a packing that came out empty."""
    for number in range(shards):
        (out / shard_name(name, number)).unlink(missing_ok=True)
    remove_parts(out)
