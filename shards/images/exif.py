"""The orientation in EXIF data: how an image is to be turned before it is shown."""

import struct

from PIL import Image

AS_STORED = 1  # the orientation of an image that is not to be turned
# Orientation → what turns the stored image upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PREFIX = b"Exif\0\0"  # in JPEG, and in some WebP files
_TAG = 0x0112
_FORMATS = {1: "B", 3: "H", 4: "I"}  # types of whole numbers


def read_orientation(exif: bytes) -> int:
    """Return the orientation in EXIF data, 1 to 8. It is 1, as stored, where there is none, or the data are damaged."""
    tiff = exif.removeprefix(_PREFIX)
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return AS_STORED
    try:
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, directory)
        for entry in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, entry)
            if tag == _TAG and kind in _FORMATS:
                (orientation,) = struct.unpack_from(order + _FORMATS[kind], tiff, entry + 8)
                return orientation if orientation in TURNS else AS_STORED
    except struct.error:
        pass
    return AS_STORED


def make_exif(orientation: int) -> bytes:
    """Return EXIF data that hold an orientation and nothing else, or none for an image as stored."""
    if orientation == AS_STORED:
        return b""
    return _PREFIX + struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, _TAG, 3, 1, orientation, 0, 0)
