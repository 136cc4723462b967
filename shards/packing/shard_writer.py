"""Write one shard. It is the task of a worker process."""

import hashlib
from typing import BinaryIO, NamedTuple

from shards.counts import Counts
from shards.errors import UserError
from shards.images.cpu_time import limit_cpu_time
from shards.images.decode import read_info
from shards.images.image_info import ImageInfo, UndecodableError
from shards.images.other_types import find_other_type
from shards.images.reencode import change_image, convert_image
from shards.layout import TAR_END, UNLABELED, make_padding, make_sample_key, make_shard_name, make_tar_header
from shards.packing.partial_index import PartialIndex, PartialIndexBuilder, load_partial_index, store_partial_index
from shards.packing.plan import Options
from shards.packing.workers import Tick
from shards.sources.listing import ImageSource
from shards.sources.read_image import read_image
from shards.sources.zips import DamagedError
from shards.storage.folders import Folder


class ShardTask(NamedTuple):
    """One shard to write."""

    number: int
    """number of the shard"""
    out: Folder
    """folder to write it into"""
    options: Options
    """options of the packing"""
    sources: list[tuple[int, ImageSource]]
    """position in the listing and image, in the order of the tar"""
    timed_out: frozenset[int] = frozenset()
    """positions in `sources` of images that took too long"""


class ShardResult(NamedTuple):
    """What was done for one shard."""

    kept: bool
    """True where the shard was already there"""
    images: int
    """number of images that were read, rejected ones included"""


def write_shard(task: ShardTask, tick: Tick) -> ShardResult:
    """Write a shard and its partial index, unless both are there and the tar has the right hash."""
    file_name = make_shard_name(task.options.name, task.number)
    if _is_finished(task, file_name, tick):
        tick(len(task.sources))
        return ShardResult(kept=True, images=0)
    with task.out.write_file(file_name) as file:
        writer = _ShardWriter(file, file_name, task.options)
        for done, (place, source) in enumerate(task.sources):
            tick(done)
            writer.add(place, source, timed_out=done in task.timed_out)
        part = writer.finish()
    store_partial_index(task.out, task.number, part)
    tick(len(task.sources))
    return ShardResult(kept=False, images=len(task.sources))


def _is_finished(task: ShardTask, file_name: str, tick: Tick) -> bool:
    part = load_partial_index(task.out, task.number)
    return part is not None and task.out.hash_file(file_name, lambda: tick(0)) == part.sha256


class _ShardWriter:
    """Writes samples into a tar, collects the partial index, and hashes every byte of the tar once."""

    def __init__(self, file: BinaryIO, file_name: str, options: Options) -> None:
        self._file = file
        self._file_name = file_name
        self._options = options
        self._hash = hashlib.sha256()
        self._position = 0  # bytes
        self._builder = PartialIndexBuilder()

    def add(self, place: int, source: ImageSource, *, timed_out: bool) -> None:
        """Append a sample, or note why the image is rejected."""
        try:
            self._options.rules.refuse_unread(source.size, timed_out=timed_out)
            data, info, counts = _read_and_change(source, self._options)
        except (UndecodableError, DamagedError) as reason:
            self._builder.add_rejected(place, source.name, str(reason))
        except MemoryError:
            raise UserError(f"not enough memory to decode {source.name}. Use a smaller --workers.") from None
        else:
            self._append(make_sample_key(place, source.name), source, data, info)
            self._builder.count(counts)

    def finish(self) -> PartialIndex:
        """Write the end of the tar. The caller closes the file."""
        self._write(TAR_END)
        return self._builder.finish(self._file_name, self._hash.hexdigest(), self._position)

    def _append(self, key: str, source: ImageSource, data: bytes, info: ImageInfo) -> None:
        header = make_tar_header(f"{key}.{info.extension}", len(data))
        self._builder.add_sample(source.name, data, info, self._position + len(header), source.label)
        self._write(header, data, make_padding(len(data)))
        if source.label != UNLABELED:
            text = str(source.label).encode()
            self._write(make_tar_header(f"{key}.cls", len(text)), text, make_padding(len(text)))

    def _write(self, *blocks: bytes) -> None:
        data = b"".join(blocks)
        self._file.write(data)
        self._hash.update(data)
        self._position += len(data)


def _read_and_change(source: ImageSource, options: Options) -> tuple[bytes, ImageInfo, Counts]:
    """Return the bytes to pack, their info, and what is to be counted of the changes.

    Raises UndecodableError or DamagedError with the reason why not.
    """
    original, changes, rules = read_image(source), options.changes, options.rules
    kind = find_other_type(original) if changes.convert else None
    if kind is not None:
        with limit_cpu_time(rules.image_seconds):
            data, counts = convert_image(original, kind, changes, rules.max_pixels)
        return data, read_info(data, rules.max_pixels), counts
    info = rules.validate(original)
    with limit_cpu_time(rules.image_seconds):
        data, counts = change_image(original, info, changes)
    return data, info if data is original else read_info(data, rules.max_pixels), counts
