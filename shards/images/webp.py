"""The structure of WebP files (RFC 9649), by the rules of the OpenCV with which NVIDIA DALI reads them."""

import struct
from collections.abc import Iterator

from shards.images.exif import AS_STORED, read_orientation
from shards.images.image_info import ImageInfo, UndecodableError

_MIN_BYTES = 32  # OpenCV looks at as many
_EXIF_FLAG, _ALPHA_FLAG = 0x08, 0x10


def read_webp_info(data: bytes) -> ImageInfo:
    """Return the info of a WebP file, animated or not. Raises UndecodableError, IndexError and struct.error."""
    if len(data) < _MIN_BYTES:
        raise UndecodableError(f"WebP file of less than {_MIN_BYTES} bytes")
    kind = data[12:16]
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return ImageInfo("webp", height & 0x3FFF, width & 0x3FFF)
    if kind == b"VP8L" and data[20] == 0x2F:
        (sizes,) = struct.unpack_from("<I", data, 21)
        return ImageInfo("webp", (sizes >> 14 & 0x3FFF) + 1, (sizes & 0x3FFF) + 1)
    if kind == b"VP8X":
        orientation = _check_flags(data, data[20])
        width, height = (int.from_bytes(data[place : place + 3], "little") + 1 for place in (24, 27))
        return ImageInfo("webp", height, width, orientation)
    raise UndecodableError("damaged WebP header")


def _check_flags(data: bytes, flags: int) -> int:
    """Return the EXIF orientation. Raises UndecodableError where the flags of a file are not true."""
    if not flags & _ALPHA_FLAG and any(kind == b"ALPH" for kind, _, _ in _list_chunks(data, padded=True)):
        raise UndecodableError("damaged WebP header: transparency that it does not announce")
    if not flags & _EXIF_FLAG:
        return AS_STORED
    # DALI looks for what the flag announces, and forgets the byte that follows a chunk of odd length.
    found = next(((start, end) for kind, start, end in _list_chunks(data, padded=False) if kind == b"EXIF"), None)
    if found is None:
        raise UndecodableError(
            "WebP whose EXIF data are missing or follow a chunk of odd length, which NVIDIA DALI cannot read. Save it "
            "again without EXIF."
        )
    return read_orientation(data[slice(*found)])


def _list_chunks(data: bytes, padded: bool) -> Iterator[tuple[bytes, int, int]]:
    """Yield type, start and end of the complete chunks. They begin at even offsets where they are `padded`."""
    place = 12
    while place + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, place)
        start, end = place + 8, place + 8 + size
        place = end + (size % 2 if padded else 0)
        if place <= len(data):
            yield kind, start, end
