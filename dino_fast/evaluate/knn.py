"""Weighted k-nearest-neighbor classification of frozen features (Wu et al. 2018, section 3.4).

The scores are those of `knn_classifier` in facebookresearch/dino `eval_knn.py`. `dino-fast knn` is at the end.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dino_fast.distributed import join_ranks
from dino_fast.evaluate.arguments import (
    EvaluationParser,
    build_extraction,
    load_backbone_from,
    name_network,
    write_json,
)
from dino_fast.evaluate.features import Extraction, check_labels, choose_samples, compute_features, move_if_it_fits
from dino_fast.evaluate.nearest import find_nearest, split_rows
from pipelines.labeled import CenterCrop
from shards.index import ShardIndex

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07


@dataclass(frozen=True)
class KnnScore:
    """The accuracies for one k."""

    top1: float
    """percent of the images whose class gets the most votes"""
    top5: float
    """percent of the images whose class is among the first five that have votes"""


def score_weighted_knn(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    classes: int,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
) -> dict[int, KnnScore]:
    """Score each k: the k training images of highest cosine vote for their class with exp(cosine / temperature).

    train_features: [N, D], test_features: [M, D], of floating types; they are normalized to length 1 here. What is
    computed with has the type and device of test_features. Labels: [N] and [M], int64, from 0 to classes − 1. A k above
    N means all N. Raises ValueError where the inputs do not fit each other.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"k-NN needs at least one k, each 1 or more, not {tuple(ks)}")
    check_labels("train", train_features, train_labels, classes)
    check_labels("test", test_features, test_labels, classes)
    hits = _count_all_hits(train_features, train_labels, test_features, test_labels, classes, ks, temperature)
    return _make_scores(hits, ks, len(test_labels))


def _count_all_hits(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    classes: int,
    ks: Sequence[int],
    temperature: float,
) -> Tensor:
    """Count, for each k, the test images whose class has the most votes, and is among the first five: [ks, 2]."""
    hits = torch.zeros(len(ks), 2, dtype=torch.int64, device=test_features.device)
    train_labels, test_labels = train_labels.to(hits.device), test_labels.to(hits.device)
    rows = split_rows(classes)
    for test, labels in zip(test_features.split(rows), test_labels.split(rows), strict=True):
        cosines, neighbors = find_nearest(test, train_features, max(ks))
        # The factor exp(-1 / temperature) changes no comparison, and keeps a low temperature from overflowing.
        weights = ((cosines - 1) / temperature).exp()
        for row, k in zip(hits, ks, strict=True):
            row += _count_hits(weights[:, :k], train_labels[neighbors[:, :k]], labels, classes)
    return hits


def _make_scores(hits: Tensor, ks: Sequence[int], images: int) -> dict[int, KnnScore]:
    percent = (100 * hits.double() / images).tolist()
    return {k: KnnScore(top1, top5) for k, (top1, top5) in zip(ks, percent, strict=True)}


def _count_hits(weights: Tensor, neighbor_labels: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Count the rows whose label has the most votes, and those where it is among the first five: [2], int64.

    A class without a vote is no answer. The published code counts it where fewer than five classes have votes.
    """
    votes = weights.new_zeros(len(weights), classes).scatter_add_(1, neighbor_labels, weights)
    ranked = votes.sort(dim=1, descending=True)
    found = min(5, weights.shape[1])
    correct = (ranked.indices[:, :found] == labels[:, None]) & (ranked.values[:, :found] > 0)
    return torch.stack([correct[:, 0].sum(), correct.sum()])


def evaluate_knn(network: nn.Module, train: ShardIndex, val: ShardIndex, how: Extraction) -> dict[int, KnnScore]:
    """Score a network's features of `val` against those of `train`. The ranks share the images of `val`.

    Raises UserError where the classes do not fit.
    """
    found, ranks = compute_features(network, train, val, how), how.ranks
    share = slice(ranks.rank, None, ranks.world)
    hits = _count_all_hits(
        move_if_it_fits(found.train, ranks.device), found.train_labels,
        found.val[share].to(ranks.device, torch.float32), found.val_labels[share], found.classes, KS, TEMPERATURE,
    )  # fmt: skip
    if ranks.world > 1:
        dist.all_reduce(hits)
    return _make_scores(hits, KS, len(found.val))


def explain_equal_rows(images: int, ks: Iterable[int]) -> list[str]:
    """Return a line that says which rows are the same, because their k is above the number of training images."""
    above = [k for k in ks if k > images]
    if not above:
        return []
    names = " and ".join(f"k = {k}" for k in sorted({*above, *(k for k in ks if k == images)}))
    what = f"the rows of {names} are the same" if " and " in names else f"the row of {names} is that of k = {images}"
    return [f"--train has {images} images, and a larger k means all of them: {what}."]


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command's flags."""
    return EvaluationParser(
        "knn",
        "Score a trained backbone by weighted k-NN: each image of --val gets the class for which its nearest images of "
        "--train vote. Nothing is trained.",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dino-fast knn`: print the scores of a checkpoint's backbone, and write them to --json FILE."""
    options = build_parser().parse_args(arguments)
    backbone, center, evaluation = load_backbone_from(options)
    with join_ranks(options.device) as ranks, ShardIndex(options.train) as train, ShardIndex(options.val) as val:
        how = build_extraction(options, evaluation, center, ranks)
        scores = evaluate_knn(backbone, train, val, how)
        images = {"train": len(choose_samples(train, how.limit)), "val": len(choose_samples(val, how.limit))}
    if ranks.first:
        _print_scores(scores, images, name_network(evaluation), center)
        rows = {str(k): asdict(score) for k, score in scores.items()}
        write_json(options.json, {**evaluation, **images, "temperature": TEMPERATURE, "knn": rows})
    return 0


def _print_scores(scores: dict[int, KnnScore], images: dict[str, int], network: str, center: CenterCrop) -> None:
    print(f"{network}: {images['train']} train and {images['val']} val images")
    print(f"short side {center.resize}, center crop {center.crop}, temperature {TEMPERATURE}")
    for k, score in scores.items():
        print(f"k = {k:3d}: top-1 {score.top1:6.2f} %   top-5 {score.top5:6.2f} %")
    for line in explain_equal_rows(images["train"], scores):
        print(line)
