"""The structure of PNG files (www.w3.org/TR/png), by the rules of the libpng with which NVIDIA DALI reads them."""

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from shards.images.exif import AS_STORED, read_orientation
from shards.images.image_info import ImageInfo, UndecodableError

MAGIC = b"\x89PNG\r\n\x1a\n"
_HEADER_END = 33
_GRAY, _PALETTE = 0, 3  # color types
# Bits per channel, by color type
_BITS = {_GRAY: (1, 2, 4, 8, 16), 2: (8, 16), _PALETTE: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_CHANNELS = {_GRAY: 1, 2: 3, _PALETTE: 1, 4: 2, 6: 4}
_CRITICAL = (b"PLTE", b"IDAT", b"IEND")
_ANIMATION = (b"acTL", b"fcTL", b"fdAT")
_MAX_CHUNK = 8_000_000 - 12  # bytes: libpng's limit for all but pixels
# Adam7's passes: the first row and column of each, and the steps from one row and column to the next
_PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
_STEP = 1 << 14  # bytes; they inflate to at most 17 MB


class _Header(NamedTuple):
    """The fields of the IHDR chunk."""

    width: int
    """pixels"""
    height: int
    """pixels"""
    bits: int
    """bits per channel"""
    color: int
    """color type"""
    compression: int
    """compression method; 0 is the only one"""
    filters: int
    """filter method; 0 is the only one"""
    interlaced: int
    """0: not interlaced, 1: Adam7"""


def read_png_info(data: bytes) -> ImageInfo:
    """Return the info of a PNG file after a look at all its chunks. Raises UndecodableError and struct.error."""
    header = _read_header(data)
    kinds, orientation = [], AS_STORED
    for kind, start, end in _read_chunks(data):
        if problem := _find_chunk_problem(data, kind, start, end):
            raise UndecodableError(f"damaged PNG: {problem} at byte {start - 8}")
        kinds.append(kind)
        if kind == b"eXIf":
            orientation = read_orientation(data[start:end])
    if any(kind in _ANIMATION for kind in kinds):
        raise UndecodableError("animated PNG, which NVIDIA DALI decodes wrongly or crashes on")
    if b"IDAT" not in kinds:
        raise UndecodableError("damaged PNG: no pixels")
    if kinds.count(b"PLTE") > 1 or (header.color == _PALETTE and b"PLTE" not in kinds[: kinds.index(b"IDAT")]):
        raise UndecodableError("damaged PNG: two palettes, or none before the pixels")
    is_gray16 = header.color == _GRAY and header.bits == 16
    return ImageInfo("png", header.height, header.width, orientation, is_gray16)


def check_rows(data: bytes) -> None:
    """Raise UndecodableError where the pixels of a PNG file that Pillow decodes do not end with the last row.

    Pillow draws missing rows in black, and stops at the last row before it has seen the end. libpng does neither.
    """
    missing = _count_inflated_bytes(_read_header(data))
    stream = zlib.decompressobj()
    try:
        for piece in _read_compressed_pixels(data):
            missing -= len(stream.decompress(piece))
            if missing < 0:
                break
    except zlib.error:
        missing = -1
    if missing or not stream.eof:
        raise UndecodableError("damaged PNG: its pixels do not end with its last row")


def _read_header(data: bytes) -> _Header:
    header = _Header(*struct.unpack_from(">IIBBBBB", data, 16))
    (checksum,) = struct.unpack_from(">I", data, _HEADER_END - 4)
    if data[8:16] != b"\0\0\0\x0dIHDR" or checksum != zlib.crc32(data[12 : _HEADER_END - 4]):
        raise UndecodableError("damaged PNG header")
    if header.bits not in _BITS.get(header.color, ()):
        raise UndecodableError(f"damaged PNG header: {header.bits} bits in color type {header.color}")
    if header.compression or header.interlaced > 1:
        raise UndecodableError("damaged PNG header: unknown compression or interlacing")
    return header


def _read_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield type, start and end of the body of every chunk after the header, up to the end chunk."""
    kind, end = b"IHDR", _HEADER_END - 4
    while kind != b"IEND":
        size, kind = struct.unpack_from(">I4s", data, end + 4)
        start = end + 12
        end = start + size
        yield kind, start, end


def _find_chunk_problem(data: bytes, kind: bytes, start: int, end: int) -> str | None:
    (checksum,) = struct.unpack_from(">I", data, end)
    if checksum != zlib.crc32(memoryview(data)[start - 4 : end]):
        return "wrong checksum of the chunk"
    if not kind.isalpha() or not kind[2:3].isupper() or (kind[:1].isupper() and kind not in _CRITICAL):
        return "unknown chunk"
    if end - start > _MAX_CHUNK and kind != b"IDAT":
        return f"chunk of {end - start} bytes that are not pixels"
    sizes = {b"PLTE": range(3, 769, 3), b"bKGD": (1, 2, 6)}
    if kind in sizes and end - start not in sizes[kind]:
        return "chunk of a wrong length"
    return None


def _read_compressed_pixels(data: bytes) -> Iterator[memoryview]:
    """Yield the deflated pixels in pieces that inflate to a bounded size."""
    view = memoryview(data)
    for kind, start, end in _read_chunks(data):
        if kind == b"IDAT":
            yield from (view[place : min(place + _STEP, end)] for place in range(start, end, _STEP))


def _count_inflated_bytes(header: _Header) -> int:
    """Return the bytes of all rows, each with the number of its filter before it."""
    total = 0
    for top, left, down, right in _PASSES if header.interlaced else ((0, 0, 1, 1),):
        rows, columns = -(-(header.height - top) // down), -(-(header.width - left) // right)
        if columns:
            total += rows * (1 - (-columns * header.bits * _CHANNELS[header.color] // 8))
    return total
