"""Compressed bytes and crop windows into 8-bit crops without DALI: the oracle for it, and the fallback where it does
not run.

Pillow decodes, as it did when the shards were packed (torchvision has announced the end of its own decoders), and
torchvision crops and resizes.
"""

import io
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor

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
                levels = np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged data
        words = re.sub(r" <_io\.BytesIO object at \w+>", "", " ".join(str(error).split()))
        raise Undecodable(words or type(error).__name__) from error
    return torch.from_numpy(levels).permute(2, 0, 1)


def crop(picture: Tensor, window: tuple[int, int, int, int], size: int) -> Tensor:
    """`window` (top, left, height, width) of uint8 [3, H, W], resized bicubic with antialiasing to [3, size, size]."""
    top, left, height, width = window
    pixels = picture.permute(1, 2, 0).numpy()[top : top + height, left : left + width]
    # In one piece, by numpy: torch would make this copy itself, with a team of threads in every thread that decodes.
    part = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
    return F.resize(part, [size, size], InterpolationMode.BICUBIC, antialias=True)


def decode_and_crop(sample: bytes, windows: Windows, recipe: CropRecipe, out: list[Tensor]) -> None:
    """The crops of one picture into `out`, uint8 [V, S, S, 3] a resolution, from its windows [views, 1, 4];
    Undecodable."""
    picture = decode(sample)
    for (size, views), crops in zip(recipe.resolutions, out, strict=True):
        for (top, left, height, width), target in zip(windows[views, 0].tolist(), crops, strict=True):
            target.numpy()[...] = crop(picture, (top, left, height, width), size).permute(1, 2, 0).numpy()


def empty_crops(recipe: CropRecipe, *batch: int) -> list[Tensor]:
    """Room for crops: uint8 [*batch, V, S, S, 3] a resolution."""
    return [
        torch.empty(*batch, views.stop - views.start, size, size, 3, dtype=torch.uint8)
        for size, views in recipe.resolutions
    ]


class TorchDecoder:
    """Decodes requests in order, the pictures of one over the threads of `pool`."""

    def __init__(self, recipe: CropRecipe, pool: Executor) -> None:
        self._recipe, self._pool = recipe, pool
        self._crops: list[Tensor] = []  # one batch's, used again: fresh memory costs as much as filling it

    def stream(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Tensor] | Undecodable]]:
        """Each request with its crops, one uint8 tensor [B, V, S, S, 3] a resolution, valid until the next is asked
        for; or with the error where some picture of it does not decode."""
        for request in requests:
            yield request, self._decode(request)

    def _decode(self, request: Request) -> list[Tensor] | Undecodable:
        if not self._crops or len(self._crops[0]) != len(request.samples):
            self._crops = empty_crops(self._recipe, len(request.samples))
        crops = self._crops

        def work(place: int) -> None:
            window = request.windows[:, place : place + 1]
            decode_and_crop(request.samples[place], window, self._recipe, [views[place] for views in crops])

        try:
            list(self._pool.map(work, range(len(request.samples))))
        except Undecodable as error:
            self._crops = []  # other threads may still be writing into these
            return error
        return crops

    def one(self, sample: bytes, windows: Windows) -> list[Tensor]:
        """The crops of one picture, uint8 [V, S, S, 3] a resolution, from its windows [views, 1, 4]; Undecodable."""
        crops = empty_crops(self._recipe)
        decode_and_crop(sample, windows, self._recipe, crops)
        return crops
