"""Compute the descriptors of many images: decode ahead in threads, and share the images among the ranks."""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from dino_fast.distributed import Ranks
from dino_fast.evaluate.search.images import UnreadableImage
from pipelines.loader import count_default_threads
from pipelines.photometric import Normalization, normalize
from shards.errors import UserError
from shards.progress import show_progress

_PIXELS = 64 * 224 * 224  # of the images that go through the network at once
_AHEAD = 64  # images that are decoded ahead

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Described:
    """Descriptors of the images that could be read."""

    descriptors: Tensor
    """[n, D], float32, on the CPU, not normalized"""
    numbers: list[int]
    """[n], the images' numbers"""
    unreadable: list[str] = field(default_factory=list)
    """one line for each image that could not be read"""


class Load(Protocol):
    """Returns an image by its number, ready for the network. Raises UnreadableImage. Is called by several threads."""

    def __call__(self, number: int, /) -> Image.Image: ...


@dataclass(frozen=True)
class Describer:
    """Computes descriptors."""

    network: nn.Module
    """maps images [N, 3, H, W] to descriptors [N, D]"""
    normalization: Normalization
    """that of the network's training"""
    ranks: Ranks
    """they share the images"""

    def describe(self, load: Load, count: int, what: str, *, skip_unreadable: bool = False) -> Described:
        """Compute the descriptors of images 0 to count − 1. `what`: their name in messages.

        Threads decode ahead. Images of one size that follow each other go through the network together. Raises
        UserError for an image that cannot be read, unless such images are skipped, and where none can be read.
        """
        share = range(self.ranks.rank, count, self.ranks.world)
        shares = [self._describe_share(load, share, what, skip_unreadable)]
        if self.ranks.world > 1:
            shares *= self.ranks.world
            dist.all_gather_object(shares, shares[0])
        found = join_shares(shares)
        if not found.numbers:
            raise UserError(f"{what}: none of the images can be read. The first is {found.unreadable[0]}")
        return found

    @torch.inference_mode()
    def _describe_share(self, load: Load, share: range, what: str, skip_unreadable: bool) -> Described:
        self.network.to(self.ranks.device).to(memory_format=torch.channels_last).eval()
        parts: list[Tensor] = [torch.empty(0)]
        numbers: list[int] = []
        unreadable: list[str] = []
        with show_progress(f"descriptors of {what}") as report:
            loaded = load_ahead(partial(_try_to_load, load), share)
            for batch in group_by_size(_sort_out(loaded, unreadable, skip_unreadable)):
                numbers += [number for number, _ in batch]
                parts.append(self._run(np.stack([np.asarray(image) for _, image in batch])))
                if self.ranks.first:
                    report(len(numbers) + len(unreadable), len(share))
        return Described(torch.cat(parts[1:] or parts), numbers, unreadable)

    def _run(self, levels: npt.NDArray[np.uint8]) -> Tensor:
        """Return the descriptors [N, D] of images [N, H, W, 3], on the CPU."""
        images = torch.from_numpy(levels)
        out = torch.empty(len(images), 3, *images.shape[1:3]).contiguous(memory_format=torch.channels_last)
        normalize(images, out, self.normalization)
        return run_network(self.network, out.to(self.ranks.device)).float().cpu()


def join_shares(shares: Sequence[Described]) -> Described:
    """Join what the ranks have computed, in the order of the images."""
    numbers = [number for share in shares for number in share.numbers]
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    descriptors = torch.cat([share.descriptors for share in shares if share.numbers] or [torch.empty(0)])
    unreadable = [line for share in shares for line in share.unreadable]
    return Described(descriptors[order], [numbers[place] for place in order], unreadable)


def run_network(network: nn.Module, images: Tensor) -> Tensor:
    """Run the network. Raises UserError where it cannot take images of this size, as some of timm's models cannot."""
    try:
        features: Tensor = network(images)
    except (AssertionError, RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        height, width = images.shape[2:]
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"the backbone cannot take an image of {width} x {height} pixels ({reason.rstrip('.')}). Pass another "
            "size, or another backbone."
        ) from error
    if not features.isfinite().all():
        raise UserError("--checkpoint: its features are not finite, because the run diverged. Pass an earlier one.")
    return features


def _try_to_load(load: Load, number: int) -> tuple[int, Image.Image | UnreadableImage]:
    try:
        return number, load(number)
    except UnreadableImage as error:
        return number, error


def _sort_out(
    loaded: Iterable[tuple[int, Image.Image | UnreadableImage]], unreadable: list[str], skip: bool
) -> Iterator[tuple[int, Image.Image]]:
    """Yield the images, and note why others could not be read. Raises UserError for those unless they are skipped."""
    for number, image in loaded:
        if isinstance(image, UnreadableImage):
            if not skip:
                raise UserError(f"cannot read the image {image}. Replace it, or take it out of the set.") from image
            unreadable.append(str(image))
        else:
            yield number, image


def load_ahead(load: Callable[[int], Loaded], numbers: Iterable[int]) -> Iterator[Loaded]:
    """Yield load(number) of each number, in order. As many threads as there are cores do the work ahead."""
    pool = ThreadPoolExecutor(count_default_threads(), thread_name_prefix="describe")
    pending: collections.deque[Future[Loaded]] = collections.deque()
    try:
        for number in numbers:
            pending.append(pool.submit(load, number))
            if len(pending) > _AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def group_by_size(images: Iterable[tuple[int, Image.Image]]) -> Iterator[list[tuple[int, Image.Image]]]:
    """Yield lists of images that follow each other and have one size. A list has at most 64 · 224² pixels."""
    group: list[tuple[int, Image.Image]] = []
    for number, image in images:
        size = image.size
        if group and (group[0][1].size != size or (len(group) + 1) * size[0] * size[1] > _PIXELS):
            yield group
            group = []
        group.append((number, image))
    if group:
        yield group
