"""Compute the descriptors of many images: decode ahead in threads, and share the images among the ranks."""

import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from dino_fast.distributed import Ranks, gather_objects, show_progress_once, wait_for_all
from dino_fast.evaluate.feature_file import CHUNK, FeatureFile
from dino_fast.evaluate.features import hash_key, hash_weights
from dino_fast.evaluate.search.images import UnreadableImage
from pipelines.loader import count_default_threads
from pipelines.photometric import Normalization, normalize
from shards.errors import UserError
from shards.text import find_reason

_PIXELS = 64 * 224 * 224  # of the images that go through the network at once
_AHEAD = 64  # images that are decoded ahead

About = Mapping[str, Any]

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
    """maps images [N, 3, H, W] to descriptors [N, D]; as text, it says which descriptors"""
    normalization: Normalization
    """that of the network's training"""
    ranks: Ranks
    """they share the images"""
    backbone: str = ""
    """what the network is, in words: two networks of equal weights may differ"""
    cache: Path | None = None
    """folder with a subfolder for each set of descriptors; None: they are not kept"""

    @cached_property
    def _weights(self) -> str:
        """The hash of the network's weights, for all sets that are described."""
        return hash_weights(self.network.state_dict())

    def describe(
        self, load: Load, count: int, what: str, about: About | None = None, *, skip_unreadable: bool = False
    ) -> Described:
        """Compute the descriptors of images 0 to count − 1, or read those that an earlier call has kept.

        what: the images' name in messages. about: what tells these images, and how `load` prepares them, from all
        others; without it nothing is kept. Threads decode ahead. Images of one size that follow each other go through
        the network together. Raises UserError for an image that cannot be read, unless such images are skipped, and
        where none can be read.
        """
        self.network.to(self.ranks.device).to(memory_format=torch.channels_last).eval()
        with show_progress_once(f"descriptors of {what}", self.ranks) as report:
            if self.cache is None or about is None:
                found = self._describe_rows(load, range(count), skip_unreadable, lambda done: report(done, count))
            else:
                found = self._describe_once(load, count, about, skip_unreadable, lambda done: report(done, count))
        if not found.numbers:
            raise UserError(f"{what}: none of the images can be read. The first is {found.unreadable[0]}")
        return found

    def _describe_once(
        self, load: Load, count: int, about: About, skip: bool, report: Callable[[int], None]
    ) -> Described:
        """Do what `describe` does, a chunk after the other, and keep the descriptors of each.

        The row of an image that could not be read is not a number. Such images are read again each time.
        """
        width = self._find_width(load, count)
        if width is None:
            return self._describe_rows(load, range(count), skip, report)
        file = FeatureFile(self._choose_place(about), (count, width), np.float32, about)
        missing = file.find_missing_chunks()
        wait_for_all(self.ranks)  # until each rank has seen the same chunks missing
        for chunk in missing:
            first = chunk * CHUNK
            rows = range(first, min(first + CHUNK, count))
            found = self._describe_rows(load, rows, skip, partial(_report_from, report, first))
            values = torch.full((len(rows), width), torch.nan)
            if found.numbers:
                values[[number - first for number in found.numbers]] = found.descriptors
            if self.ranks.first:
                file.write(first, values)
        wait_for_all(self.ranks)
        descriptors = file.read()
        lost = descriptors.isnan().any(1)
        again = self._describe_rows(load, lost.nonzero()[:, 0].tolist(), skip, lambda _: None)
        return Described(descriptors[~lost], (~lost).nonzero()[:, 0].tolist(), again.unreadable)

    def _find_width(self, load: Load, count: int) -> int | None:
        """Return the D of the descriptors, from the first image that can be read. Return None where none can."""
        for number in range(count):
            with contextlib.suppress(UnreadableImage):
                return self._run(np.stack([np.asarray(load(number))])).shape[1]
        return None

    def _choose_place(self, about: About) -> Path:
        """Return the folder of these descriptors in the cache. Its name tells them apart from all others."""
        assert self.cache is not None
        key = {
            **about, "backbone": self.backbone, "weights": self._weights,
            "descriptors": str(self.network), "normalization": str(self.normalization),
            "device": self.ranks.device.type,
        }  # fmt: skip
        return self.cache / hash_key(key)

    def _describe_rows(self, load: Load, rows: Sequence[int], skip: bool, report: Callable[[int], None]) -> Described:
        """Compute the descriptors of the images with these numbers. The ranks share them."""
        share = self._describe_share(load, rows[self.ranks.rank :: self.ranks.world], skip, report)
        return join_shares(gather_objects(share, self.ranks))

    @torch.inference_mode()
    def _describe_share(
        self, load: Load, share: Sequence[int], skip: bool, report: Callable[[int], None] = lambda _: None
    ) -> Described:
        """Compute the descriptors of these images alone. `report` is told about how many images all ranks have done."""
        parts: list[Tensor] = [torch.empty(0)]
        numbers: list[int] = []
        unreadable: list[str] = []
        loaded = load_ahead(partial(_try_to_load, load), share)
        for batch in group_by_size(_sort_out(loaded, unreadable, skip)):
            numbers += [number for number, _ in batch]
            parts.append(self._run(np.stack([np.asarray(image) for _, image in batch])))
            report((len(numbers) + len(unreadable)) * self.ranks.world)
        return Described(torch.cat(parts[1:] or parts), numbers, unreadable)

    @torch.inference_mode()
    def _run(self, levels: npt.NDArray[np.uint8]) -> Tensor:
        """Return the descriptors [N, D] of images [N, H, W, 3], on the CPU."""
        images = torch.from_numpy(levels)
        out = torch.empty(len(images), 3, *images.shape[1:3]).contiguous(memory_format=torch.channels_last)
        normalize(images, out, self.normalization)
        return run_network(self.network, out.to(self.ranks.device)).float().cpu()


def _report_from(report: Callable[[int], None], first: int, done: int) -> None:
    """Report images done, with those before the first of this chunk."""
    report(first + done)


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
        reason = find_reason(error)
        raise UserError(
            f"the backbone cannot take an image of {width} x {height} pixels ({reason}). Pass another "
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
