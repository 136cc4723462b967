"""Linear classification of frozen features: one layer trained by SGD, at many learning rates at once.

The training is that of `eval_linear.py` in facebookresearch/dino: weights drawn with a standard deviation of 0.01,
biases 0, cross-entropy, momentum 0.9, no weight decay, lr · batch / 256, a cosine to 0 that steps once an epoch, 100
epochs. For a ResNet-50 the features are, as published, those after the average pool. What differs:

- features are computed once, from the centre crop: no random crops and no flips in training;
- several learning rates are tried, and the best by top-1 on `val` is reported beside all the others;
- scores are those after the last epoch, not of the best one;
- batches of 1024, not of 128 a GPU.

`dino-fast linear` is at the end.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_fast.distributed import choose_device
from dino_fast.evaluate.features import OptionParser, check_labels, chosen, features_of, progress
from shards.errors import UserError
from shards.index import ShardIndex

MOMENTUM = 0.9
INITIAL_STD = 0.01

_LOGITS_AT_ONCE = 2**26  # 256 MB in float32


@dataclass(frozen=True)
class Protocol:
    """How the heads are trained. ValueError for what cannot be."""

    lrs: tuple[float, ...] = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    """of the first epoch, for a batch of 256; published: 0.001, to be tuned for each checkpoint"""
    epochs: int = 100
    batch: int = 1024
    seed: int = 0
    """of the initial weights and of the orders"""

    def __post_init__(self) -> None:
        if not self.lrs or not all(0 < lr < math.inf for lr in self.lrs):
            raise ValueError(f"learning rates must be numbers above 0, and at least one, not {self.lrs}")
        if self.epochs < 1 or self.batch < 1 or self.seed < 0:
            raise ValueError("epochs and batch must be 1 or more, and the seed 0 or more")

    def rates(self, epoch: int) -> list[float]:
        """What SGD multiplies a step by: each head's rate in an epoch (from 0), scaled by the batch."""
        cosine = (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        return [lr * self.batch / 256 * cosine for lr in self.lrs]

    def order(self, epoch: int, samples: int) -> Tensor:
        """The order of the samples in an epoch, [samples], int64: a pure function of (seed, epoch)."""
        return torch.from_numpy(np.random.default_rng([self.seed, epoch]).permutation(samples))


@dataclass
class Heads:
    """R linear layers side by side: one matrix product gives the logits of all."""

    weights: Tensor  # [R, C, D]
    biases: Tensor  # [R, C]

    def logits(self, x: Tensor) -> Tensor:
        """[B, D] → [B, R, C]."""
        return F.linear(x, self.weights.flatten(0, 1), self.biases.flatten()).unflatten(1, self.biases.shape)


@dataclass(frozen=True)
class LinearScore:
    """A head's accuracies in percent, after the last epoch."""

    lr: float
    """for a batch of 256"""
    top1: float
    top5: float
    """the share whose class is among the first min(5, classes)"""


@torch.inference_mode()
def train_heads(features: Tensor, labels: Tensor, classes: int, protocol: Protocol, device: torch.device) -> Heads:
    """Train a head for each learning rate on the device; all of them start alike and see the same batches.

    features: [N, D], of the type that is computed in; labels: [N], int64, from 0 to classes − 1; both on the device or
    on the CPU. An epoch's last batch may be smaller. Raises ValueError where labels do not fit.
    """
    check_labels("train", features, labels, classes)
    heads = initial_heads(features, classes, protocol, device)
    velocity = Heads(torch.zeros_like(heads.weights), torch.zeros_like(heads.biases))
    for epoch in progress(range(protocol.epochs), "linear heads", protocol.epochs):
        rates = torch.tensor(protocol.rates(epoch), dtype=features.dtype, device=device)[:, None]
        for rows in protocol.order(epoch, len(labels)).to(features.device).split(protocol.batch):
            _sgd(heads, velocity, features[rows].to(device), labels[rows].to(device), rates)
    return heads


def initial_heads(features: Tensor, classes: int, protocol: Protocol, device: torch.device) -> Heads:
    """The heads before training, on the device and of the features' type."""
    heads, width = len(protocol.lrs), features.shape[1]
    one = torch.randn(classes, width, generator=torch.Generator().manual_seed(protocol.seed)) * INITIAL_STD
    return Heads(one.to(device, features.dtype).repeat(heads, 1, 1), features.new_zeros(heads, classes, device=device))


def _sgd(heads: Heads, velocity: Heads, x: Tensor, y: Tensor, rates: Tensor) -> None:
    """One step of SGD with momentum on x [B, D] and y [B], at rates [R, 1].

    The gradient of the mean cross-entropy with respect to the logits is (softmax − one-hot) / B, for each head alone.
    """
    logits = heads.logits(x)
    gradient = logits.softmax(2).sub_(F.one_hot(y, logits.shape[2])[:, None]).div_(len(x))
    velocity.weights.flatten(0, 1).addmm_(gradient.flatten(1).T, x, beta=MOMENTUM)
    velocity.biases.mul_(MOMENTUM).add_(gradient.sum(0))
    heads.weights.addcmul_(velocity.weights, rates[:, :, None], value=-1)
    heads.biases.addcmul_(velocity.biases, rates, value=-1)


@torch.inference_mode()
def score_heads(heads: Heads, features: Tensor, labels: Tensor) -> list[tuple[float, float]]:
    """Top-1 and top-5 of each head, in percent, for features [M, D] and labels [M], on the heads' device or on the CPU.
    A picture whose logits overflowed is a miss. Raises ValueError where labels do not fit."""
    count, classes = heads.biases.shape
    check_labels("test", features, labels, classes)
    hits = torch.zeros(count, 2, dtype=torch.int64, device=heads.biases.device)
    rows = max(1, _LOGITS_AT_ONCE // (count * classes))
    for x, y in zip(features.split(rows), labels.split(rows), strict=True):
        logits = heads.logits(x.to(hits.device))
        correct = logits.topk(min(5, classes), dim=2).indices == y.to(hits.device)[:, None, None]
        correct &= logits.isfinite().all(2, keepdim=True)
        hits += torch.stack([correct[:, :, 0].sum(0), correct.sum((0, 2))], 1)
    return [(top1, top5) for top1, top5 in (100 * hits.double() / len(labels)).tolist()]


def linear_score(
    backbone: nn.Module,
    train: ShardIndex,
    val: ShardIndex,
    resize: int,
    crop: int,
    device: torch.device,
    protocol: Protocol,
) -> list[LinearScore]:
    """Score a backbone's features of `val` by heads trained on those of `train`, one score a learning rate. UserError
    where the classes do not fit, or features are not finite."""
    of = features_of(backbone, train, val, resize, crop, device)
    if not (of.train.sum() + of.val.sum()).isfinite():
        raise UserError("--checkpoint: its features are not finite: the run diverged; pass an earlier step-….pt")
    heads = train_heads(of.train, of.train_labels, of.classes, protocol, device)
    scores = score_heads(heads, of.val, of.val_labels)
    return [LinearScore(lr, *score) for lr, score in zip(protocol.lrs, scores, strict=True)]


def best_of(scores: Sequence[LinearScore]) -> LinearScore:
    """The highest top-1; of equals the highest top-5, then the first."""
    return max(scores, key=lambda score: (score.top1, score.top5))


def edge(scores: Sequence[LinearScore]) -> str | None:
    """Which end of the sweep alone gave the best top-1, "lowest" or "highest": a wider sweep may find a better one."""
    best, lrs = best_of(scores), sorted(score.lr for score in scores)
    alone = sum(score.top1 == best.top1 for score in scores) == 1
    if len(lrs) == 1 or not alone or lrs[0] < best.lr < lrs[-1]:
        return None
    return "lowest" if best.lr == lrs[0] else "highest"


def linear_command(arguments: Sequence[str]) -> int:
    """`dino-fast linear`: print the scores of heads on a checkpoint's backbone, and write them to --json FILE."""
    options = _parser().parse_args(arguments)
    protocol = Protocol(options.lrs, options.epochs, options.batch, options.seed)
    backbone, about = chosen(options)
    with ShardIndex(options.train) as train, ShardIndex(options.val) as val:
        scores = linear_score(
            backbone, train, val, about["resize"], about["crop"], choose_device(options.device, 0), protocol
        )
        counts = {"train": len(train), "val": len(val), "classes": len(train.classes)}
    print(f"{options.network} after {about['step']} steps: {counts['train']} train and {counts['val']} val pictures")
    print(f"short side {about['resize']}, centre crop {about['crop']}, {counts['classes']} classes")
    _show(scores, protocol)
    if options.json:
        result = {
            **about, **counts, "epochs": protocol.epochs, "batch": protocol.batch, "seed": protocol.seed,
            "best": asdict(best_of(scores)), "linear": [asdict(score) for score in scores],
        }  # fmt: skip
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _show(scores: Sequence[LinearScore], protocol: Protocol) -> None:
    print(f"{protocol.epochs} epochs, batch {protocol.batch}, seed {protocol.seed}; lr is multiplied by batch / 256")
    for score in scores:
        print(f"lr = {score.lr:<7g}: top-1 {score.top1:6.2f} %   top-5 {score.top5:6.2f} %")
    best, end = best_of(scores), edge(scores)
    hint = f" (the {end} rate tried: widen --lrs)" if end else ""
    print(f"best lr = {best.lr:g}: top-1 {best.top1:.2f} %   top-5 {best.top5:.2f} %{hint}")


def _parser() -> argparse.ArgumentParser:
    default = Protocol()
    parser = OptionParser(
        "linear",
        "Linear classification score of a trained backbone: one layer on frozen features, SGD as published "
        "(momentum 0.9, no weight decay, lr · batch / 256, a cosine to 0 by epoch), at many learning rates in one go.",
        "What differs from the published protocol: features are computed once, from the centre crop, so that there "
        "are no random crops and flips in training; the best learning rate is chosen by top-1 on --val, and all are "
        "listed; scores are those after the last epoch, not of the best one. A ResNet's features are, as published, "
        "those after the average pool. Top-5 is the first min(5, classes).",
    )
    parser.add_argument("--epochs", type=_whole(1), default=default.epochs, help="default: %(default)s, as published")
    parser.add_argument(
        "--batch", type=_whole(1), default=default.batch, help="default: %(default)s (published: 128 a GPU)"
    )
    parser.add_argument(
        "--lrs", type=_rates, default=default.lrs, metavar="LR,LR,…",
        help="learning rates of the first epoch, for a batch of 256; default: "
        f"{','.join(f'{lr:g}' for lr in default.lrs)} (published: 0.001, to be tuned for each checkpoint)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=_whole(0), default=default.seed, help="of weights and orders; default: %(default)s"
    )
    return parser


def _whole(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"expected a whole number, {least} or more, not {text!r}")
        return int(text)

    return whole


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise argparse.ArgumentTypeError(f"expected numbers above 0 with commas between them, not {text!r}")
    return rates
