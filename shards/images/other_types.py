"""Images of types that shards do not hold: which it is, and its pixels as far as Pillow and its plugins read it."""

import contextlib
import importlib
import io

import numpy as np
from PIL import Image

from shards.images.image_info import UndecodableError
from shards.images.pillow_limits import pillow_limits_off

# The first bytes of a file → its type
_BEGINNINGS = {
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
} | {b"P%d%c" % (kind, blank): "PPM" for kind in range(1, 7) for blank in b" \t\r\n"}  # PBM and PGM among it
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_AVIF_BRANDS = (b"avif", b"avis")
# Type → Pillow's names of it
_FORMATS = {
    "GIF": ("GIF",),
    "BMP": ("BMP",),
    "TIFF": ("TIFF",),
    "PPM": ("PPM",),
    "JPEG 2000": ("JPEG2000",),
    "JPEG XL": ("JXL",),
    "AVIF": ("AVIF",),
    "HEIF": ("HEIF", "AVIF"),
}
# Type → the package that teaches Pillow to read it, and its module
_PLUGINS = {
    "JPEG XL": ("pillow-jxl-plugin", "pillow_jxl"),
    "AVIF": ("pillow-avif-plugin", "pillow_avif"),
    "HEIF": ("pillow-heif", "pillow_heif"),
}


def find_other_type(data: bytes) -> str | None:
    """Return the name of a file's type, such as "TIFF", where it is an image but not JPEG, PNG or WebP, else None."""
    if data[4:8] == b"ftyp":
        return "AVIF" if data[8:12] in _AVIF_BRANDS else "HEIF" if data[8:12] in _HEIF_BRANDS else None
    return next((name for beginning, name in _BEGINNINGS.items() if data.startswith(beginning)), None)


def open_other_type(data: bytes, kind: str) -> Image.Image:
    """Return the first image in a file for which `find_other_type` returned `kind`. Its pixels are not read yet.

    Raises UndecodableError where Pillow does not know the type here, or cannot read the file's header.
    """
    formats = _find_formats(kind)
    try:
        with pillow_limits_off():
            return Image.open(io.BytesIO(data), formats=formats)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged data
        raise UndecodableError(f"{kind} image whose header cannot be read") from error


def load_other_type(image: Image.Image, kind: str) -> Image.Image:
    """Return the pixels of what `open_other_type` returned, as 8-bit grayscale or RGB, or as 16-bit grayscale.

    Transparency is dropped. Raises UndecodableError, also for levels that have no 16 bits.
    """
    try:
        image.load()
        image.info.clear()  # color keys that `convert` would look at
        if image.mode.startswith("I"):
            return _convert_to_16_bits(image, kind)
        if image.mode == "F":
            raise UndecodableError(f"{kind} image of floating-point levels. Convert it to 8 or 16 bits first")
        return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    except (MemoryError, UndecodableError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UndecodableError(f"{kind} image: {reason}") from error


def _convert_to_16_bits(image: Image.Image, kind: str) -> Image.Image:
    levels = np.asarray(image)
    if levels.size and not 0 <= levels.min() <= levels.max() <= 0xFFFF:
        raise UndecodableError(
            f"{kind} image of levels from {levels.min()} to {levels.max()}. Convert it to 8 or 16 bits first"
        )
    return Image.fromarray(levels.astype(np.uint16))


def _find_formats(kind: str) -> tuple[str, ...]:
    """Return the names of Pillow's readers for a type. Raises UndecodableError where there is none here."""
    package, module = _PLUGINS.get(kind, ("Pillow", ""))
    if module:
        with contextlib.suppress(ImportError):
            plugin = importlib.import_module(module)
            getattr(plugin, "register_heif_opener", lambda: None)()
    Image.init()
    formats = tuple(name for name in _FORMATS[kind] if name in Image.OPEN)
    if not formats:
        raise UndecodableError(f"{kind} image, which Pillow reads only with {package}. Install that package")
    return formats
