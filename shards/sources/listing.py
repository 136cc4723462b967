"""The images to pack as a table: 20 bytes of memory per image (40 in archives), with the names in a temporary file."""

import array
import dataclasses
import os
import struct
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from shards.layout import UNLABELED

WHOLE_FILE = -1  # `offset` of an image that is a file of its own
NOT_COMPRESSED = 0xFFFFFFFF  # `packed` of an image whose bytes lie in the archive as they are
MAX_LISTED_SIZE = 0xFFFFFFFE  # larger sizes are listed as this one: such a file is too large for an image anyway
_CHUNK = 1 << 20

_FILE_ROW = np.dtype([("start", "<u8"), ("length", "<u4"), ("size", "<u4")])
_MEMBER_ROW = np.dtype([*_FILE_ROW.descr, ("container", "<u4"), ("offset", "<i8"), ("packed", "<u4"), ("crc32", "<u4")])


class ImageSource(NamedTuple):
    """One image: its name and where its bytes are."""

    name: str
    """POSIX path, relative to the root of the listing"""
    size: int
    """bytes"""
    label: int
    """position in the classes; -1: unlabeled"""
    path: str
    """file or URL that holds the image"""
    offset: int = WHOLE_FILE
    """bytes, in an archive; -1: the file is the image"""
    packed: int = NOT_COMPRESSED
    """compressed bytes in a zip archive"""
    crc32: int = 0
    """CRC-32 in a zip archive's directory"""


class NamesFile:
    """All names in a row, in a temporary file that is removed with the last listing that uses it."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=_CHUNK)  # noqa: SIM115  closed with this object

    def __del__(self) -> None:
        self._file.close()

    def append(self, name: bytes) -> None:
        """Write a name behind the others. It can be read after `flush`."""
        self._file.write(name)

    def flush(self) -> None:
        """Make all names readable."""
        self._file.flush()

    def read(self, start: int, length: int) -> bytes:
        """Return `length` bytes from `start`."""
        return os.pread(self._file.fileno(), length, start)


@dataclasses.dataclass(frozen=True)
class Listing:
    """All images of a source, in an order that only depends on the source."""

    root: str
    """SRC, as the user gave it"""
    format: str
    """"folders", "flat", "webdataset" or "parquet\""""
    base: str
    """folder or URL that `rows` are relative to, for images that are files of their own"""
    containers: tuple[str, ...]
    """paths or URLs of the archives"""
    classes: tuple[str, ...]
    """names of the classes; empty for unlabeled images"""
    ignored: int
    """number of files whose names are not those of images, or start with a dot"""
    rows: np.ndarray
    """[images]: where the name is, size in bytes, where in which archive"""
    labels: np.ndarray
    """[images] int32: positions in the classes; -1: unlabeled"""
    names_file: NamesFile
    """all names"""
    left_out: tuple[tuple[str, str], ...] = ()
    """path and reason of what may have been an image but cannot be listed, such as a link that leads nowhere"""
    hint: str = ""
    """what was found instead of labels, and the flag that takes it, if there is one"""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sizes(self) -> np.ndarray:
        """[images] uint32, bytes."""
        sizes: np.ndarray = self.rows["size"]
        return sizes

    def read_name(self, place: int) -> str:
        """Return the name of the image at `place`."""
        row = self.rows[place]
        return os.fsdecode(self.names_file.read(int(row["start"]), int(row["length"])))

    def get_source(self, place: int) -> ImageSource:
        """Return the image at `place`, ready to be read in any process."""
        row, name = self.rows[place], self.read_name(place)
        size, label = int(row["size"]), int(self.labels[place])
        if not self.containers:
            return ImageSource(name, size, label, f"{self.base}/{name}")
        path = self.containers[int(row["container"])]
        return ImageSource(name, size, label, path, int(row["offset"]), int(row["packed"]), int(row["crc32"]))

    def read_names(self) -> Iterator[bytes]:
        """Yield all names in order, as bytes."""
        for first in range(0, len(self.rows), 1 << 14):
            block = self.rows[first : first + (1 << 14)]
            start, end = int(block["start"][0]), int((block["start"] + block["length"])[-1])
            data = self.names_file.read(start, end - start)
            for begin, length in zip((block["start"] - start).tolist(), block["length"].tolist(), strict=True):
                yield data[begin : begin + length]

    def select(self, places: np.ndarray) -> "Listing":
        """Return a listing of the images at `places`, which are ascending."""
        return dataclasses.replace(self, rows=self.rows[places], labels=self.labels[places])

    def with_labels(self, classes: tuple[str, ...], labels: np.ndarray) -> "Listing":
        """Return a listing of the same images with other labels, [images] int32."""
        return dataclasses.replace(self, classes=classes, labels=labels)


class ListingBuilder:
    """Collects a listing image by image."""

    def __init__(self, *, in_containers: bool) -> None:
        self._dtype = _MEMBER_ROW if in_containers else _FILE_ROW
        self._pack = struct.Struct("<QIIIqII" if in_containers else "<QII").pack
        self._rows = bytearray()
        self._labels = array.array("i")
        self._names = NamesFile()
        self._end = 0  # bytes of all names
        self._texts: dict[str, int] = {}  # label as text → number, in order of appearance

    def __len__(self) -> int:
        return len(self._rows) // self._dtype.itemsize

    def add(
        self,
        name: bytes,
        size: int,
        label: str | None = None,
        container: int = 0,
        offset: int = WHOLE_FILE,
        packed: int = NOT_COMPRESSED,
        crc32: int = 0,
    ) -> None:
        """Append an image. The arguments are as in `ImageSource`, except that `label` is text."""
        number = UNLABELED if label is None else self._texts.setdefault(label, len(self._texts))
        row = (self._end, len(name), min(size, MAX_LISTED_SIZE), container, offset, packed, crc32)
        self._rows += self._pack(*row[: len(self._dtype.names or ())])
        self._labels.append(number)
        self._names.append(name)
        self._end += len(name)

    def list_label_texts(self) -> list[str]:
        """Return the labels' texts. Their positions are the labels of the listing that `finish` returns."""
        return list(self._texts)

    def finish(self, root: str, format: str, base: str, containers: tuple[str, ...], ignored: int) -> Listing:
        """Return the listing, with labels that are positions in `list_label_texts()`."""
        self._names.flush()
        rows, labels = np.frombuffer(self._rows, self._dtype), np.frombuffer(self._labels, np.int32)
        return Listing(root, format, base, containers, (), ignored, rows, labels, self._names)
