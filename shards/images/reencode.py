"""Large pictures re-encoded smaller, for `make-shards pack --max-short-side N --quality Q`."""

import io

import numpy as np
from PIL import Image

from shards.images.decode import Picture, load

_MAX_JPEG_SIDE = 65_500  # pixels: libjpeg's limit


def shrink(data: bytes, picture: Picture, short_side: int, quality: int) -> bytes:
    """A baseline 4:2:0 JPEG file whose shorter side is `short_side` pixels, where `picture` has more; else `data`.

    Levels alone are carried over: no EXIF, no colour profile, no comment. Orientation is not applied, here as anywhere
    in the project. A picture too long for any JPEG stays as it is. Raises UndecodableError, MemoryError.
    """
    shorter, longer = sorted((picture.height, picture.width))
    long_side = (2 * longer * short_side + shorter) // (2 * shorter)
    if shorter <= short_side or long_side > _MAX_JPEG_SIDE:
        return data
    size = (short_side, long_side) if picture.width == shorter else (long_side, short_side)
    # Crops made from this are nearer to crops of the original than with bicubic: by 9 % at N = 256, by 20 % at 384.
    image = _eight_bit(load(data, picture)).resize(size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return file.getvalue()


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey as 8-bit grey, all else as RGB, with the levels that pipelines/decode_torch.py has for them.

    Of 16 bits the high byte is kept, where Pillow's own conversion clips to white; transparency is dropped.
    """
    image.info.clear()  # comments, and colour keys that `convert` would look at
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
