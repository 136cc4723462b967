"""The k-NN score of a backbone in the midst of its training, over the same few labelled pictures every time.

It is the weighted k-NN of `knn.py` on a part of the data, with as many pictures of each class as of the others where
there are enough: it shows how a run comes along, and stays below the score of `dino-fast knn` on all of them.
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

from dino_fast.distributed import Ranks
from dino_fast.durations import Duration
from dino_fast.evaluate.features import BATCH
from dino_fast.evaluate.knn import weighted_knn
from dino_fast.model.backbones import evaluating
from pipelines.labelled import labelled_batches
from pipelines.loader import default_threads
from shards.errors import UserError
from shards.index import ShardIndex

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class KnnRecipe:
    """The k-NN score that is taken of the teacher while it is trained."""

    train: str = ""
    """labelled shards that vote; empty: no score is taken"""
    val: str = ""
    """labelled shards that are classified"""
    every: Duration = 1
    """how often a score is taken"""
    pictures: Annotated[int, Ge(5)] = 5000
    """pictures of knn.train at most, and a fifth as many of knn.val: evenly from all classes, the same every time"""
    k: Annotated[int, Ge(1)] = 20
    """nearest pictures that vote"""
    resize: Annotated[int, Ge(0), Le(4096)] = 0
    """short side, pixels; 0: crop · 256 / 224"""
    crop: Annotated[int, Ge(0), Le(4096)] = 0
    """side of the centre crop, pixels; 0: crops.global_size"""

    @property
    def on(self) -> bool:
        return bool(self.train or self.val)


@dataclass(frozen=True)
class _Drawn:
    """The samples that were drawn from an index."""

    index: ShardIndex
    ids: Numbers  # [N]
    labels: Tensor  # [N], int64, on the device: places among the classes of the voting shards


class OnlineKnn:
    """Opened before the training, by every rank; then asked for scores, by every rank at the same steps.

    `global_size`: side of the recipe's global crops, pixels. UserError for what could give no score: it names the flag.
    """

    def __init__(self, recipe: KnnRecipe, global_size: int, ranks: Ranks) -> None:
        self._k, self._ranks = recipe.k, ranks
        self._crop = recipe.crop or global_size
        self._resize = recipe.resize or round(self._crop * 256 / 224)
        if self._resize < self._crop:
            raise UserError(
                f"--knn.resize {self._resize} is smaller than the crop of {self._crop} pixels: raise it, or lower "
                "--knn.crop"
            )
        train, val = open_labelled("train", recipe.train), open_labelled("val", recipe.val)
        places = matched(train, val)
        self._classes = len(train.classes)
        self._train = self._draw(train, np.arange(self._classes), recipe.pictures)
        self._val = self._draw(val, places, recipe.pictures // 5)
        if len(self._train.labels.unique()) < len(np.unique(train.labels)):
            raise UserError(
                f"--knn.pictures {recipe.pictures} is less than one for each class of --knn.train {train.folder}: "
                "raise it"
            )

    def _draw(self, index: ShardIndex, places: Numbers, total: int) -> _Drawn:
        ids = draw(index.labels, total)
        return _Drawn(index, ids, torch.from_numpy(places[index.labels[ids]]).to(self._ranks.device))

    @property
    def classified(self) -> int:
        """How many pictures a score is of."""
        return len(self._val.ids)

    def score(self, backbone: nn.Module) -> float:
        """Top-1 in percent, the same on all ranks, of a backbone [N, 3, H, W] → [N, D] on this rank's device; NaN where
        its features are not finite.

        Batch norms use their running statistics, and nothing of the backbone is changed. UserError on every rank where
        one could not read its pictures.
        """
        shares, problem = [], None
        try:
            with evaluating(backbone), torch.no_grad():
                shares = [self._own_features(backbone, drawn) for drawn in (self._train, self._val)]
        except (UserError, TimeoutError) as error:  # raised alone, it would leave the others waiting
            problem = str(error)
        self._raise_any(problem)
        train, val = (
            self._gathered(share, len(drawn.ids)) for share, drawn in zip(shares, (self._train, self._val), strict=True)
        )
        if not (train.isfinite().all() and val.isfinite().all()):
            return math.nan
        scores = weighted_knn(train, self._train.labels, val, self._val.labels, self._classes, (self._k,))
        return self._of_the_first(scores[self._k].top1)

    def _own_features(self, backbone: nn.Module, drawn: _Drawn) -> Tensor:
        """Of this rank's share of the samples: [n, D], float32, n the same on every rank."""
        part = _Subset(drawn.index, own_share(drawn.ids, self._ranks))
        with drawn.index:  # no files stay open between two scores
            batches = labelled_batches(cast(ShardIndex, part), BATCH, self._resize, self._crop, default_threads())
            # Not called but forwarded: that goes around the compiled graph, or there would be one more, for this mode.
            features = [backbone.forward(pictures.to(self._ranks.device)).float() for pictures, _ in batches]
        return torch.cat(features)

    # Between the ranks

    def _raise_any(self, problem: str | None) -> None:
        """UserError on every rank where one has a problem."""
        problems = [problem]
        if self._ranks.world > 1:
            problems *= self._ranks.world
            dist.all_gather_object(problems, problem)
        for found in filter(None, problems):
            raise UserError(found)

    def _gathered(self, share: Tensor, count: int) -> Tensor:
        """The ranks' shares [n, D] as one [count, D], in the order of which `own_share` gave each rank its part."""
        world = self._ranks.world
        if world == 1:
            return share
        shares = share.new_empty(world * len(share), share.shape[1])
        dist.all_gather_into_tensor(shares, share)
        return shares.unflatten(0, (world, -1)).transpose(0, 1).flatten(0, 1)[:count]

    def _of_the_first(self, score: float) -> float:
        """The first rank's: on a GPU votes are summed in any order, and a tie may fall either way."""
        shared = torch.tensor(score, dtype=torch.float64, device=self._ranks.device)
        if self._ranks.world > 1:
            dist.broadcast(shared, 0)
        return shared.item()


