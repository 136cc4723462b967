"""What is known about an image from its bytes, and the exception for bytes that are not an image."""

from typing import NamedTuple


class UndecodableError(Exception):
    """The bytes are not an image that shards can hold. The message is one line, the same on every run."""


class ImageInfo(NamedTuple):
    """Type and size of an image."""

    extension: str
    """"jpg", "png" or "webp", from the bytes and not from the file name"""
    height: int
    """pixels as stored"""
    width: int
    """pixels as stored"""
    orientation: int = 1
    """EXIF orientation, 1 to 8; 1: as stored"""
    gray16: bool = False
    """whether it is 16-bit grayscale, without transparency"""
    largest: int = 0
    """largest value of 16-bit grayscale that was decoded"""
