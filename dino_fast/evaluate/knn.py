"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, section 3.4).

The numbers are those of `knn_classifier` in facebookresearch/dino `eval_knn.py`. `dino-fast knn` is at the end.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_fast.distributed import choose_device
from dino_fast.evaluate.features import extract, load_backbone
from shards.errors import UserError
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
    _check(train_features, train_labels, test_features, test_labels, classes, ks)
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


def _check(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    classes: int,
    ks: Sequence[int],
) -> None:
    if not ks or min(ks) < 1:
        raise ValueError(f"k-NN needs at least one k, each 1 or more, not {tuple(ks)}")
    for name, features, labels in (("train", train_features, train_labels), ("test", test_features, test_labels)):
        if not len(labels) or len(features) != len(labels):
            raise ValueError(f"{len(features)} {name} features with {len(labels)} labels cannot be classified")
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"the {name} labels do not lie in 0 to {classes - 1}")


def knn_score(
    backbone: nn.Module, train: ShardIndex, val: ShardIndex, resize: int, crop: int, device: torch.device
) -> dict[int, KnnScore]:
    """Score a backbone's features of `val` against those of `train`. UserError where the classes do not fit."""
    for index in (train, val):
        if not index.classes or (index.labels < 0).any():
            raise UserError(f"{index.folder} has samples without labels: k-NN needs shards packed from class folders")
    unknown = sorted(set(val.classes) - set(train.classes))
    if unknown:
        raise UserError(f"{val.folder} has classes that {train.folder} lacks: {', '.join(unknown[:5])}")
    train_features, train_labels = extract(backbone, train, resize, crop, device)
    val_features, val_labels = extract(backbone, val, resize, crop, device)
    places = torch.tensor([train.classes.index(name) for name in val.classes], device=device)
    return weighted_knn(train_features, train_labels, val_features, places[val_labels], len(train.classes))


def knn_command(arguments: Sequence[str]) -> int:
    """`dino-fast knn`: print the scores of a checkpoint's backbone, and write them to --json FILE."""
    options = _parser().parse_args(arguments)
    if options.json and not options.json.parent.is_dir():
        raise UserError(f"--json {options.json}: no such folder; make it first")
    backbone, recipe, step = load_backbone(options.checkpoint, options.network)
    crop = options.crop or recipe["crops"]["global_size"]
    resize = options.resize or round(crop * 256 / 224)
    if resize < crop:
        raise UserError(f"--resize {resize} is smaller than the crop of {crop} pixels: raise it, or lower --crop")
    with ShardIndex(options.train) as train, ShardIndex(options.val) as val:
        scores = knn_score(backbone, train, val, resize, crop, choose_device(options.device, 0))
        print(f"{options.network} after {step} steps: {len(train)} train and {len(val)} val pictures")
        print(f"short side {resize}, centre crop {crop}, temperature {TEMPERATURE}")
    for k, score in scores.items():
        print(f"k = {k:3d}: top-1 {score.top1:6.2f} %   top-5 {score.top5:6.2f} %")
    if options.json:
        result = {
            "checkpoint": str(options.checkpoint), "step": step, "network": options.network, "resize": resize,
            "crop": crop, "temperature": TEMPERATURE, "knn": {str(k): asdict(score) for k, score in scores.items()},
        }  # fmt: skip
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dino-fast knn", description="Weighted k-NN score of a trained backbone.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a step-….pt file, or a run's folder")
    parser.add_argument("--train", type=Path, required=True, help="labelled shards that vote")
    parser.add_argument("--val", type=Path, required=True, help="labelled shards that are classified")
    parser.add_argument("--network", choices=("teacher", "student"), default="teacher", help="default: teacher")
    parser.add_argument("--resize", type=_pixels, help="short side; default: crop · 256 / 224")
    parser.add_argument("--crop", type=_pixels, help="side of the centre crop; default: the recipe's global size")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    return parser


def _pixels(text: str) -> int:
    if not text.isdigit() or not 16 <= int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"expected pixels, 16 to 4096, not {text!r}")
    return int(text)
