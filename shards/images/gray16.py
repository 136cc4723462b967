"""16-bit grayscale as 8-bit: X-rays, CT and microscopes use a part of the 16 bits, and training keeps the high byte."""

from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

MOST = 0xFFFF  # the largest value


class Gray16(NamedTuple):
    """The rule by which values of 16 bits become 8-bit levels. Each image is scaled alone, whatever else is packed."""

    rule: Literal["high-byte", "stretch", "window"] = "high-byte"
    """high-byte: nothing is done, and training keeps the high byte; stretch: from the least to the largest value of an
    image; window: from `low` to `high`, for all images"""
    low: int = 0
    """value that becomes level 0; smaller ones do, too"""
    high: int = MOST
    """value that becomes level 255; larger ones do, too"""

    def __str__(self) -> str:
        return f"{self.rule} {self.low} {self.high}" if self.rule == "window" else self.rule


HIGH_BYTE = Gray16()


def scale_to_8_bits(image: Image.Image, gray16: Gray16) -> Image.Image:
    """Return a 16-bit grayscale image as an 8-bit one, scaled by a rule other than the high byte.

    Levels are rounded to the nearest. An image of one value becomes black where it is stretched.
    """
    values = np.asarray(image).astype(np.uint32)
    low, high = (int(values.min()), int(values.max())) if gray16.rule == "stretch" else (gray16.low, gray16.high)
    span = max(high - low, 1)
    levels = (2 * 255 * (values.clip(low, high) - np.uint32(low)) + span) // (2 * span)
    return Image.fromarray(levels.astype(np.uint8))
