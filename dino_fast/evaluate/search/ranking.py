"""Scores of rankings: average precision, and the precision among the first k, as the retrieval benchmarks define them.

A database image may be ignored for a query. It is then removed from the query's ranking before anything is counted,
so that it moves no other image. The figures are those of `compute_map` in filipradenovic/revisitop, and of the Holidays
evaluation package for copies.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from torch import Tensor

from dino_fast.evaluate.nearest import MAX_SIMILARITIES

Ids = npt.NDArray[np.int64]


class Choice(NamedTuple):
    """A choice of the images that count as positives for each query. All other ones are negatives."""

    positives: Sequence[Ids]
    """database ids, an array for each query"""
    ignored: Sequence[Ids]
    """database ids that are removed from the ranking, an array for each query"""


@dataclass(frozen=True)
class RankingScore:
    """The scores of all queries under one choice of positives."""

    mean_ap: float
    """mean of the queries' average precisions, 0 to 1; NaN where no query has a positive"""
    precision: dict[int, float]
    """mean precision among the first k images, by k"""
    average_precisions: tuple[float | None, ...]
    """one for each query; None for a query without positives, which counts nowhere"""

    @property
    def queries(self) -> int:
        """How many queries have positives."""
        return sum(value is not None for value in self.average_precisions)


def compute_average_precision(ranks: Sequence[int], positives: int) -> float:
    """Return the average precision of one query, 0 to 1.

    ranks: places of the positives that were found, from 0, rising. positives: how many there are, found or not. Every
    hit adds the mean of the precisions just before it and at it: the area under the curve of precision and recall by
    trapezoids. (scikit-learn takes the precision at the hit alone.)
    """
    area = 0.0
    for found, rank in enumerate(ranks):
        before = found / rank if rank else 1.0
        area += (before + (found + 1) / (rank + 1)) / 2
    return area / positives


def find_ranks(order: Ids, positives: Ids, ignored: Ids) -> Ids:
    """Return the places of the positives in a ranking without the ignored images: from 0, rising.

    order: every database id [N], the most similar first. An id that is both positive and ignored is ignored.
    """
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    removed = np.sort(places[np.unique(ignored)])
    found = np.sort(places[np.setdiff1d(positives, ignored)])
    return found - np.searchsorted(removed, found)


def compute_precision(ranks: Ids, k: int) -> float:
    """Return the share of positives among the first k images. `ranks`: their places, from 0, rising, at least one.

    k is lowered to the place of the last positive, so that a query with few positives can reach 1.
    """
    k = min(k, int(ranks[-1]) + 1)
    return float((ranks < k).sum() / k)


def score_rankings(orders: Iterable[Ids], choices: Mapping[str, Choice], ks: Sequence[int]) -> dict[str, RankingScore]:
    """Score the rankings of all queries by each choice of positives.

    orders: for each query every database id, the most similar first. They may be made one by one.
    """
    ranks: dict[str, list[Ids]] = {name: [] for name in choices}
    for query, order in enumerate(orders):
        for name, choice in choices.items():
            ranks[name].append(find_ranks(order, choice.positives[query], choice.ignored[query]))
    return {name: score_ranks(found, ks) for name, found in ranks.items()}


def score_ranks(ranks: Sequence[Ids], ks: Sequence[int]) -> RankingScore:
    """Score the places of each query's positives, which `find_ranks` returned."""
    each = [compute_average_precision(found.tolist(), len(found)) if len(found) else None for found in ranks]
    precision = {k: _mean([compute_precision(found, k) for found in ranks if len(found)]) for k in ks}
    return RankingScore(_mean([value for value in each if value is not None]), precision, tuple(each))


def rank_images(queries: Tensor, database: Tensor) -> Iterator[Ids]:
    """Yield, for each query [Q, D], the database ids [N] in the order of their cosine with it, the nearest first.

    database: [N, D], of the same type and device. Among equals the lower id comes first.
    """
    for block in compute_similarities(queries, database):
        yield from block.argsort(dim=1, descending=True, stable=True).cpu().numpy()


def compute_similarities(queries: Tensor, database: Tensor) -> Iterator[Tensor]:
    """Yield the cosines [q, N] of some queries at a time with the whole database."""
    database = F.normalize(database, dim=1)
    for some in F.normalize(queries, dim=1).split(max(1, MAX_SIMILARITIES // len(database))):
        yield some @ database.T


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
