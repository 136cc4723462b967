"""Read samples by number: a memory-mapped index over the shards of one folder, and reads that verify every byte."""

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

from shards.cache.shard_cache import CACHE_BYTES, ShardCache
from shards.errors import UserError
from shards.layout import BLOCK, INDEX_FILE, RECORD
from shards.manifest import Manifest, find_size_problem, load_manifest
from shards.record_checks import find_record_problem
from shards.storage.files import read_range
from shards.storage.folders import Folder, open_folder
from shards.storage.local_folder import LocalFolder
from shards.storage.ranges import OpenFile, count_files_to_keep_open

_OPEN_FILES = 512  # at most, at once


class BadSample(Exception):
    """The bytes of a sample are not those that were packed. The message is one line."""

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
    """The samples of a finished shard folder by number, from 0. Safe in threads. A pickle opens the folder again.

    `folder` is a path, or the URL of a folder in an object store. With `cache`, a local directory, samples are read
    from whole copies of their shards there, which take up to `cache_bytes`. Without, they are read where they lie; an
    object store then gets one request per sample.

    Raises UserError for a missing or unfinished folder, a newer format, and an index or shards that do not match the
    manifest.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        cache: str | os.PathLike[str] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        opened = open_folder(os.fspath(folder))
        self.folder: Path | str = Path(opened.path) if isinstance(opened, LocalFolder) else str(opened)
        self.manifest = load_manifest(opened)
        self.records: np.ndarray = open_records(opened, self.manifest)  # [samples] of RECORD
        if problem := _find_shard_problem(opened, self.manifest):
            raise UserError(f"{problem}. Run 'make-shards check {folder}' for details, then pack again.")
        self.cache = None if cache is None else ShardCache(opened, self.manifest.shards, cache, cache_bytes)
        self.heights: np.ndarray = self.records["height"]  # [samples], pixels as stored
        self.widths: np.ndarray = self.records["width"]  # [samples], pixels as stored
        self.labels: np.ndarray = self.records["label"]  # [samples], positions in `classes`; -1: unlabeled
        self.classes: tuple[str, ...] = self.manifest.classes
        self.fingerprint: str = _compute_fingerprint(self.manifest)
        self._open_cached = functools.lru_cache(count_files_to_keep_open(_OPEN_FILES))(OpenFile)  # by path

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
        """Close the shard files, and release those in the cache. A later read opens them again."""
        self._open_cached.cache_clear()
        if self.cache is not None:
            self.cache.close()

    @property
    def is_remote(self) -> bool:
        """Whether the folder is in an object store."""
        return isinstance(self.folder, str)

    @property
    def fully_decoded(self) -> bool:
        """Whether every image was decoded in full when it was packed or indexed."""
        return self.manifest.options.get("check") == "full"

    def count_samples_per_shard(self) -> np.ndarray:
        """Return the number of samples in each shard, [shards] int64. Samples are numbered shard by shard.

        Raises UserError for an index that numbers them otherwise.
        """
        sizes = np.array([shard.samples for shard in self.manifest.shards], np.int64)
        start = 0
        for number, size in enumerate(sizes.tolist()):
            if (self.records["shard"][start : start + size] != number).any():
                raise UserError(
                    f"{self.folder}/{INDEX_FILE} does not number the samples shard by shard. Pack or index again, or "
                    "pass --data.order global."
                )
            start += size
        return sizes

    def read(self, ids: Iterable[int]) -> list[bytes]:
        """Return the compressed images of `ids`, in that order.

        Raises BadSample for the first one whose bytes are wrong. Raises UserError where the storage does not answer,
        for which no sample is to blame.
        """
        return [self._read_sample(int(id)) for id in ids]

    def read_key(self, id: int) -> str:
        """Return the tar key of a sample, from the header before its payload. Raises BadSample if it is unreadable."""
        record = self._get_record(id)
        try:
            header = self._read_bytes(record, int(record["offset"]) - BLOCK, BLOCK)
            key = self._parse_key(header)
        except (OSError, UnicodeDecodeError) as error:
            raise self._make_bad_sample(id, "?", f"header unreadable ({error})") from error
        if not key:
            raise self._make_bad_sample(id, "?", "header unreadable (no name in it)")
        return key

    def describe(self, id: int) -> str:
        """Return where a sample lies, for people: ``train-000003.tar, key 000001234-name, offset 5120``."""
        record = self._get_record(id)
        return f"{self._shard_name(record)}, key {self._read_key_or_mark(id)}, offset {record['offset']}"

    def make_bad_sample(self, id: int, reason: str) -> BadSample:
        """Return the exception to raise for a sample that cannot be used, for this reason."""
        return self._make_bad_sample(id, self._read_key_or_mark(id), reason)

    def _get_record(self, id: int) -> np.void:
        if not 0 <= id < len(self.records):
            raise IndexError(f"sample {id} of {len(self.records)}")
        record: np.void = self.records[id]
        return record

    def _shard_name(self, record: np.void) -> str:
        return self.manifest.shards[int(record["shard"])].file

    def _read_sample(self, id: int) -> bytes:
        record = self._get_record(id)
        size = int(record["size"])
        try:
            data = self._read_bytes(record, int(record["offset"]), size)
        except OSError as error:
            path = f"{self.folder}/{self._shard_name(record)}"
            raise UserError(f"{path}: {error.strerror}. Check the storage, then run the same command again.") from error
        if len(data) != size:
            raise self.make_bad_sample(id, f"the file ends after {len(data)} of {size} bytes")
        if zlib.crc32(data) != record["crc32"]:
            raise self.make_bad_sample(id, "its crc32 differs from the index, so its bytes are damaged")
        return data

    def _read_bytes(self, record: np.void, offset: int, size: int) -> bytes:
        if self.cache is not None:
            return self.cache.read(int(record["shard"]), offset, size)
        path = f"{self.folder}/{self._shard_name(record)}"
        return read_range(path, offset, size) if self.is_remote else self._open_cached(path).read(offset, size)

    def _parse_key(self, header: bytes) -> str:
        """Return the member's name up to its first dot. In tars of another program, long names are cut at 100 bytes."""
        name = header[:100].split(b"\0", 1)[0]
        if self.manifest.foreign:
            folder, _, base = os.fsdecode(name).rpartition("/")
            return "/".join(filter(None, (folder, base.partition(".")[0])))
        return name.decode("ascii").partition(".")[0]

    def _read_key_or_mark(self, id: int) -> str:
        try:
            return self.read_key(id)
        except BadSample:
            return "?"

    def _make_bad_sample(self, id: int, key: str, reason: str) -> BadSample:
        record = self._get_record(id)
        return BadSample(id, self._shard_name(record), key, int(record["offset"]), reason)


