"""What a picture's bytes are: decoded in full, so that training never meets one that does not decode."""

import io
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from shards.layout import EXTENSIONS, MAX_PICTURE_BYTES

_HELD = ("JPEG", "PNG", "WEBP")


class UndecodableError(Exception):
    """The bytes are no picture that shards hold. The message is the reason, in one line, the same on every run."""


class Picture(NamedTuple):
    """Extension by what the bytes are, and the size in pixels as stored."""

    extension: str
    height: int
    width: int


def decode(data: bytes) -> Picture:
    """Decode every pixel of a JPEG, PNG or WebP file. Raises UndecodableError; MemoryError is not its fault."""
    if not data:
        raise UndecodableError("empty file")
    if len(data) > MAX_PICTURE_BYTES:
        raise UndecodableError(f"larger than {MAX_PICTURE_BYTES} bytes")
    try:
        with Image.open(io.BytesIO(data), formats=_HELD) as image:
            image.load()
            return Picture(EXTENSIONS[image.format or ""], image.height, image.width)
    except UnidentifiedImageError:
        raise UndecodableError(_foreign_format(data)) from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged data
        raise UndecodableError(" ".join(f"{error}".split()) or type(error).__name__) from error


def _foreign_format(data: bytes) -> str:
    """Why Pillow finds no JPEG, PNG or WebP here; its own message holds an address that differs on every run."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return f"{image.format} picture; shards hold JPEG, PNG and WebP"
    except MemoryError:
        raise
    except Exception:  # as above
        return "no JPEG, PNG or WebP picture, or its header is damaged"
