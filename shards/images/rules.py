"""The rules by which an image becomes a sample or is rejected."""

from dataclasses import dataclass

from shards.images.cpu_time import limit_cpu_time
from shards.images.decode import MAX_PIXELS, decode, read_info
from shards.images.image_info import ImageInfo, UndecodableError
from shards.layout import MAX_IMAGE_BYTES


@dataclass(frozen=True)
class ImageRules:
    """The rules that flags of make-shards set."""

    check: str = "full"
    """"full": decode every pixel; "header": only read the size"""
    max_pixels: int = MAX_PIXELS
    """height × width, by the image's header"""
    image_seconds: float = 30.0
    """CPU seconds for one image"""

    def validate(self, data: bytes) -> ImageInfo:
        """Return the info of an image. Raises UndecodableError with the reason why it cannot become a sample."""
        with limit_cpu_time(self.image_seconds):
            return (read_info if self.check == "header" else decode)(data, self.max_pixels)

    def refuse_unread(self, size: int, *, timed_out: bool) -> None:
        """Raise UndecodableError for an image that must not be read: it has too many bytes, or took too long before."""
        if size > MAX_IMAGE_BYTES:
            raise UndecodableError(f"larger than {MAX_IMAGE_BYTES} bytes")
        if timed_out:
            raise UndecodableError(f"takes more than {self.image_seconds:g} s of CPU time (--image-seconds)")
