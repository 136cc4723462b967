"""The k-NN score of a backbone while it is trained, over the same few labeled images every time.

It is the weighted k-NN of `knn.py` on a part of the data, with equally many images of each class where there are
enough. It shows whether a run gets better. It stays below the score of `dino-fast knn`, which uses all images.
"""

import bisect
import math
from dataclasses import dataclass
from typing import Annotated, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from annotated_types import Ge, Le
from torch import Tensor, nn

from dino_fast.distributed import Ranks, gather_objects
from dino_fast.durations import Duration
from dino_fast.evaluate.features import BATCH_SIZE
from dino_fast.evaluate.knn import score_weighted_knn
from dino_fast.model.backbones import evaluating
from pipelines.labeled import CenterCrop, choose_resize, load_labeled_batches
from pipelines.loader import count_default_threads
from pipelines.photometric import IMAGENET, Normalization
from shards.errors import UserError
from shards.index import ShardIndex

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class KnnRecipe:
    """The k-NN score that is taken of the teacher while it is trained."""

    train: str = ""
    """folder or URL of labeled shards whose images vote; empty: no score is taken"""
    val: str = ""
    """folder or URL of labeled shards whose images are classified"""
    every: Duration = 1
    """how often a score is taken; a number counts epochs"""
    images: Annotated[int, Ge(5)] = 5000
    """how many images of knn.train vote at most; a fifth as many of knn.val are classified. They are spread evenly over
    all classes, and are the same every time"""
    k: Annotated[int, Ge(1)] = 20
    """how many nearest images vote"""
    resize: Annotated[int, Ge(0), Le(4096)] = 0
    """short side of the resized image, pixels; 0: crop · 256 / 224"""
    crop: Annotated[int, Ge(0), Le(4096)] = 0
    """side of the center crop, pixels; 0: crops.global_size"""

    @property
    def enabled(self) -> bool:
        """Whether a score is asked for. `OnlineKnn` refuses a recipe that names only one of the two sets."""
        return bool(self.train or self.val)


@dataclass(frozen=True)
class _Samples:
    """The samples that were selected from an index."""

    index: ShardIndex
    """the shards they lie in"""
    ids: Numbers
    """[N], their numbers in the index"""
    labels: Tensor
    """[N], int64, on the device; they number the classes as the voting shards do"""


