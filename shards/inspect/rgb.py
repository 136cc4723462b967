"""Decode samples to 8-bit RGB, in the colors that training sees."""

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from shards.errors import UserError
from shards.index import BadSample, ShardIndex


class UnreadableError(Exception):
    """A sample cannot be decoded. The message is the reason, for people."""


def decode_rgb(index: ShardIndex, id: int) -> Image.Image:
    """Return a sample as 8-bit RGB without EXIF rotation, converted as the decoders of pipelines/ do.

    Raises UnreadableError, and UserError where the storage does not answer.
    """
    try:
        (data,) = index.read([id])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's about odd images: they were packed nonetheless
            with Image.open(io.BytesIO(data)) as image:
                if image.mode.startswith("I;16"):  # Pillow's own conversion clips these to white
                    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
                return image.convert("RGB")
    except BadSample as error:
        raise UnreadableError(error.reason) from error
    except UnidentifiedImageError as error:  # its own message holds an address that differs on every run
        raise UnreadableError("not an image, or its header is damaged") from error
    except (MemoryError, UserError):
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged data
        raise UnreadableError(str(error) or type(error).__name__) from error
