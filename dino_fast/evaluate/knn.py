"""Weighted k-nearest-neighbor classification of frozen features (Wu et al. 2018, section 3.4).

The scores are those of `knn_classifier` in facebookresearch/dino `eval_knn.py`. `dino-fast knn` is at the end.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_fast.distributed import choose_device
from dino_fast.evaluate.arguments import EvaluationParser, load_backbone_from, name_network
from dino_fast.evaluate.features import check_labels, compute_features
from pipelines.labeled import CenterCrop
from shards.index import ShardIndex

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07

_MAX_SIMILARITIES = 2**26  # held at once: 256 MB in float32


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

    train_features: [N, D], test_features: [M, D], of one floating type and device; they are normalized to length 1
    here. Labels: [N] and [M], int64, from 0 to classes − 1. A k above N means all N. The function holds at most 2²⁶
    similarities at once, or one row of N. Raises ValueError where the inputs do not fit each other.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"k-NN needs at least one k, each 1 or more, not {tuple(ks)}")
    check_labels("train", train_features, train_labels, classes)
    check_labels("test", test_features, test_labels, classes)
    train = F.normalize(train_features, dim=1)
    rows = max(1, _MAX_SIMILARITIES // max(len(train), classes))
    hits = torch.zeros(len(ks), 2, dtype=torch.int64, device=train.device)
    for test, labels in zip(F.normalize(test_features, dim=1).split(rows), test_labels.split(rows), strict=True):
        cosines, neighbors = (test @ train.T).topk(min(max(ks), len(train)), dim=1)
        # The factor exp(-1 / temperature) changes no comparison, and keeps a low temperature from overflowing.
        weights = ((cosines - 1) / temperature).exp()
        for row, k in zip(hits, ks, strict=True):
            row += _count_hits(weights[:, :k], train_labels[neighbors[:, :k]], labels, classes)
    percent = (100 * hits.double() / len(test_labels)).tolist()
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


def evaluate_knn(
    backbone: nn.Module, train: ShardIndex, val: ShardIndex, center: CenterCrop, device: torch.device
) -> dict[int, KnnScore]:
    """Score a backbone's features of `val` against those of `train`. Raises UserError where the classes do not fit."""
    found = compute_features(backbone, train, val, center, device)
    return score_weighted_knn(found.train, found.train_labels, found.val, found.val_labels, found.classes)


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
    with ShardIndex(options.train) as train, ShardIndex(options.val) as val:
        scores = evaluate_knn(backbone, train, val, center, choose_device(options.device, 0))
        print(f"{name_network(evaluation)}: {len(train)} train and {len(val)} val images")
        print(f"short side {center.resize}, center crop {center.crop}, temperature {TEMPERATURE}")
    for k, score in scores.items():
        print(f"k = {k:3d}: top-1 {score.top1:6.2f} %   top-5 {score.top5:6.2f} %")
    for line in explain_equal_rows(len(train), scores):
        print(line)
    if options.json:
        rows = {str(k): asdict(score) for k, score in scores.items()}
        result = {**evaluation, "temperature": TEMPERATURE, "knn": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0
