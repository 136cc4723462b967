"""The pictures to pack as a table: 20 bytes a picture in memory (40 in archives), their names in a temporary file."""

import array
import dataclasses
import os
import struct
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from shards.layout import UNLABELLED

WHOLE = -1  # offset of a picture that is a file of its own
STORED = 0xFFFFFFFF  # `packed` of a picture whose bytes lie in the container as they are
LARGEST = 0xFFFFFFFE  # sizes are clipped to it: such a file is too large for a picture anyway
_CHUNK = 1 << 20

_FILE_ROW = np.dtype([("start", "<u8"), ("length", "<u4"), ("size", "<u4")])
_MEMBER_ROW = np.dtype([*_FILE_ROW.descr, ("container", "<u4"), ("offset", "<i8"), ("packed", "<u4"), ("crc32", "<u4")])


def few(names: Sequence[str]) -> str:
    """The first three names, for people."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


class Source(NamedTuple):
    """One picture: what it is called and where its bytes are."""

    name: str  # POSIX path, relative to the root of the listing
    size: int  # bytes
    label: int  # place in the classes; -1: unlabelled
    path: str  # the file or URL that holds it
    offset: int = WHOLE  # bytes, in an archive; -1: the file is the picture
    packed: int = STORED  # bytes as deflated in a zip archive
    crc32: int = 0  # as a zip archive has it


class NamesFile:
    """All names in a row, in a temporary file that goes with the last listing that uses it."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=_CHUNK)  # noqa: SIM115  closed with this object

    def __del__(self) -> None:
        self._file.close()

    def append(self, name: bytes) -> None:
        """Write a name behind the others; it can be read after `flush`."""
        self._file.write(name)

    def flush(self) -> None:
        """All names can be read."""
        self._file.flush()

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start`."""
        return os.pread(self._file.fileno(), length, start)


@dataclasses.dataclass(frozen=True)
class Listing:
    """All pictures of a source, in an order that only depends on the source."""

    root: str  # what the user gave
    format: str  # "folders", "flat", "webdataset" or "parquet"
    base: str  # folder or URL below which files of their own lie
    containers: tuple[str, ...]  # paths or URLs of the archives
    classes: tuple[str, ...]  # empty where unlabelled
    ignored: int  # files that are no pictures by their names, and everything whose name starts with a dot
    rows: np.ndarray  # [pictures]: where the name is, the size in bytes, where in which archive
    labels: np.ndarray  # [pictures] int32: places in the classes; -1: unlabelled
    names_file: NamesFile

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sizes(self) -> np.ndarray:
        """[pictures] uint32, bytes."""
        sizes: np.ndarray = self.rows["size"]
        return sizes

    def name(self, place: int) -> str:
        """The name of the picture at `place`."""
        row = self.rows[place]
        return os.fsdecode(self.names_file.read(int(row["start"]), int(row["length"])))

    def source(self, place: int) -> Source:
        """The picture at `place`, ready to be read in any process."""
        row, name = self.rows[place], self.name(place)
        size, label = int(row["size"]), int(self.labels[place])
        if not self.containers:
            return Source(name, size, label, f"{self.base}/{name}")
        path = self.containers[int(row["container"])]
        return Source(name, size, label, path, int(row["offset"]), int(row["packed"]), int(row["crc32"]))

    def names(self) -> Iterator[bytes]:
        """All names in order, as bytes."""
        for first in range(0, len(self.rows), 1 << 14):
            block = self.rows[first : first + (1 << 14)]
            start, end = int(block["start"][0]), int((block["start"] + block["length"])[-1])
            data = self.names_file.read(start, end - start)
            for begin, length in zip((block["start"] - start).tolist(), block["length"].tolist(), strict=True):
                yield data[begin : begin + length]

    def take(self, places: np.ndarray) -> "Listing":
        """The pictures at `places`, ascending: the same names file, fewer rows."""
        return dataclasses.replace(self, rows=self.rows[places], labels=self.labels[places])

    def labelled(self, classes: tuple[str, ...], labels: np.ndarray) -> "Listing":
        """The same pictures with other labels, [pictures] int32."""
        return dataclasses.replace(self, classes=classes, labels=labels)


class Collector:
    """Grows a listing, picture by picture."""

    def __init__(self, *, in_containers: bool) -> None:
        self._dtype = _MEMBER_ROW if in_containers else _FILE_ROW
        self._pack = struct.Struct("<QIIIqII" if in_containers else "<QII").pack
        self._rows = bytearray()
        self._labels = array.array("i")
        self._names = NamesFile()
        self._end = 0
        self._texts: dict[str, int] = {}  # label as text → number, in order of appearance

    def __len__(self) -> int:
        return len(self._rows) // self._dtype.itemsize

    def add(
        self,
        name: bytes,
        size: int,
        label: str | None = None,
        container: int = 0,
        offset: int = WHOLE,
        packed: int = STORED,
        crc32: int = 0,
    ) -> None:
        """Append a picture. `label` is text for now: `texts` numbers it."""
        number = UNLABELLED if label is None else self._texts.setdefault(label, len(self._texts))
        row = (self._end, len(name), min(size, LARGEST), container, offset, packed, crc32)
        self._rows += self._pack(*row[: len(self._dtype.names or ())])
        self._labels.append(number)
        self._names.append(name)
        self._end += len(name)

    def texts(self) -> list[str]:
        """The labels' texts, by the numbers that `finish` leaves in the rows."""
        return list(self._texts)

    def finish(self, root: str, format: str, base: str, containers: tuple[str, ...], ignored: int) -> Listing:
        """The listing, with labels that are numbers of `texts`."""
        self._names.flush()
        rows, labels = np.frombuffer(self._rows, self._dtype), np.frombuffer(self._labels, np.int32)
        return Listing(root, format, base, containers, (), ignored, rows, labels, self._names)
