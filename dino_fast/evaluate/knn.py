"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, section 3.4).

The numbers are those of `knn_classifier` in facebookresearch/dino `eval_knn.py`. `dino-fast knn` is at the end.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_fast.distributed import choose_device
from dino_fast.evaluate.features import OptionParser, check_labels, chosen, features_of
from shards.index import ShardIndex

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07

_SIMILARITIES_AT_ONCE = 2**26  # 256 MB in float32


@dataclass(frozen=True)
class KnnScore:
    """Accuracies in percent."""

    top1: float
    top5: float
    """the share whose class is among the first min(5, k, classes)"""


def weighted_knn(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    classes: int,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
) -> dict[int, KnnScore]:
    """Score each k: the k nearest training images by cosine vote for their class with exp(cosine / temperature).

    train_features: [N, D], test_features: [M, D] of one floating type and device, normalised to length 1 here; labels:
    [N] and [M], int64, from 0 to classes − 1. A k above N means all N. Holds at most 2²⁶ similarities at once, or one
    row of N. Raises ValueError where the inputs do not fit each other.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"k-NN needs at least one k, each 1 or more, not {tuple(ks)}")
    check_labels("train", train_features, train_labels, classes)
    check_labels("test", test_features, test_labels, classes)
    train = F.normalize(train_features, dim=1)
    rows = max(1, _SIMILARITIES_AT_ONCE // max(len(train), classes))
    hits = torch.zeros(len(ks), 2, dtype=torch.int64, device=train.device)
    for test, labels in zip(F.normalize(test_features, dim=1).split(rows), test_labels.split(rows), strict=True):
        nearest, where = (test @ train.T).topk(min(max(ks), len(train)), dim=1)
        # The factor exp(-1 / temperature) changes no comparison, and keeps a low temperature from overflowing.
        weights = ((nearest - 1) / temperature).exp()
        for row, k in zip(hits, ks, strict=True):
            row += _hits(weights[:, :k], train_labels[where[:, :k]], labels, classes)
    percent = (100 * hits.double() / len(test_labels)).tolist()
    return {k: KnnScore(top1, top5) for k, (top1, top5) in zip(ks, percent, strict=True)}


def _hits(weights: Tensor, neighbours: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How many rows have their label as the best-voted class, and among the first five: [2]."""
    votes = weights.new_zeros(len(weights), classes).scatter_add_(1, neighbours, weights)
    ranked = votes.sort(dim=1, descending=True).indices[:, : min(5, weights.shape[1])]
    correct = ranked == labels[:, None]
    return torch.stack([correct[:, 0].sum(), correct.sum()])


def knn_score(
    backbone: nn.Module, train: ShardIndex, val: ShardIndex, resize: int, crop: int, device: torch.device
) -> dict[int, KnnScore]:
    """Score a backbone's features of `val` against those of `train`. UserError where the classes do not fit."""
    of = features_of(backbone, train, val, resize, crop, device)
    return weighted_knn(of.train, of.train_labels, of.val, of.val_labels, of.classes)


def knn_command(arguments: Sequence[str]) -> int:
    """`dino-fast knn`: print the scores of a checkpoint's backbone, and write them to --json FILE."""
    options = OptionParser("knn", "Weighted k-NN score of a trained backbone.").parse_args(arguments)
    backbone, about = chosen(options)
    resize, crop = about["resize"], about["crop"]
    with ShardIndex(options.train) as train, ShardIndex(options.val) as val:
        scores = knn_score(backbone, train, val, resize, crop, choose_device(options.device, 0))
        print(f"{options.network} after {about['step']} steps: {len(train)} train and {len(val)} val pictures")
        print(f"short side {resize}, centre crop {crop}, temperature {TEMPERATURE}")
    for k, score in scores.items():
        print(f"k = {k:3d}: top-1 {score.top1:6.2f} %   top-5 {score.top5:6.2f} %")
    if options.json:
        result = {**about, "temperature": TEMPERATURE, "knn": {str(k): asdict(score) for k, score in scores.items()}}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0
