"""What a picture's bytes are: decoded in full, so that training never meets one that does not decode.

One rule for damaged scans, where libjpeg warns and goes on with grey or smeared blocks: what Pillow decodes to the end
without an error is kept, whatever was papered over on the way. Pillow does not tell of libjpeg's warnings, and NVIDIA
DALI goes on in the same way to the same pixels. A file that ends before its picture does is left out.
"""

import contextlib
import io
import struct
import threading
import warnings
from collections.abc import Callable, Iterator

from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from shards.images.png import MAGIC, check_rows, read_png
from shards.images.structure import Picture, UndecodableError, read_jpeg, read_webp
from shards.layout import MAX_PICTURE_BYTES

__all__ = ["MAX_PIXELS", "Picture", "UndecodableError", "decode", "load", "measure"]

MAX_PIXELS = 1 << 27  # 400 MB in RGB
_MAX_SIDE = 1_000_000  # pixels: libpng's limit, and about OpenCV's

# What Image.open calls, which itself keeps back what is wrong.
_PLUGINS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "jpg": JpegImagePlugin.jpeg_factory,
    "png": PngImagePlugin.PngImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
}
# The first bytes of other pictures → what to call them.
_FOREIGN = {
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
}
_opening = threading.Lock()


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Picture:
    """Decode all data of a JPEG, PNG or WebP file; of several pictures in it, the first.

    Of JPEG every coded bit is decoded, and drawn at an eighth of the size: the transform and the colours that follow
    cannot fail, and are a quarter of the work. Raises UndecodableError, before anything is decoded where there are more
    than `max_pixels`; MemoryError is not the file's fault.
    """
    picture = measure(data, max_pixels)
    load(data, picture, at_an_eighth=True)
    if picture.extension == "png":
        check_rows(data)
    return picture


def measure(data: bytes, max_pixels: int = MAX_PIXELS) -> Picture:
    """The same by the structure of the file alone; pixels may still be damaged. Raises UndecodableError."""
    if not data:
        raise UndecodableError("empty file")
    if len(data) > MAX_PICTURE_BYTES:
        raise UndecodableError(f"larger than {MAX_PICTURE_BYTES} bytes")
    try:
        picture = _read_header(data)
    except (IndexError, struct.error):
        raise UndecodableError("the file ends too early") from None
    if not 0 < picture.height <= _MAX_SIDE or not 0 < picture.width <= _MAX_SIDE:
        raise UndecodableError(f"{picture.height} pixels high and {picture.width} wide; sides are 1 to {_MAX_SIDE}")
    if picture.height * picture.width > max_pixels:
        raise UndecodableError(
            f"{picture.height} pixels high and {picture.width} wide: {picture.height * picture.width} in all, more "
            f"than the {max_pixels} of --max-pixels"
        )
    return picture


def _read_header(data: bytes) -> Picture:
    if data.startswith(b"\xff\xd8\xff"):
        return read_jpeg(data)
    if data.startswith(MAGIC):
        return read_png(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return read_webp(data)
    kind = "AVIF or HEIF" if data[4:8] == b"ftyp" else None
    kind = next((name for magic, name in _FOREIGN.items() if data.startswith(magic)), kind)
    if kind:
        raise UndecodableError(f"{kind} picture; shards hold JPEG, PNG and WebP")
    raise UndecodableError("no JPEG, PNG or WebP picture, or its first bytes are damaged")


def load(data: bytes, picture: Picture, *, at_an_eighth: bool = False) -> Image.Image:
    """Pillow's image, decoded, of a file that `measure` took for `picture`; JPEG `at_an_eighth` of its size if asked.

    Raises UndecodableError, MemoryError.
    """
    try:
        with _settings_aside():
            image = _PLUGINS[picture.extension](io.BytesIO(data))
        if at_an_eighth and picture.extension == "jpg":
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
            reason = "PNG whose text or colour profile inflates to more than Pillow reads"
        raise UndecodableError(reason) from error


@contextlib.contextmanager
def _settings_aside() -> Iterator[None]:
    """Without Pillow's own limit of pixels, as `max_pixels` is the limit here, and without its warnings.

    Both are settings of the process: they are put back, and one thread at a time is in here.
    """
    with _opening, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata: a picture decodes or has its reason
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit
