"""Evaluation batches: every sample once, in the index's order, with its label; resize, centre crop, normalise."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from pipelines.decode_torch import decode
from pipelines.photometric import normalise
from pipelines.prefetch import Prefetcher
from pipelines.request import Undecodable
from shards.errors import UserError
from shards.index import BadSample, ShardIndex

# Beyond this many times its height a picture's ends are cut before it is resized: they are far outside the crop, and
# a strip of 2000×2 would become one of 256000×256.
_LONGEST = 8


def labelled_batches(
    index: ShardIndex, batch: int, resize: int, crop: int, threads: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pictures [B, 3, crop, crop], float32, channels-last, and their labels [B], int64, on the CPU, made ahead by
    `threads` threads. The last batch may be smaller. UserError names a sample that cannot be read."""
    with Prefetcher(_batches(index, batch, resize, crop, threads), 2, "reading evaluation batches") as batches:
        yield from batches


def _batches(index: ShardIndex, batch: int, resize: int, crop: int, threads: int) -> Iterator[tuple[Tensor, Tensor]]:
    def picture(number: int) -> Tensor:
        try:
            return central(decode(index.read([number])[0]), resize, crop)
        except (BadSample, Undecodable) as error:
            raise UserError(
                f"{index.folder}: {index.describe(number)}: {error}; run `make-shards check {index.folder}`"
            ) from error

    with ThreadPoolExecutor(threads, thread_name_prefix="evaluate") as pool:
        for first in range(0, len(index), batch):
            numbers = range(first, min(first + batch, len(index)))
            pictures = torch.stack(list(pool.map(picture, numbers)))
            out = torch.empty(len(numbers), 3, crop, crop).contiguous(memory_format=torch.channels_last)
            normalise(pictures, out)
            yield out, torch.from_numpy(np.asarray(index.labels[first : first + len(numbers)], np.int64))


def central(picture: Tensor, resize: int, crop: int) -> Tensor:
    """uint8 [3, H, W] with its short side resized to `resize` (bicubic, antialiased), and the central square of `crop`
    pixels of that: uint8 [crop, crop, 3]."""
    height, width = picture.shape[1:]
    longest = _LONGEST * min(height, width)
    if max(height, width) > longest:
        picture = F.center_crop(picture, [min(height, longest), min(width, longest)])
    picture = F.resize(picture, [resize], InterpolationMode.BICUBIC, antialias=True)
    return F.center_crop(picture, [crop, crop]).permute(1, 2, 0)