class OnlineKnn:
    """Takes k-NN scores while a backbone is trained. Every rank makes one, and all ask for scores at the same steps.

    `global_size`: side of the recipe's global crops, pixels. `normalization`: that of the run's batches. Raises
    UserError, which names the flag, for a recipe that could give no score.
    """

    def __init__(
        self, recipe: KnnRecipe, global_size: int, ranks: Ranks, normalization: Normalization = IMAGENET
    ) -> None:
        self._k, self._ranks = recipe.k, ranks
        crop = recipe.crop or global_size
        resize = recipe.resize or choose_resize(crop)
        if resize < crop:
            raise UserError(
                f"--knn.resize {resize} is smaller than the crop of {crop} pixels. Raise it, or lower --knn.crop."
            )
        self._center = CenterCrop(resize, crop, normalization)
        train, val = open_labeled_shards("train", recipe.train), open_labeled_shards("val", recipe.val)
        train_numbers = match_classes(train, val)
        self._classes = len(train.classes)
        self._train = self._select(train, np.arange(self._classes), recipe.images)
        self._val = self._select(val, train_numbers, recipe.images // 5)
        if len(self._train.labels.unique()) < len(np.unique(train.labels)):
            raise UserError(
                f"--knn.images {recipe.images} is less than one image for each class of --knn.train {train.folder}. "
                "Raise it."
            )

    def _select(self, index: ShardIndex, train_numbers: Numbers, total: int) -> _Samples:
        """Select at most `total` samples. `train_numbers`: [classes of `index`], their numbers in the voting shards."""
        ids = select_evenly(index.labels, total)
        return _Samples(index, ids, torch.from_numpy(train_numbers[index.labels[ids]]).to(self._ranks.device))

    @property
    def val_images(self) -> int:
        """How many images are classified for a score."""
        return len(self._val.ids)

    def score(self, backbone: nn.Module) -> float:
        """Return the top-1 of a backbone [N, 3, H, W] → [N, D] on this rank's device, in percent.

        It is the same on all ranks, and NaN where features are not finite. Batch norms use their running statistics.
        Nothing in the backbone is changed. Raises UserError on every rank where one rank could not read its images.
        """
        shares, problem = [], None
        try:
            with evaluating(backbone), torch.no_grad():
                shares = [self._compute_share(backbone, samples) for samples in (self._train, self._val)]
        except (UserError, TimeoutError) as error:  # raised here alone, it would leave the other ranks waiting
            problem = str(error)
        self._raise_on_all_ranks(problem)
        train, val = (
            self._gather(share, len(samples.ids))
            for share, samples in zip(shares, (self._train, self._val), strict=True)
        )
        if not (train.isfinite().all() and val.isfinite().all()):
            return math.nan
        scores = score_weighted_knn(train, self._train.labels, val, self._val.labels, self._classes, (self._k,))
        return self._broadcast_from_first_rank(scores[self._k].top1)

    def _compute_share(self, backbone: nn.Module, samples: _Samples) -> Tensor:
        """Compute the features of this rank's share of the samples: [n, D], float32, n the same on every rank."""
        subset = _Subset(samples.index, take_share(samples.ids, self._ranks))
        with samples.index:  # its files are closed between two scores
            batches = load_labeled_batches(cast(ShardIndex, subset), BATCH_SIZE, self._center, count_default_threads())
            # `forward` goes around the compiled graph. A call would compile one more graph, for evaluation mode.
            features = [backbone.forward(images.to(self._ranks.device)).float() for images, _ in batches]
        return torch.cat(features)

    # Between the ranks

    def _raise_on_all_ranks(self, problem: str | None) -> None:
        """Raise UserError on every rank if one rank has a problem."""
        for found in filter(None, gather_objects(problem, self._ranks)):
            raise UserError(found)

    def _gather(self, share: Tensor, count: int) -> Tensor:
        """Join the ranks' shares [n, D] into one [count, D], in the order of the ids that `take_share` divided."""
        world = self._ranks.world
        if world == 1:
            return share
        shares = share.new_empty(world * len(share), share.shape[1])
        dist.all_gather_into_tensor(shares, share)
        return shares.unflatten(0, (world, -1)).transpose(0, 1).flatten(0, 1)[:count]

    def _broadcast_from_first_rank(self, score: float) -> float:
        """Return the first rank's score. A GPU sums votes in any order, so that ranks may break a tie differently."""
        shared = torch.tensor(score, dtype=torch.float64, device=self._ranks.device)
        if self._ranks.world > 1:
            dist.broadcast(shared, 0)
        return shared.item()


def open_labeled_shards(name: str, folder: str) -> ShardIndex:
    """Open the labeled shards of the flag `--knn.NAME`. Raises UserError for a folder that holds none."""
    if not folder:
        raise UserError(
            f"--knn.{name} is missing. A k-NN score needs both --knn.train (labeled shards whose images vote) and "
            "--knn.val (labeled shards whose images are classified)."
        )
    try:
        index = ShardIndex(folder)
    except UserError as error:
        raise UserError(f"--knn.{name}: {error}") from error
    if not len(index) or not index.classes or (index.labels < 0).any():
        raise UserError(
            f"--knn.{name} {folder} has samples without labels, or no samples. Pass shards packed from class folders."
        )
    return index


def match_classes(train: ShardIndex, val: ShardIndex) -> Numbers:
    """Return, for each class of `val`, the number of the same class in `train`: [classes of `val`].

    Raises UserError where `train` lacks a class, and where both are the same data.
    """
    if train.fingerprint == val.fingerprint:
        raise UserError(
            f"--knn.val {val.folder} holds the same images as --knn.train, and each image would find itself. Pass "
            "other shards."
        )
    if unknown := sorted(set(val.classes) - set(train.classes)):
        raise UserError(
            f"--knn.val {val.folder} has classes that --knn.train {train.folder} lacks ({', '.join(unknown[:5])}). "
            "Pass shards of the same classes."
        )
    return np.array([train.classes.index(name) for name in val.classes])


# Which samples are used


def select_evenly(labels: npt.NDArray[np.integer], total: int) -> Numbers:
    """Return the numbers of at most `total` of the samples with these `labels` [N], sorted.

    Every class gives as many as the others, or all it has, at even distances in the order of the samples. Nothing is
    random.
    """
    sizes = np.bincount(labels)
    counts = divide_evenly(sizes, min(total, len(labels)))
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[:-1])
    return np.sort(np.concatenate([ids[_space_evenly(len(ids), n)] for ids, n in zip(by_class, counts, strict=True)]))


def divide_evenly(sizes: Numbers, total: int) -> Numbers:
    """Divide `total`, at most the sum of `sizes` [C], among classes of these sizes as evenly as they allow: [C].

    The remainder goes to classes at even distances.
    """
    level = bisect.bisect(range(int(sizes.max()) + 1), total, key=lambda each: np.minimum(sizes, each).sum()) - 1
    counts = np.minimum(sizes, level)
    with_more = np.flatnonzero(sizes > level)
    counts[with_more[_space_evenly(len(with_more), total - int(counts.sum()))]] += 1
    return counts


def _space_evenly(size: int, count: int) -> Numbers:
    """Return `count` ≤ size numbers of range(size), at even distances."""
    return (2 * np.arange(count) + 1) * size // max(1, 2 * count)


def take_share(ids: Numbers, ranks: Ranks) -> Numbers:
    """Return every world-th of `ids`. The first ids are repeated at the end until all ranks have equally many."""
    each = -(-len(ids) // ranks.world)
    return np.resize(ids, each * ranks.world)[ranks.rank :: ranks.world]


class _Subset:
    """Some samples of an index, numbered from 0: as much of a `ShardIndex` as `load_labeled_batches` needs."""

    def __init__(self, index: ShardIndex, ids: Numbers) -> None:
        self.folder, self.labels = index.folder, index.labels[ids]
        self._index, self._ids = index, ids

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, numbers: list[int]) -> list[bytes]:
        return self._index.read(self._ids[numbers])

    def describe(self, number: int) -> str:
        return self._index.describe(int(self._ids[number]))
