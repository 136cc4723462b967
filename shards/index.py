"""Samples by number: a memory-mapped index over the shards of one folder, and reads that verify every byte."""

import functools
import hashlib
import io
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from shards.cache import CACHE_BYTES, ShardCache
from shards.errors import UserError
from shards.layout import BLOCK, INDEX_FILE, RECORD, Manifest, load_manifest, size_problem
from shards.storage.files import read_range
from shards.storage.output import Folder, LocalFolder, out_folder
from shards.storage.ranges import OpenFile

_OPEN_FILES = 512  # at once: half of the usual limit of a process


class BadSample(Exception):
    """A sample whose bytes are not those that were packed. The message is one line."""

    def __init__(self, id: int, shard: str, key: str, offset: int, reason: str) -> None:
        super().__init__(id, shard, key, offset, reason)
        self.id = id
        self.shard = shard  # file name
        self.key = key
        self.offset = offset  # bytes, of the payload in the tar
        self.reason = reason

    def __str__(self) -> str:
        return f"sample {self.id} ({self.shard}, key {self.key}, offset {self.offset}): {self.reason}"


class ShardIndex:
    """The samples of a finished shard folder by number, from 0. Safe in threads; a pickle opens the folder anew.

    `folder` is a path, or the URL of a folder in an object store. With `cache`, a folder of this machine, samples are
    read from whole copies of their shards there, up to `cache_bytes` of them; without, where they lie: one request a
    sample, where that is a store.

    Raises UserError for a missing or unfinished folder, a newer format, and an index or shards that are not the
    manifest's.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        cache: str | os.PathLike[str] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        here = out_folder(os.fspath(folder))
        self.folder: Path | str = Path(here.path) if isinstance(here, LocalFolder) else str(here)
        self.manifest = load_manifest(here)
        self.records: np.ndarray = open_records(here, self.manifest)  # [samples] of RECORD
        if problem := _shard_problem(here, self.manifest):
            raise UserError(f"{problem}; 'make-shards check {folder}' says more; pack again")
        self.cache = None if cache is None else ShardCache(here, self.manifest.shards, cache, cache_bytes)
        self.heights: np.ndarray = self.records["height"]  # [samples], pixels as stored
        self.widths: np.ndarray = self.records["width"]  # [samples], pixels
        self.labels: np.ndarray = self.records["label"]  # [samples], places in classes; -1: unlabelled
        self.classes: tuple[str, ...] = self.manifest.classes
        self.fingerprint: str = _fingerprint(self.manifest)
        self._opened = functools.lru_cache(_OPEN_FILES)(OpenFile)  # by path

    def __len__(self) -> int:
        return len(self.records)

    def __reduce__(self) -> tuple[type["ShardIndex"], tuple[Any, ...]]:
        cache = () if self.cache is None else (self.cache.directory, self.cache.limit)
        return type(self), (self.folder, *cache)

    def __enter__(self) -> "ShardIndex":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the shard files, and let go of those in the cache. A later read opens them again."""
        self._opened.cache_clear()
        if self.cache is not None:
            self.cache.close()

    @property
    def remote(self) -> bool:
        """Whether the folder is one of an object store."""
        return isinstance(self.folder, str)

    @property
    def decoded(self) -> bool:
        """Whether every picture was decoded in full when it was packed or indexed."""
        return self.manifest.options.get("check") == "full"

    def shard_sizes(self) -> np.ndarray:
        """[shards] int64: how many samples each shard has. Samples are numbered shard by shard.

        Raises UserError for an index that numbers them otherwise.
        """
        sizes = np.array([shard.samples for shard in self.manifest.shards], np.int64)
        start = 0
        for number, size in enumerate(sizes.tolist()):
            if (self.records["shard"][start : start + size] != number).any():
                raise UserError(
                    f"{self.folder}/{INDEX_FILE} does not number the samples shard by shard: pack or index again, or "
                    "pass --data.order global"
                )
            start += size
        return sizes

    def read(self, ids: Iterable[int]) -> list[bytes]:
        """The compressed pictures of `ids`, in that order.

        Raises BadSample for the first whose bytes are not right, and UserError where the storage does not answer,
        which is no fault of a sample's.
        """
        return [self._read(int(id)) for id in ids]

    def key(self, id: int) -> str:
        """The tar key of a sample, from the header before its payload. Raises BadSample where that is unreadable."""
        record = self._record(id)
        try:
            header = self._bytes(record, int(record["offset"]) - BLOCK, BLOCK)
            key = self._key_in(header)
        except (OSError, UnicodeDecodeError) as error:
            raise self._bad(id, "?", f"header unreadable ({error})") from error
        if not key:
            raise self._bad(id, "?", "header unreadable (no name in it)")
        return key

    def _key_in(self, header: bytes) -> str:
        """The member's name up to its first dot; another maker's may be long, and is then cut at 100 bytes."""
        name = header[:100].split(b"\0", 1)[0]
        if self.manifest.foreign:
            folder, _, base = os.fsdecode(name).rpartition("/")
            return "/".join(filter(None, (folder, base.partition(".")[0])))
        return name.decode("ascii").partition(".")[0]

    def describe(self, id: int) -> str:
        """Where a sample lies, for people: ``train-000003.tar, key 000001234-name, offset 5120``."""
        record = self._record(id)
        return f"{self._shard(record)}, key {self._key_or_mark(id)}, offset {record['offset']}"

    def bad(self, id: int, reason: str) -> BadSample:
        """What to raise for a sample that is no good for this reason."""
        return self._bad(id, self._key_or_mark(id), reason)

    def _record(self, id: int) -> np.void:
        if not 0 <= id < len(self.records):
            raise IndexError(f"sample {id} of {len(self.records)}")
        record: np.void = self.records[id]
        return record

    def _shard(self, record: np.void) -> str:
        return self.manifest.shards[int(record["shard"])].file

    def _read(self, id: int) -> bytes:
        record = self._record(id)
        size = int(record["size"])
        try:
            data = self._bytes(record, int(record["offset"]), size)
        except OSError as error:
            path = f"{self.folder}/{self._shard(record)}"
            raise UserError(f"{path}: {error.strerror}; see to the storage, then run the same command again") from error
        if len(data) != size:
            raise self.bad(id, f"the file ends after {len(data)} of {size} bytes")
        if zlib.crc32(data) != record["crc32"]:
            raise self.bad(id, "crc32 differs from the index: the bytes are damaged")
        return data

    def _bytes(self, record: np.void, offset: int, size: int) -> bytes:
        if self.cache is not None:
            return self.cache.read(int(record["shard"]), offset, size)
        path = f"{self.folder}/{self._shard(record)}"
        return read_range(path, offset, size) if self.remote else self._opened(path).read(offset, size)

    def _bad(self, id: int, key: str, reason: str) -> BadSample:
        record = self._record(id)
        return BadSample(id, self._shard(record), key, int(record["offset"]), reason)

    def _key_or_mark(self, id: int) -> str:
        try:
            return self.key(id)
        except BadSample:
            return "?"


