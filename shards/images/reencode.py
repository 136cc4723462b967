"""Re-encode large images smaller, for `make-shards pack --max-short-side N --quality Q`."""

import io

import numpy as np
from PIL import Image

from shards.images.decode import load
from shards.images.image_info import ImageInfo

_MAX_JPEG_SIDE = 65_500  # pixels: libjpeg's limit


def shrink(data: bytes, info: ImageInfo, short_side: int, quality: int) -> bytes:
    """Return a baseline 4:2:0 JPEG file whose shorter side has `short_side` pixels, or `data` if it has no more.

    Only the pixels are kept: no EXIF, no color profile, no comment. Orientation is not applied, here as everywhere in
    the project. An image too long for any JPEG stays as it is. Raises UndecodableError, MemoryError.
    """
    shorter, longer = sorted((info.height, info.width))
    long_side = (2 * longer * short_side + shorter) // (2 * shorter)
    if shorter <= short_side or long_side > _MAX_JPEG_SIDE:
        return data
    size = (short_side, long_side) if info.width == shorter else (long_side, short_side)
    # Crops made from this are nearer to crops of the original than with bicubic: by 9 % at N = 256, by 20 % at 384.
    image = _convert_to_8_bits(load(data, info)).resize(size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return file.getvalue()


def _convert_to_8_bits(image: Image.Image) -> Image.Image:
    """Return grayscale as 8-bit grayscale, all else as RGB, with the levels of pipelines/decode_torch.py.

    Of 16 bits the high byte is kept, where Pillow's own conversion clips to white. Transparency is dropped.
    """
    image.info.clear()  # comments, and color keys that `convert` would look at
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
