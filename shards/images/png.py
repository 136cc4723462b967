"""The structure of PNG files (www.w3.org/TR/png), held to the rules of the libpng with which NVIDIA DALI reads them."""

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from shards.images.structure import Picture, UndecodableError

MAGIC = b"\x89PNG\r\n\x1a\n"
_HEADER_END = 33
_PALETTE = 3  # a colour type
_BITS = {0: (1, 2, 4, 8, 16), 2: (8, 16), _PALETTE: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # a channel, by colour type
_CHANNELS = {0: 1, 2: 3, _PALETTE: 1, 4: 2, 6: 4}
_CRITICAL = (b"PLTE", b"IDAT", b"IEND")
_ANIMATION = (b"acTL", b"fcTL", b"fdAT")
_MAX_CHUNK = 8_000_000 - 12  # bytes: libpng's limit for all but pixels
# Adam7's passes: their first row and column, and from one row and column to the next.
_PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
_STEP = 1 << 14  # bytes; they inflate to 17 MB at the most


class _Header(NamedTuple):
    width: int
    height: int
    bits: int  # a channel
    colour: int
    compression: int
    filters: int
    interlaced: int


def read_png(data: bytes) -> Picture:
    """The picture of a PNG file; all its chunks are looked at. Raises UndecodableError and struct.error."""
    header = _read_header(data)
    kinds = []
    for kind, start, end in _chunks(data):
        if problem := _chunk_problem(data, kind, start, end):
            raise UndecodableError(f"damaged PNG: {problem} at byte {start - 8}")
        kinds.append(kind)
    if any(kind in _ANIMATION for kind in kinds):
        raise UndecodableError("animated PNG: NVIDIA DALI decodes some of them wrongly and crashes on others")
    if b"IDAT" not in kinds:
        raise UndecodableError("damaged PNG: no pixels")
    if kinds.count(b"PLTE") > 1 or (header.colour == _PALETTE and b"PLTE" not in kinds[: kinds.index(b"IDAT")]):
        raise UndecodableError("damaged PNG: two palettes, or none before the pixels")
    return Picture("png", header.height, header.width)


def _read_header(data: bytes) -> _Header:
    header = _Header(*struct.unpack_from(">IIBBBBB", data, 16))
    (checksum,) = struct.unpack_from(">I", data, _HEADER_END - 4)
    if data[8:16] != b"\0\0\0\x0dIHDR" or checksum != zlib.crc32(data[12 : _HEADER_END - 4]):
        raise UndecodableError("damaged PNG header")
    if header.bits not in _BITS.get(header.colour, ()):
        raise UndecodableError(f"damaged PNG header: {header.bits} bits in colour type {header.colour}")
    if header.compression or header.interlaced > 1:
        raise UndecodableError("damaged PNG header: unknown compression or interlacing")
    return header


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of the body of every chunk after the header; the end chunk is the last."""
    kind, end = b"IHDR", _HEADER_END - 4
    while kind != b"IEND":
        size, kind = struct.unpack_from(">I4s", data, end + 4)
        start = end + 12
        end = start + size
        yield kind, start, end


def _chunk_problem(data: bytes, kind: bytes, start: int, end: int) -> str | None:
    (checksum,) = struct.unpack_from(">I", data, end)
    if checksum != zlib.crc32(memoryview(data)[start - 4 : end]):
        return "wrong checksum of the chunk"
    if not kind.isalpha() or not kind[2:3].isupper() or (kind[:1].isupper() and kind not in _CRITICAL):
        return "unknown chunk"
    if end - start > _MAX_CHUNK and kind != b"IDAT":
        return f"chunk of {end - start} bytes that are no pixels"
    sizes = {b"PLTE": range(3, 769, 3), b"bKGD": (1, 2, 6)}
    if kind in sizes and end - start not in sizes[kind]:
        return "chunk of a wrong length"
    return None


def check_rows(data: bytes) -> None:
    """Raises UndecodableError where the pixels of a PNG file that Pillow decodes do not end with the last row.

    Pillow lets missing rows be black, and stops at the last one before it has seen the end; libpng does neither.
    """
    missing = _inflated_bytes(_read_header(data))
    stream = zlib.decompressobj()
    try:
        for piece in _pixels(data):
            missing -= len(stream.decompress(piece))
            if missing < 0:
                break
    except zlib.error:
        missing = -1
    if missing or not stream.eof:
        raise UndecodableError("damaged PNG: its pixels do not end with its last row")


def _pixels(data: bytes) -> Iterator[memoryview]:
    """The deflated pixels, in pieces that inflate to a bounded size."""
    view = memoryview(data)
    for kind, start, end in _chunks(data):
        if kind == b"IDAT":
            yield from (view[place : min(place + _STEP, end)] for place in range(start, end, _STEP))


def _inflated_bytes(header: _Header) -> int:
    """Bytes of all rows, each with the number of its filter before it."""
    total = 0
    for top, left, down, right in _PASSES if header.interlaced else ((0, 0, 1, 1),):
        rows, columns = -(-(header.height - top) // down), -(-(header.width - left) // right)
        if columns:
            total += rows * (1 - (-columns * header.bits * _CHANNELS[header.colour] // 8))
    return total