def _shard_problem(folder: Folder, manifest: Manifest) -> str | None:
    """What is wrong with the first shard that is not the manifest's by its length; None where all are.

    Of a store only the names are looked at: a request for each shard takes long, and copies are verified.
    """
    if isinstance(folder, LocalFolder):
        return next(filter(None, (size_problem(folder, shard) for shard in manifest.shards)), None)
    there = set(folder.names())
    missing = (shard.file for shard in manifest.shards if shard.file not in there)
    return next((f"{folder}/{file}: no such file" for file in missing), None)


def open_records(folder: Folder, manifest: Manifest) -> np.ndarray:
    """The index, [samples] of RECORD, memory-mapped where the folder is local.

    Raises UserError where it is not the one the manifest describes.
    """
    path = f"{folder}/{INDEX_FILE}"
    mend = f"pack again, or put the {INDEX_FILE} back that belongs to this manifest"
    try:
        sha256 = folder.sha256(INDEX_FILE)
        if sha256 is None:
            raise UserError(f"{path}: no such file; {mend}")
        if sha256 != manifest.index_sha256:
            raise UserError(f"{path} is stale or foreign: its sha256 is not the manifest's; {mend}")
        records: np.ndarray = _loaded(folder)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; {mend}") from error
    except ValueError as error:
        raise UserError(f"{path} is no index ({error}); {mend}") from error
    if records.dtype != RECORD or records.shape != (manifest.samples,):
        raise UserError(f"{path} is stale or foreign: not {manifest.samples} records of this format; {mend}")
    return records.view(np.ndarray)  # a record of a memmap object itself takes ten times as long to fetch


def _loaded(folder: Folder) -> np.ndarray:
    records: np.ndarray
    if isinstance(folder, LocalFolder):
        records = np.load(os.path.join(folder.path, INDEX_FILE), mmap_mode="r", allow_pickle=False)
    else:
        records = np.load(io.BytesIO(folder.read(INDEX_FILE)), allow_pickle=False)
    return records


def _fingerprint(manifest: Manifest) -> str:
    """Identifies the data, wherever the folder lies: what was planned, what the index says, what the shards hold."""
    parts = [manifest.fingerprint, manifest.index_sha256, *(shard.sha256 for shard in manifest.shards)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