def open_labelled(name: str, folder: str) -> ShardIndex:
    """The labelled shards of the flag `--knn.NAME`. UserError for a folder that holds none."""
    if not folder:
        raise UserError(f"--knn.{name} is missing: labelled shards that vote (--knn.train) and others that are "
                        "classified (--knn.val) go together")  # fmt: skip
    try:
        index = ShardIndex(folder)
    except UserError as error:
        raise UserError(f"--knn.{name}: {error}") from error
    if not len(index) or not index.classes or (index.labels < 0).any():
        raise UserError(
            f"--knn.{name}: {folder} has samples without labels, or no samples: pass shards packed from class folders"
        )
    return index


def matched(train: ShardIndex, val: ShardIndex) -> Numbers:
    """The place among the classes of `train` of each class of `val`. UserError where there is none, and where both are
    the same data."""
    if train.fingerprint == val.fingerprint:
        raise UserError(
            f"--knn.val {val.folder} holds the pictures of --knn.train, and each would find itself: pass others"
        )
    if unknown := sorted(set(val.classes) - set(train.classes)):
        raise UserError(
            f"--knn.val {val.folder} has classes that --knn.train {train.folder} lacks ({', '.join(unknown[:5])}): "
            "pass shards of the same classes"
        )
    return np.array([train.classes.index(name) for name in val.classes])


def draw(labels: npt.NDArray[np.integer], total: int) -> Numbers:
    """At most `total` of the samples with these `labels` [N], sorted: of every class as many as of the others, or all
    it has, at even distances in the order of the samples. There is no chance in it."""
    sizes = np.bincount(labels)
    counts = even_counts(sizes, min(total, len(labels)))
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[:-1])
    return np.sort(np.concatenate([ids[_spread(len(ids), n)] for ids, n in zip(by_class, counts, strict=True)]))


def even_counts(sizes: Numbers, total: int) -> Numbers:
    """`total`, at most the sum of `sizes` [C], as evenly as these allow: [C]. What does not divide goes to classes at
    even distances."""
    level = bisect.bisect(range(int(sizes.max()) + 1), total, key=lambda each: np.minimum(sizes, each).sum()) - 1
    counts = np.minimum(sizes, level)
    with_more = np.flatnonzero(sizes > level)
    counts[with_more[_spread(len(with_more), total - int(counts.sum()))]] += 1
    return counts


def _spread(size: int, count: int) -> Numbers:
    """`count` ≤ size of range(size), at even distances."""
    return (2 * np.arange(count) + 1) * size // max(1, 2 * count)


def own_share(ids: Numbers, ranks: Ranks) -> Numbers:
    """Every world-th of `ids`, after these were filled up with their first ones until all ranks have equally many."""
    each = -(-len(ids) // ranks.world)
    return np.resize(ids, each * ranks.world)[ranks.rank :: ranks.world]


class _Subset:
    """Some samples of an index, numbered anew: all of a `ShardIndex` that `labelled_batches` asks for."""

    def __init__(self, index: ShardIndex, ids: Numbers) -> None:
        self.folder, self.labels = index.folder, index.labels[ids]
        self._index, self._ids = index, ids

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, numbers: list[int]) -> list[bytes]:
        return self._index.read(self._ids[numbers])

    def describe(self, number: int) -> str:
        return self._index.describe(int(self._ids[number]))