def open_records(folder: Folder, manifest: Manifest) -> np.ndarray:
    """Return the index, [samples] of RECORD, memory-mapped where the folder is local.

    Raises UserError where it is not the one that the manifest describes, or has a record that packing never writes.
    """
    path = f"{folder}/{INDEX_FILE}"
    fix = f"Pack again, or put back the {INDEX_FILE} that belongs to this manifest."
    try:
        sha256 = folder.hash_file(INDEX_FILE)
        if sha256 is None:
            raise UserError(f"{path}: no such file. {fix}")
        if sha256 != manifest.index_sha256:
            raise UserError(f"{path} does not belong to this manifest: its sha256 differs. {fix}")
        records: np.ndarray = _load_records(folder)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}. {fix}") from error
    except UserError:
        raise
    except Exception as error:  # numpy raises nearly anything on a header that does not make sense
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is not an index ({reason}). {fix}") from error
    if records.dtype != RECORD or records.shape != (manifest.samples,):
        raise UserError(
            f"{path} does not belong to this manifest: it has not {manifest.samples} records of this format. {fix}"
        )
    lengths = [shard.bytes for shard in manifest.shards]
    problem = find_record_problem(records, lengths, len(manifest.classes), manifest.options.get("max_pixels"))
    if problem:
        raise UserError(f"{path} is damaged or forged: {problem}. {fix}")
    return records.view(np.ndarray)  # a record of a memmap object itself takes ten times as long to fetch


def _load_records(folder: Folder) -> np.ndarray:
    records: np.ndarray
    if isinstance(folder, LocalFolder):
        records = np.lib.format.open_memmap(os.path.join(folder.path, INDEX_FILE), mode="r")
    else:
        records = np.lib.format.read_array(io.BytesIO(folder.read(INDEX_FILE)), allow_pickle=False)
    return records


def _find_shard_problem(folder: Folder, manifest: Manifest) -> str | None:
    """Return what is wrong with the first shard that does not match the manifest by its length, or None.

    In an object store only the names are looked at: a request for each shard takes long, and copies are verified.
    """
    if isinstance(folder, LocalFolder):
        return next(filter(None, (find_size_problem(folder, shard) for shard in manifest.shards)), None)
    present = set(folder.list_files())
    missing = (shard.file for shard in manifest.shards if shard.file not in present)
    return next((f"{folder}/{file}: no such file" for file in missing), None)


def _compute_fingerprint(manifest: Manifest) -> str:
    """Return what identifies the data wherever the folder lies: hashes of the plan, the index and all shards."""
    parts = [manifest.fingerprint, manifest.index_sha256, *(shard.sha256 for shard in manifest.shards)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
