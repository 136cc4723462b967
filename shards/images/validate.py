"""Whether a picture becomes a sample."""

from dataclasses import dataclass
from typing import Any

from shards.images.decode import MAX_PIXELS, Picture, UndecodableError, decode, measure
from shards.layout import MAX_PICTURE_BYTES
from shards.packing.workers import cpu_limit


def condemn(task: Any, place: int) -> Any:
    """A task of some engine again, its picture at that place not to be looked at: it took too long."""
    return task._replace(condemned=task.condemned | {place})


@dataclass(frozen=True)
class Judge:
    """By what pictures are judged."""

    check: str = "full"  # "full": every pixel is decoded; "header": sizes alone are read
    max_pixels: int = MAX_PIXELS  # of a picture, by its header
    picture_seconds: float = 30.0  # CPU time for one picture

    def picture(self, data: bytes) -> Picture:
        """What `data` is. Raises UndecodableError with the reason why it cannot be a sample."""
        with cpu_limit(self.picture_seconds):
            return (measure if self.check == "header" else decode)(data, self.max_pixels)

    def refuse(self, size: int, *, overran: bool) -> None:
        """Raises UndecodableError for a picture not to be looked at: of too many bytes, or one that took too long."""
        if size > MAX_PICTURE_BYTES:
            raise UndecodableError(f"larger than {MAX_PICTURE_BYTES} bytes")
        if overran:
            raise UndecodableError(f"takes more than {self.picture_seconds:g} s of CPU time (--picture-seconds)")
