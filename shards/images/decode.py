"""Decode an image in full, so that training never meets one that does not decode.

libjpeg warns about a damaged scan and goes on with gray or smeared blocks. There is one rule for such files: what
Pillow decodes to the end without an error is kept, whatever libjpeg covered up. Pillow does not report libjpeg's
warnings, and NVIDIA DALI goes on in the same way to the same pixels. A file that ends before its image does is
rejected.
"""

import io
import struct
from collections.abc import Callable

from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from shards.images.image_info import ImageInfo, UndecodableError
from shards.images.jpeg import read_jpeg_info
from shards.images.other_types import find_other_type
from shards.images.pillow_limits import pillow_limits_off
from shards.images.png import MAGIC, check_rows, read_png_info
from shards.images.webp import read_webp_info
from shards.layout import MAX_IMAGE_BYTES, MAX_SIDE

MAX_PIXELS = 1 << 27  # 400 MB in RGB

# Image.open calls these too, but hides what is wrong.
_PLUGINS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "jpg": JpegImagePlugin.jpeg_factory,
    "png": PngImagePlugin.PngImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
}


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageInfo:
    """Decode all data of a JPEG, PNG or WebP file and return its info. Of several images in it, take the first.

    Every coded bit of a JPEG is decoded, and drawn at an eighth of the size: the transform and the color conversion
    that follow cannot fail, and are a quarter of the work. Raises UndecodableError; for more than `max_pixels` before
    anything is decoded. A MemoryError is not the file's fault.
    """
    info = read_info(data, max_pixels)
    image = load(data, info, at_an_eighth=True)
    if info.extension == "png":
        check_rows(data)
    return info._replace(largest=find_largest(image)) if info.gray16 else info


def find_largest(image: Image.Image) -> int:
    """Return the largest value of a grayscale image."""
    return int(image.getextrema()[1])  # type: ignore[arg-type]  # more than one band has a pair for each


def read_info(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageInfo:
    """Return the info by the structure of the file alone. Its pixels may be damaged. Raises UndecodableError."""
    if not data:
        raise UndecodableError("empty file")
    if len(data) > MAX_IMAGE_BYTES:
        raise UndecodableError(f"larger than {MAX_IMAGE_BYTES} bytes")
    try:
        info = _read_header(data)
    except (IndexError, struct.error):
        raise UndecodableError("the file ends too early") from None
    refuse_size(info.height, info.width, max_pixels)
    return info


def refuse_size(height: int, width: int, max_pixels: int) -> None:
    """Raise UndecodableError for an image that has too many pixels, or a side that is none or too long."""
    size = f"{width} x {height} pixels"
    if not 0 < height <= MAX_SIDE or not 0 < width <= MAX_SIDE:
        raise UndecodableError(f"{size}; each side must be 1 to {MAX_SIDE}")
    if height * width > max_pixels:
        raise UndecodableError(f"{size}, {height * width} in total, more than the {max_pixels} of --max-pixels")


def load(data: bytes, info: ImageInfo, *, at_an_eighth: bool = False) -> Image.Image:
    """Return the decoded Pillow image of a file for which `read_info` returned `info`.

    A JPEG is reduced to an eighth of its size where `at_an_eighth`. Raises UndecodableError, MemoryError.
    """
    try:
        with pillow_limits_off():
            image = _PLUGINS[info.extension](io.BytesIO(data))
        if at_an_eighth and info.extension == "jpg":
            image.draft(None, (1, 1))  # Pillow takes the smallest of libjpeg's scales, 1/8
        image.load()
        return image
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged data
        reason = " ".join(str(error).split()) or type(error).__name__
        if reason.startswith("out of memory"):
            raise MemoryError(reason) from error
        if "MAX_TEXT" in reason:
            reason = "PNG whose text or color profile inflates to more than Pillow reads"
        raise UndecodableError(reason) from error


def _read_header(data: bytes) -> ImageInfo:
    if data.startswith(b"\xff\xd8\xff"):
        return read_jpeg_info(data)
    if data.startswith(MAGIC):
        return read_png_info(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return read_webp_info(data)
    if kind := find_other_type(data):
        raise UndecodableError(f"{kind} image; shards hold JPEG, PNG and WebP. Pack with --convert to include it")
    raise UndecodableError("not a JPEG, PNG or WebP image, or its first bytes are damaged")
