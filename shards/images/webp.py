"""The structure of WebP files (RFC 9649), by the rules of the OpenCV with which NVIDIA DALI reads them."""

import struct
from collections.abc import Iterator

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
        _check_flags(data, data[20])
        width, height = (int.from_bytes(data[place : place + 3], "little") + 1 for place in (24, 27))
        return ImageInfo("webp", height, width)
    raise UndecodableError("damaged WebP header")


def _check_flags(data: bytes, flags: int) -> None:
    if not flags & _ALPHA_FLAG and b"ALPH" in _list_chunk_types(data, padded=True):
        raise UndecodableError("damaged WebP header: transparency that it does not announce")
    # DALI looks for what the flag announces, and forgets the byte that follows a chunk of odd length.
    if flags & _EXIF_FLAG and b"EXIF" not in _list_chunk_types(data, padded=False):
        raise UndecodableError(
            "WebP whose EXIF data are missing or follow a chunk of odd length, which NVIDIA DALI cannot read. Save it "
            "again without EXIF."
        )


def _list_chunk_types(data: bytes, padded: bool) -> Iterator[bytes]:
    """Yield the types of the complete chunks. They begin at even offsets where they are `padded`."""
    place = 12
    while place + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, place)
        place += 8 + size + (size % 2 if padded else 0)
        if place <= len(data):
            yield kind
