"""What the headers of JPEG and WebP files say about their picture; PNG files have a module of their own, png.py.

Pillow forgives a file's structure much that the parsers of NVIDIA DALI, which meet the bytes again in training, do
not. Here it is held to DALI's rules, found by fuzzing DALI 2.4 (nvImageCodec 0.9, OpenCV 4.13).
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple


class UndecodableError(Exception):
    """The bytes are no picture that shards hold. The message is the reason, in one line, the same on every run."""


class Picture(NamedTuple):
    """Extension by what the bytes are, and the size in pixels as stored."""

    extension: str
    height: int
    width: int


# JPEG (ITU-T T.81, annex B): marker numbers, which a byte FF precedes
_SCAN = 0xDA
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = 0xC2
_DCT_FRAMES = (0xC0, 0xC1, _PROGRESSIVE)  # Huffman-coded; the others are baseline and extended
_WITHOUT_BODY = frozenset((0x00, 0x01, *range(0xD0, 0xDA)))
_MAX_SCANS = 256  # as in DALI: real files have about ten, and each costs a pass over all pixels


def read_jpeg(data: bytes) -> Picture:
    """The first picture of a JPEG file. Raises UndecodableError, IndexError and struct.error."""
    frames = []
    for marker, start in _jpeg_segments(data):
        scan = start
        if marker in _FRAMES:
            frames.append((marker, start))
    if len(frames) != 1:
        raise UndecodableError(f"damaged JPEG header: {len(frames)} frames before the first scan")
    marker, start = frames[0]
    if marker not in _DCT_FRAMES:
        raise UndecodableError(f"lossless, hierarchical or arithmetic-coded JPEG (marker FF{marker:02X})")
    bits, height, width, components = struct.unpack_from(">BHHB", data, start)
    if bits != 8 or components not in (1, 3, 4):
        raise UndecodableError(f"JPEG of {components} components of {bits} bits; 1, 3 or 4 of 8 can be decoded")
    several = marker == _PROGRESSIVE or data[scan] < components
    if several and data.count(b"\xff\xda", scan) > _MAX_SCANS and _count_scans(data, scan) > _MAX_SCANS:
        raise UndecodableError(f"JPEG of more than {_MAX_SCANS} scans, which would take long to decode")
    return Picture("jpg", height, width)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Marker and start of the body of every segment; the header of the first scan is the last."""
    marker, place = 0, 2
    while marker != _SCAN:
        if data[place] != 0xFF:
            raise UndecodableError(f"damaged JPEG header: no marker at byte {place}")
        while (marker := data[place]) == 0xFF:  # may be repeated
            place += 1
        (size,) = struct.unpack_from(">H", data, place + 1)
        if marker in _WITHOUT_BODY or size < 2:
            raise UndecodableError(f"damaged JPEG header: marker FF{marker:02X} of {size} bytes at byte {place - 1}")
        yield marker, place + 3
        place += 1 + size


def _count_scans(data: bytes, first: int) -> int:
    """How many scans the picture has whose first scan begins at `first`."""
    end = data.find(b"\xff\xd9", first)  # other pictures may follow, or a video
    return 1 + data.count(b"\xff\xda", first, end if end >= 0 else len(data))


# WebP (RFC 9649)
_MIN_WEBP = 32  # bytes: OpenCV looks at as many
_EXIF_FLAG, _ALPHA_FLAG = 0x08, 0x10


def read_webp(data: bytes) -> Picture:
    """The canvas of a WebP file, animated or not. Raises UndecodableError, IndexError and struct.error."""
    if len(data) < _MIN_WEBP:
        raise UndecodableError(f"WebP file of less than {_MIN_WEBP} bytes")
    kind = data[12:16]
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return Picture("webp", height & 0x3FFF, width & 0x3FFF)
    if kind == b"VP8L" and data[20] == 0x2F:
        (sizes,) = struct.unpack_from("<I", data, 21)
        return Picture("webp", (sizes >> 14 & 0x3FFF) + 1, (sizes & 0x3FFF) + 1)
    if kind == b"VP8X":
        _check_flags(data, data[20])
        width, height = (int.from_bytes(data[place : place + 3], "little") + 1 for place in (24, 27))
        return Picture("webp", height, width)
    raise UndecodableError("damaged WebP header")


def _check_flags(data: bytes, flags: int) -> None:
    if not flags & _ALPHA_FLAG and b"ALPH" in _webp_chunks(data, padded=True):
        raise UndecodableError("damaged WebP header: transparency that it does not announce")
    # DALI looks for what the flag announces, and forgets the byte that follows a chunk of odd length.
    if flags & _EXIF_FLAG and b"EXIF" not in _webp_chunks(data, padded=False):
        raise UndecodableError(
            "WebP whose EXIF data are missing or follow a chunk of odd length, which NVIDIA DALI cannot read; save it "
            "again without EXIF"
        )


def _webp_chunks(data: bytes, padded: bool) -> Iterator[bytes]:
    """Kinds of the chunks that are whole, which begin at even places where they are `padded`."""
    place = 12
    while place + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, place)
        place += 8 + size + (size % 2 if padded else 0)
        if place <= len(data):
            yield kind
