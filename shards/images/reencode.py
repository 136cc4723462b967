"""Change images while they are packed, for `make-shards pack` with --max-short-side, --upright and --quality."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from shards.images.decode import load
from shards.images.exif import AS_STORED, TURNS, make_exif
from shards.images.image_info import ImageInfo

_MAX_JPEG_SIDE = 65_500  # pixels: libjpeg's limit


@dataclass(frozen=True)
class Changes:
    """What packing changes in images. An image that needs none of it keeps its bytes."""

    max_short_side: int | None = None
    """pixels; images with a longer short side become JPEG of this short side; None: no image does"""
    quality: int = 92
    """JPEG quality of re-encoded images, 1 to 100"""
    upright: bool = False
    """whether images are turned as their EXIF orientation says"""


def change_image(data: bytes, info: ImageInfo, changes: Changes) -> bytes:
    """Return an image file with all `changes` made, or `data` itself where the image needs none.

    An image is decoded once, and re-encoded once: as PNG where it was PNG and keeps its size, else as baseline 4:2:0
    JPEG. Only the pixels are kept, without color profile and comment. Of the EXIF data only an orientation that was not
    applied is kept. An image too long for any JPEG keeps its size. Raises UndecodableError, MemoryError.
    """
    turn = TURNS.get(info.orientation) if changes.upright else None
    size = _find_size(info, changes.max_short_side)
    if turn is None and size is None:
        return data
    image = load(data, info)
    image.info.clear()  # comments, and color keys that `convert` would look at
    if size is not None:
        # Crops made from this are nearer to crops of the original than with bicubic: by 9 % at N = 256, by 20 % at 384.
        image = _convert_to_8_bits(image).resize(size, Image.Resampling.LANCZOS)
    if turn is not None:
        image = image.transpose(turn)
    exif = make_exif(AS_STORED if turn is not None else info.orientation)
    file = io.BytesIO()
    if info.extension == "png" and size is None:
        image.save(file, "PNG", exif=exif)
    else:
        _convert_to_8_bits(image).save(file, "JPEG", quality=changes.quality, subsampling="4:2:0", exif=exif)
    return file.getvalue()


def _find_size(info: ImageInfo, short_side: int | None) -> tuple[int, int] | None:
    """Return width and height for a shorter side of `short_side` pixels, or None where the image keeps its size."""
    shorter, longer = sorted((info.height, info.width))
    if short_side is None or shorter <= short_side:
        return None
    long_side = (2 * longer * short_side + shorter) // (2 * shorter)
    if long_side > _MAX_JPEG_SIDE:
        return None
    return (short_side, long_side) if info.width == shorter else (long_side, short_side)


def _convert_to_8_bits(image: Image.Image) -> Image.Image:
    """Return grayscale as 8-bit grayscale, all else as RGB, with the levels of pipelines/decode_torch.py.

    Of 16 bits the high byte is kept, where Pillow's own conversion clips to white. Transparency is dropped.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
