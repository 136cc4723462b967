"""Decode an image in full, so that training never meets one that does not decode.

libjpeg warns about a damaged scan and goes on with gray or smeared blocks. There is one rule for such files: what
Pillow decodes to the end without an error is kept, whatever libjpeg covered up. Pillow does not report libjpeg's
warnings, and NVIDIA DALI goes on in the same way to the same pixels. A file that ends before its image does is
rejected.
"""

import contextlib
import io
import struct
import threading
import warnings
from collections.abc import Callable, Iterator

from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from shards.images.image_info import ImageInfo, UndecodableError
from shards.images.jpeg import read_jpeg_info
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
# The first bytes of other types → their names
_OTHER_TYPES = {
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
}
_opening = threading.Lock()


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageInfo:
    """Decode all data of a JPEG, PNG or WebP file and return its info. Of several images in it, take the first.

    Every coded bit of a JPEG is decoded, and drawn at an eighth of the size: the transform and the color conversion
    that follow cannot fail, and are a quarter of the work. Raises UndecodableError; for more than `max_pixels` before
    anything is decoded. A MemoryError is not the file's fault.
    """
    info = read_info(data, max_pixels)
    load(data, info, at_an_eighth=True)
    if info.extension == "png":
        check_rows(data)
    return info


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
    size = f"{info.width} x {info.height} pixels"
    if not 0 < info.height <= MAX_SIDE or not 0 < info.width <= MAX_SIDE:
        raise UndecodableError(f"{size}; each side must be 1 to {MAX_SIDE}")
    if info.height * info.width > max_pixels:
        raise UndecodableError(
            f"{size}, {info.height * info.width} in total, more than the {max_pixels} of --max-pixels"
        )
    return info


def load(data: bytes, info: ImageInfo, *, at_an_eighth: bool = False) -> Image.Image:
    """Return the decoded Pillow image of a file for which `read_info` returned `info`.

    A JPEG is reduced to an eighth of its size where `at_an_eighth`. Raises UndecodableError, MemoryError.
    """
    try:
        with _pillow_limits_off():
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
    kind = "AVIF or HEIF" if data[4:8] == b"ftyp" else None
    kind = next((name for magic, name in _OTHER_TYPES.items() if data.startswith(magic)), kind)
    if kind:
        raise UndecodableError(f"{kind} image; shards hold JPEG, PNG and WebP")
    raise UndecodableError("not a JPEG, PNG or WebP image, or its first bytes are damaged")


@contextlib.contextmanager
def _pillow_limits_off() -> Iterator[None]:
    """Switch off Pillow's limit of pixels, for which `max_pixels` stands here, and its warnings.

    Both are settings of the process. They are restored afterwards, and one thread at a time changes them.
    """
    with _opening, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata: an image decodes, or has a reason why not
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit
