"""Load labeled training batches: a random crop of each image, flipped at random, with its label.

What a batch holds depends only on the index, the recipe, the seed, the step, the rank and the number of ranks. A sample
gets the same crop in an epoch whatever the batch size. `labeled.py` is for evaluation, where nothing is random.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode

from pipelines.crops import Windows, random_resized_crop
from pipelines.decode_torch import crop, decode, require_room
from pipelines.decoder import DecodeError, move_to_device
from pipelines.order import Ids
from pipelines.photometric import IMAGENET, Normalization, find_scale_and_shift
from pipelines.prefetch import Prefetcher
from pipelines.rand_augment import DRAWS, rand_augment
from pipelines.random_numbers import AUGMENT_STREAM, WINDOW_STREAM, draw_uniform
from shards.errors import UserError
from shards.index import BadSample

_WINDOW_DRAWS = 22  # of `random_resized_crop`
_AHEAD = 2  # batches that are ready before they are asked for


@dataclass(frozen=True)
class LabeledCrops:
    """How an image is prepared for the training of a classifier. The defaults are the published linear evaluation's."""

    size: int = 224
    """side of the crop, pixels"""
    scale: tuple[float, float] = (0.08, 1.0)
    """least and greatest share of the image's area that the crop covers"""
    interpolation: InterpolationMode = InterpolationMode.BILINEAR
    """how a crop is resized, always with antialiasing"""
    flip: float = 0.5
    """probability of a horizontal flip"""
    rand_augment: float = 0.0
    """mean magnitude of RandAugment, from 0 to 10; 0: without it"""
    normalization: Normalization = IMAGENET
    """that of the backbone's training"""


class LabeledSamples(Protocol):
    """What is read of a `ShardIndex`, so that a part of one can take its place."""

    labels: npt.NDArray[np.integer]
    """[samples], their classes"""
    heights: npt.NDArray[np.integer]
    """[samples], pixels"""
    widths: npt.NDArray[np.integer]
    """[samples], pixels"""

    def read(self, ids: Iterable[int]) -> list[bytes]: ...

    def make_bad_sample(self, id: int, reason: str) -> BadSample: ...


class EpochOrder(Protocol):
    """What is asked of a `SampleOrder` or a `WholeOrder`."""

    @property
    def seed(self) -> int: ...

    def epoch(self, step: int) -> int: ...

    def ids(self, step: int, rank: int = 0, world: int = 1) -> Ids: ...


class LabeledBatch(NamedTuple):
    """One rank's share of a step."""

    step: int
    """number of the step, from 0 through all epochs"""
    ids: Ids
    """sample ids [B]"""
    images: Tensor
    """[B, 3, S, S], normalized, channels-last, on the device"""
    labels: Tensor
    """[B], int64, on the device"""


class _Views(NamedTuple):
    """What is drawn for each sample of a step."""

    windows: Windows
    """[B, 4]: top, left, height, width in pixels"""
    flips: npt.NDArray[np.bool_]
    """[B]"""
    draws: npt.NDArray[np.float64]
    """[B, DRAWS], those of RandAugment"""


def draw_views(
    recipe: LabeledCrops, seed: int, epoch: int, ids: Ids, heights: npt.ArrayLike, widths: npt.ArrayLike
) -> _Views:
    """Draw the window, the flip and RandAugment of samples `ids` [B], whose images are heights [B] by widths [B]."""
    draws = draw_uniform(seed, WINDOW_STREAM, epoch, ids[None, :], 0, _WINDOW_DRAWS)
    scale = np.array(recipe.scale)[None, None, :]
    windows = random_resized_crop(draws, scale, np.asarray(heights, np.int64), np.asarray(widths, np.int64))
    others = draw_uniform(seed, AUGMENT_STREAM, epoch, ids, 0, 1 + DRAWS)
    return _Views(windows[0], others[:, 0] < recipe.flip, others[:, 1:])


class LabeledCropLoader:
    """Loads batches of random crops, ahead of their use.

    `order` numbers the samples `ids`, or all samples where that is None. `name` says whose samples these are, in
    messages. `dtype` is the type of the images, and `rank` this process's number among `world`.
    """

    def __init__(
        self,
        index: LabeledSamples,
        name: str,
        order: EpochOrder,
        recipe: LabeledCrops,
        device: torch.device,
        dtype: torch.dtype,
        threads: int,
        rank: int = 0,
        world: int = 1,
        ids: Ids | None = None,
    ) -> None:
        self._index, self._name, self._order, self._recipe = index, name, order, recipe
        self._device, self._threads, self._rank, self._world = device, threads, rank, world
        scale, shift = find_scale_and_shift(recipe.normalization)
        self._scale, self._shift = (torch.tensor(each, device=device) for each in (scale, shift))
        self._dtype, self._ids = dtype, ids

    def load_batches(self, steps: Sequence[int]) -> Iterator[LabeledBatch]:
        """Yield this rank's share of each step. It may be empty where the order says so.

        Raises UserError, which names the sample, if a sample cannot be read.
        """
        with Prefetcher(self._make_batches(steps), _AHEAD, "making labeled batches") as made:
            for step, ids, levels in made:
                labels = torch.from_numpy(np.asarray(self._index.labels[ids], np.int64))
                images = self._normalize(move_to_device(levels, self._device))
                yield LabeledBatch(step, ids, images, move_to_device(labels, self._device))

    def _normalize(self, levels: Tensor) -> Tensor:
        """Map uint8 [B, S, S, 3] to [B, 3, S, S], channels-last. The host does not wait for a GPU."""
        return (levels * self._scale).add_(self._shift).to(self._dtype).permute(0, 3, 1, 2)

    # These run in the threads that work ahead.

    def _make_batches(self, steps: Sequence[int]) -> Iterator[tuple[int, Ids, Tensor]]:
        """Yield step, ids and 8-bit crops [B, S, S, 3]. One step is begun before the one before it is waited for."""
        with ThreadPoolExecutor(self._threads, thread_name_prefix="labeled crops") as pool:
            begun: tuple[int, Ids, Tensor, list[Future[None]]] | None = None
            for step in steps:
                following = self._begin(step, pool)
                if begun is not None:
                    yield self._finish(*begun)
                begun = following
            if begun is not None:
                yield self._finish(*begun)

    def _begin(self, step: int, pool: Executor) -> tuple[int, Ids, Tensor, list[Future[None]]]:
        places = self._order.ids(step, self._rank, self._world)
        ids = places if self._ids is None else self._ids[places]
        index, epoch = self._index, self._order.epoch(step)
        views = draw_views(self._recipe, self._order.seed, epoch, ids, index.heights[ids], index.widths[ids])
        crops = torch.empty(len(ids), self._recipe.size, self._recipe.size, 3, dtype=torch.uint8)

        def make(place: int) -> None:
            crops[place].numpy()[...] = self._make_crop(int(ids[place]), _Views(*(each[place] for each in views)))

        return step, ids, crops, [pool.submit(make, place) for place in range(len(ids))]

    def _finish(self, step: int, ids: Ids, crops: Tensor, made: list[Future[None]]) -> tuple[int, Ids, Tensor]:
        try:
            for each in made:
                each.result()
        except BadSample as error:
            raise UserError(f"{self._name}: cannot read {error}. Run `make-shards check {self._name}`.") from error
        return step, ids, crops

    def _make_crop(self, id: int, view: _Views) -> npt.NDArray[np.uint8]:
        """Return the crop of a sample, [S, S, 3]. Raises BadSample."""
        try:
            image = decode(self._index.read([id])[0])
            require_room(image, view.windows[None, None])
        except DecodeError as error:
            raise self._index.make_bad_sample(id, str(error)) from error
        top, left, height, width = view.windows.tolist()
        cut = crop(image, (top, left, height, width), self._recipe.size, self._recipe.interpolation)
        levels: npt.NDArray[np.uint8] = cut.permute(1, 2, 0).numpy()
        if view.flips:
            levels = levels[:, ::-1]
        if self._recipe.rand_augment:
            augmented = rand_augment(
                Image.fromarray(np.ascontiguousarray(levels)), self._recipe.rand_augment, view.draws
            )
            levels = np.asarray(augmented)
        return levels
