"""Decode and crop images without DALI. This is the reference for DALI, and the fallback where DALI does not run.

Pillow decodes, as it did when the shards were packed: torchvision has announced the end of its own decoders.
torchvision crops and resizes.
"""

import io
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from pipelines.buffers import BufferPool
from pipelines.crops import CropRecipe, Windows
from pipelines.decoder import DecodeError, DecodeRequest

Allocate: TypeAlias = Callable[..., Tensor]  # as torch.empty


def decode(sample: bytes) -> Tensor:
    """Return an image as uint8 [3, H, W] RGB, without EXIF rotation. Raises DecodeError.

    Of 16-bit grayscale the high byte is kept, as DALI does it. Pillow's own conversion would clip most levels to white.
    """
    try:
        with Image.open(io.BytesIO(sample)) as image:
            if image.mode.startswith("I;16"):
                levels = np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=-1)
            else:
                levels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins may raise any exception on damaged data
        reason = re.sub(r" <_io\.BytesIO object at \w+>", "", " ".join(str(error).split()))
        raise DecodeError(reason or type(error).__name__) from error
    return torch.from_numpy(levels).permute(2, 0, 1)


def crop(
    image: Tensor,
    window: tuple[int, int, int, int],
    size: int,
    interpolation: InterpolationMode = InterpolationMode.BICUBIC,
) -> Tensor:
    """Cut `window` (top, left, height, width) out of uint8 [3, H, W], and resize it to [3, size, size].

    The resize has antialiasing.
    """
    top, left, height, width = window
    pixels = image.permute(1, 2, 0).numpy()[top : top + height, left : left + width]
    # numpy makes the copy contiguous. torch would make it with a team of threads in every thread that decodes.
    part = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
    return F.resize(part, [size, size], interpolation, antialias=True)


def decode_and_crop(sample: bytes, windows: Windows, recipe: CropRecipe, out: list[Tensor]) -> None:
    """Write the crops of one encoded image into `out`, uint8 [V, S, S, 3] for each resolution.

    `windows` is [views, 1, 4]. Raises DecodeError if the image does not decode, or is smaller than the index says.
    """
    image = decode(sample)
    require_room(image, windows)
    for (size, views), crops in zip(recipe.resolutions, out, strict=True):
        for (top, left, height, width), target in zip(windows[views, 0].tolist(), crops, strict=True):
            target.numpy()[...] = crop(image, (top, left, height, width), size).permute(1, 2, 0).numpy()


def require_room(image: Tensor, windows: Windows) -> None:
    """Raise DecodeError if a window reaches beyond the image [3, H, W]. They were drawn by the index's sizes."""
    height, width = image.shape[1:]
    bottom, right = (windows[:, 0, :2] + windows[:, 0, 2:]).max(0).tolist()
    if bottom > height or right > width:
        raise DecodeError(f"the image is {width} x {height} pixels, smaller than the index says")


def empty_crops(recipe: CropRecipe, *batch: int, allocate: Allocate = torch.empty) -> list[Tensor]:
    """Return uninitialized memory for crops: uint8 [*batch, V, S, S, 3] for each resolution."""
    return [
        allocate((*batch, views.stop - views.start, size, size, 3), dtype=torch.uint8)
        for size, views in recipe.resolutions
    ]


class _Decoding(NamedTuple):
    """A request whose images are being decoded."""

    request: DecodeRequest
    """what is decoded"""
    crops: list[Tensor]
    """where the crops will be, uint8 [B, V, S, S, 3] for each resolution"""
    images: list[Future[None]]
    """one for each image [B]"""


class TorchDecoder:
    """Decodes requests in order. The threads of `pool` share the images of each request.

    The next request is begun before one is yielded, so that the threads have work while its crops are augmented. With
    `pin_memory` the crops lie in pinned memory, from which a GPU can copy while the host goes on.
    """

    def __init__(self, recipe: CropRecipe, pool: Executor, *, pin_memory: bool = False) -> None:
        self._recipe, self._pool = recipe, pool
        # Memory is used again, since fresh memory costs as much as to fill it. torch itself does so with pinned memory.
        self._allocate: Allocate = partial(torch.empty, pin_memory=True) if pin_memory else BufferPool(spare=2).empty

    def decode_requests(
        self, requests: Iterable[DecodeRequest]
    ) -> Iterator[tuple[DecodeRequest, list[Tensor] | DecodeError]]:
        """Yield each request with its crops, one uint8 tensor [B, V, S, S, 3] for each resolution.

        They stay valid until the next request is asked for. If an image of a request does not decode, its error takes
        the place of the crops.
        """
        begun: _Decoding | None = None
        for request in requests:
            following = self._begin(request)
            if begun is not None:
                yield begun.request, self._finish(begun)
            begun = following
        if begun is not None:
            yield begun.request, self._finish(begun)

    def _begin(self, request: DecodeRequest) -> _Decoding:
        """Let the threads decode a request."""

        def decode_place(place: int) -> None:
            window = request.windows[:, place : place + 1]
            decode_and_crop(request.samples[place], window, self._recipe, [views[place] for views in crops])

        crops = empty_crops(self._recipe, len(request.samples), allocate=self._allocate)
        places = range(len(request.samples))
        return _Decoding(request, crops, [self._pool.submit(decode_place, place) for place in places])

    def _finish(self, decoding: _Decoding) -> list[Tensor] | DecodeError:
        """Wait for all images. Returns the crops, or the error of the first image that does not decode."""
        wait(decoding.images)  # also after an error, since the others still write into the crops
        try:
            for image in decoding.images:
                image.result()
        except DecodeError as error:
            return error
        return decoding.crops

    def decode_one(self, sample: bytes, windows: Windows) -> list[Tensor]:
        """Return the crops of one encoded image, uint8 [V, S, S, 3] for each resolution.

        `windows` is [views, 1, 4]. Raises DecodeError if the image does not decode.
        """
        crops = empty_crops(self._recipe)
        decode_and_crop(sample, windows, self._recipe, crops)
        return crops
