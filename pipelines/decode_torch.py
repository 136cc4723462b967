"""Compressed bytes and crop windows into 8-bit crops without DALI: the oracle for it, and the fallback where it does
not run.

Pillow decodes, as it did when the shards were packed (torchvision has announced the end of its own decoders), and
torchvision crops and resizes.
"""

import io
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from pipelines.crops import CropRecipe, Windows
from pipelines.request import Request, Undecodable


def decode(sample: bytes) -> Tensor:
    """A picture as uint8 [3, H, W] RGB, without EXIF rotation; Undecodable if it does not decode.

    16-bit greys keep their high byte, as in DALI; Pillow's own conversion clips them to white.
    """
    try:
        with Image.open(io.BytesIO(sample)) as picture:
            if picture.mode.startswith("I;16"):
                levels = np.repeat((np.asarray(picture) >> 8).astype(np.uint8)[..., None], 3, axis=-1)
            else:
                levels = np.array(picture.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged data
        raise Undecodable(" ".join(str(error).split()) or type(error).__name__) from error
    return torch.from_numpy(levels).permute(2, 0, 1)


def crop(picture: Tensor, window: tuple[int, int, int, int], size: int) -> Tensor:
    """`window` (top, left, height, width) of uint8 [3, H, W], resized bicubic with antialiasing to [3, size, size]."""
    top, left, height, width = window
    return F.resize(
        picture[:, top : top + height, left : left + width], [size, size], InterpolationMode.BICUBIC, antialias=True
    )


def decode_and_crop(sample: bytes, windows: Windows, sizes: tuple[int, ...]) -> list[Tensor]:
    """The crops of one picture, uint8 [S, S, 3] a view, from its windows [views, 1, 4]; Undecodable."""
    picture = decode(sample)
    places = zip(windows[:, 0].tolist(), sizes, strict=True)
    return [
        crop(picture, (top, left, height, width), size).permute(1, 2, 0) for (top, left, height, width), size in places
    ]


class TorchDecoder:
    """Decodes requests in order, the pictures of one over `threads` threads."""

    def __init__(self, recipe: CropRecipe, threads: int) -> None:
        self._sizes = recipe.sizes
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def stream(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Tensor] | Undecodable]]:
        """Each request with its crops, one uint8 tensor [B, S, S, 3] a view; or with the error where some picture
        of it does not decode."""
        for request in requests:
            yield request, self._decode(request)

    def _decode(self, request: Request) -> list[Tensor] | Undecodable:
        crops = [torch.empty(len(request.samples), size, size, 3, dtype=torch.uint8) for size in self._sizes]

        def work(place: int) -> None:
            for view, picture in enumerate(self.one(request.samples[place], request.windows[:, place : place + 1])):
                crops[view][place] = picture

        try:
            list(self._pool.map(work, range(len(request.samples))))
        except Undecodable as error:
            return error
        return crops

    def one(self, sample: bytes, windows: Windows) -> list[Tensor]:
        """The crops of one picture, uint8 [S, S, 3] a view, from its windows [views, 1, 4]; Undecodable."""
        return decode_and_crop(sample, windows, self._sizes)
