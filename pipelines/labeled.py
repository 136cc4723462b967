"""Load evaluation batches: every sample once, in the index's order, with its label.

Images are resized, cropped around the center and normalized.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from pipelines.decode_torch import decode
from pipelines.decoder import DecodeError
from pipelines.photometric import IMAGENET, Normalization, normalize
from pipelines.prefetch import Prefetcher
from shards.errors import UserError
from shards.index import BadSample, ShardIndex

# The ends of an image that is longer than this many times its short side are cut off before the resize. They are far
# outside the crop, and a strip of 2000×2 pixels would become one of 256000×256.
LONGEST = 8


@dataclass(frozen=True)
class CenterCrop:
    """How an image is prepared for an evaluation."""

    resize: int
    """short side of the resized image, pixels"""
    crop: int
    """side of the center that is cut out of it, pixels"""
    normalization: Normalization = IMAGENET
    """that of the backbone's training"""


def choose_resize(crop: int) -> int:
    """Return the short side of the resized image for a center crop, in the published ratio of 256 to 224 pixels."""
    return round(crop * 256 / 224)


def load_labeled_batches(
    index: ShardIndex, batch: int, center: CenterCrop, threads: int, ids: npt.NDArray[np.int64] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images [B, 3, crop, crop], float32, channels-last, and their labels [B], int64, both on the CPU.

    `ids` are the numbers of the samples, all of them where it is None. `threads` threads make the batches ahead. The
    last batch may be smaller. Raises UserError, which names the sample, if a sample cannot be read.
    """
    batches = _make_batches(index, batch, center, threads, np.arange(len(index)) if ids is None else ids)
    with Prefetcher(batches, 2, "reading evaluation batches") as prefetched:
        yield from prefetched


def _make_batches(
    index: ShardIndex, batch: int, center: CenterCrop, threads: int, ids: npt.NDArray[np.int64]
) -> Iterator[tuple[Tensor, Tensor]]:
    def load_image(number: int) -> Tensor:
        return resize_and_crop(read_image(index, number), center.resize, center.crop)

    with ThreadPoolExecutor(threads, thread_name_prefix="evaluate") as pool:
        for first in range(0, len(ids), batch):
            numbers = ids[first : first + batch]
            images = torch.stack(list(pool.map(load_image, numbers.tolist())))
            out = torch.empty(len(numbers), 3, center.crop, center.crop).contiguous(memory_format=torch.channels_last)
            normalize(images, out, center.normalization)
            yield out, torch.from_numpy(np.asarray(index.labels[numbers], np.int64))


def read_image(index: ShardIndex, number: int) -> Tensor:
    """Return the image of a sample, uint8 [3, H, W]. Raises UserError, which names the sample."""
    try:
        return _decode_sample(index, number)
    except BadSample as error:
        raise explain_bad_sample(index, error) from error


def explain_bad_sample(index: ShardIndex, error: BadSample) -> UserError:
    """Return the error for a sample that cannot be read, which says what to do."""
    return UserError(f"{index.folder}: cannot read {error}. Run `make-shards check {index.folder}`")


def _decode_sample(index: ShardIndex, number: int) -> Tensor:
    """Return the image of a sample, uint8 [3, H, W]. Raises BadSample."""
    try:
        return decode(index.read([number])[0])
    except DecodeError as error:
        raise index.make_bad_sample(number, str(error)) from error


def resize_and_crop(image: Tensor, resize: int, crop: int) -> Tensor:
    """Resize the short side of uint8 [3, H, W] to `resize` pixels, and return its center as uint8 [crop, crop, 3].

    The resize is bicubic with antialiasing.
    """
    height, width = image.shape[1:]
    longest = LONGEST * min(height, width)
    if max(height, width) > longest:
        image = F.center_crop(image, [min(height, longest), min(width, longest)])
    image = F.resize(image, [resize], InterpolationMode.BICUBIC, antialias=True)
    return F.center_crop(image, [crop, crop]).permute(1, 2, 0)
