"""The structure of JPEG files (ITU-T T.81, annex B), by the rules of NVIDIA DALI.

Pillow forgives much in a file's structure that the parsers of DALI, which read the bytes again in training, do not.
DALI's rules were found by fuzzing DALI 2.4 (nvImageCodec 0.9, OpenCV 4.13). The same holds for `webp` and `png`.
"""

import struct
from collections.abc import Iterator

from shards.images.exif import AS_STORED, read_orientation
from shards.images.image_info import ImageInfo, UndecodableError

# Marker numbers, which a byte FF precedes
_SCAN = 0xDA
_APP1 = 0xE1  # which holds EXIF data, among others
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = 0xC2
_DCT_FRAMES = (0xC0, 0xC1, _PROGRESSIVE)  # Huffman-coded; the others are baseline and extended
_WITHOUT_BODY = frozenset((0x00, 0x01, *range(0xD0, 0xDA)))
_MAX_SCANS = 256  # as in DALI: real files have about ten, and each costs a pass over all pixels


def read_jpeg_info(data: bytes) -> ImageInfo:
    """Return the info of the first image in a JPEG file. Raises UndecodableError, IndexError and struct.error."""
    frames, orientation = [], AS_STORED
    for marker, start, end in _read_segments(data):
        scan = start
        if marker in _FRAMES:
            frames.append((marker, start))
        elif marker == _APP1 and data.startswith(b"Exif\0\0", start) and orientation == AS_STORED:
            orientation = read_orientation(data[start:end])
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
    return ImageInfo("jpg", height, width, orientation)


def _read_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the marker, and the start and end of the body, of every segment, up to the header of the first scan."""
    marker, place = 0, 2
    while marker != _SCAN:
        if data[place] != 0xFF:
            raise UndecodableError(f"damaged JPEG header: no marker at byte {place}")
        while (marker := data[place]) == 0xFF:  # may be repeated
            place += 1
        (size,) = struct.unpack_from(">H", data, place + 1)
        if marker in _WITHOUT_BODY or size < 2:
            raise UndecodableError(f"damaged JPEG header: marker FF{marker:02X} of {size} bytes at byte {place - 1}")
        yield marker, place + 3, place + 1 + size
        place += 1 + size


def _count_scans(data: bytes, first: int) -> int:
    """Return how many scans the image has whose first scan begins at `first`."""
    end = data.find(b"\xff\xd9", first)  # other images or a video may follow
    return 1 + data.count(b"\xff\xda", first, end if end >= 0 else len(data))
