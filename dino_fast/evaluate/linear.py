"""Linear classification of frozen features: one layer trained by SGD, at many learning rates at once.

The training is that of `eval_linear.py` in facebookresearch/dino: initial weights with a standard deviation of 0.01,
biases of 0, cross-entropy, momentum 0.9, no weight decay, lr · batch / 256, and a cosine to 0 that steps once an epoch,
for 100 epochs. The features are the published ones: those after the average pool of a ResNet-50, and tokens of a vision
transformer (`token_features.py`). Four things differ:

- features are computed once, from the center crop, so that there are no random crops and flips in training;
- several learning rates are tried, and the best by top-1 on `val` is reported beside all the others;
- scores are those after the last epoch, not of the best one;
- batches have 1024 images, not 128 per GPU.

`dino-fast linear` is at the end.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from dino_fast.distributed import join_ranks
from dino_fast.evaluate.arguments import (
    EvaluationParser,
    build_extraction,
    load_backbone_from,
    name_network,
    parse_whole_number,
    write_json,
)
from dino_fast.evaluate.features import (
    Extraction,
    Features,
    are_finite,
    check_labels,
    choose_samples,
    compute_features,
    move_if_it_fits,
)
from dino_fast.evaluate.token_features import BLOCKS, TokenFeatures, choose_features
from shards.errors import UserError
from shards.index import ShardIndex

MOMENTUM = 0.9
INITIAL_STD = 0.01

_MAX_LOGITS = 2**26  # held at once: 256 MB in float32


@dataclass(frozen=True)
class LinearProtocol:
    """How the heads are trained. Raises ValueError for values out of range."""

    lrs: tuple[float, ...] = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    """learning rates of the first epoch for a batch of 256; published: 0.001, to be tuned for each checkpoint"""
    epochs: int = 100
    """passes over the training set"""
    batch: int = 1024
    """images in a step of SGD"""
    seed: int = 0
    """seed of the initial weights and of the order of the samples"""

    def __post_init__(self) -> None:
        if not self.lrs or not all(0 < lr < math.inf for lr in self.lrs):
            raise ValueError(f"learning rates must be numbers above 0, and at least one, not {self.lrs}")
        if self.epochs < 1 or self.batch < 1 or self.seed < 0:
            raise ValueError("epochs and batch must be 1 or more, and the seed 0 or more")

    def learning_rates_at(self, epoch: int) -> list[float]:
        """Return the learning rate of each head in an epoch, counted from 0; it is scaled by the batch size."""
        cosine = (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        return [lr * self.batch / 256 * cosine for lr in self.lrs]

    def shuffle(self, epoch: int, samples: int) -> Tensor:
        """Return the order of the samples in an epoch, [samples], int64: a pure function of (seed, epoch)."""
        return torch.from_numpy(np.random.default_rng([self.seed, epoch]).permutation(samples))


@dataclass
class Heads:
    """R linear layers, one for each learning rate: a single matrix product gives the logits of all."""

    weights: Tensor
    """[R, C, D]"""
    biases: Tensor
    """[R, C]"""

    def compute_logits(self, x: Tensor) -> Tensor:
        """Map features [B, D] to logits [B, R, C]."""
        return F.linear(x, self.weights.flatten(0, 1), self.biases.flatten()).unflatten(1, self.biases.shape)


@dataclass(frozen=True)
class LinearScore:
    """A head's accuracies after the last epoch."""

    lr: float
    """learning rate of the first epoch for a batch of 256"""
    top1: float
    """percent of the images whose class has the largest logit"""
    top5: float
    """percent of the images whose class is among the first min(5, classes)"""


@torch.inference_mode()
def train_heads(
    features: Tensor, labels: Tensor, classes: int, protocol: LinearProtocol, device: torch.device
) -> Heads:
    """Train a head for each learning rate on the device; all of them start alike and see the same batches.

    features: [N, D], of the type that is computed in; labels: [N], int64, from 0 to classes − 1; both on the device or
    on the CPU. An epoch's last batch may be smaller. Raises ValueError where labels do not fit.
    """
    check_labels("train", features, labels, classes)
    dtype = torch.promote_types(
        features.dtype, torch.float32
    )  # features in half precision are computed with in float32
    heads = initialize_heads(features.shape[1], classes, protocol, device, dtype)
    velocity = Heads(torch.zeros_like(heads.weights), torch.zeros_like(heads.biases))
    for epoch in _show_progress(range(protocol.epochs)):
        rates = torch.tensor(protocol.learning_rates_at(epoch), dtype=dtype, device=device)[:, None]
        for rows in protocol.shuffle(epoch, len(labels)).to(features.device).split(protocol.batch):
            _take_sgd_step(
                heads, velocity, features[rows].to(device, dtype), labels[rows.to(labels.device)].to(device), rates
            )
    return heads


def initialize_heads(
    width: int, classes: int, protocol: LinearProtocol, device: torch.device, dtype: torch.dtype = torch.float32
) -> Heads:
    """Return the heads before training, for features [N, width]: equal ones, on the device and of the type."""
    heads = len(protocol.lrs)
    one = torch.randn(classes, width, generator=torch.Generator().manual_seed(protocol.seed)) * INITIAL_STD
    return Heads(one.to(device, dtype).repeat(heads, 1, 1), torch.zeros(heads, classes, device=device, dtype=dtype))


def _take_sgd_step(heads: Heads, velocity: Heads, x: Tensor, y: Tensor, rates: Tensor) -> None:
    """Update the heads in place by SGD with momentum, for x [B, D], y [B] and learning rates [R, 1].

    The gradient of the mean cross-entropy with respect to the logits is (softmax − one-hot) / B, for each head alone.
    """
    logits = heads.compute_logits(x)
    gradient = logits.softmax(2).sub_(F.one_hot(y, logits.shape[2])[:, None]).div_(len(x))
    velocity.weights.flatten(0, 1).addmm_(gradient.flatten(1).T, x, beta=MOMENTUM)
    velocity.biases.mul_(MOMENTUM).add_(gradient.sum(0))
    heads.weights.addcmul_(velocity.weights, rates[:, :, None], value=-1)
    heads.biases.addcmul_(velocity.biases, rates, value=-1)


def _show_progress(epochs: range) -> Iterable[int]:
    """Yield the epochs. On a terminal a bar shows how many are done; it disappears at the end."""
    return track(epochs, "linear heads", len(epochs), transient=True, disable=not sys.stdout.isatty())


@torch.inference_mode()
def score_heads(heads: Heads, features: Tensor, labels: Tensor) -> list[tuple[float, float]]:
    """Return top-1 and top-5 of each head, in percent, for features [M, D] and labels [M].

    Both are on the heads' device or on the CPU. An image whose logits overflow is a miss. Raises ValueError where the
    labels do not fit.
    """
    count, classes = heads.biases.shape
    check_labels("test", features, labels, classes)
    hits = torch.zeros(count, 2, dtype=torch.int64, device=heads.biases.device)
    rows = max(1, _MAX_LOGITS // (count * classes))
    for x, y in zip(features.split(rows), labels.split(rows), strict=True):
        logits = heads.compute_logits(x.to(heads.weights))
        correct = logits.topk(min(5, classes), dim=2).indices == y.to(hits.device)[:, None, None]
        correct &= logits.isfinite().all(2, keepdim=True)
        hits += torch.stack([correct[:, :, 0].sum(0), correct.sum((0, 2))], 1)
    return [(top1, top5) for top1, top5 in (100 * hits.double() / len(labels)).tolist()]


def evaluate_linear(
    network: nn.Module, train: ShardIndex, val: ShardIndex, how: Extraction, protocol: LinearProtocol
) -> list[LinearScore]:
    """Train heads on a network's features of `train` and score them on those of `val`: one score per learning rate.

    The ranks share the learning rates.

    Raises UserError where the classes do not fit, or where features are not finite.
    """
    found, ranks = compute_features(network, train, val, how), how.ranks
    if not (are_finite(found.train) and are_finite(found.val)):
        raise UserError(
            "--checkpoint: the features of its backbone are not finite, because the run diverged. Pass an earlier "
            "step-….pt file."
        )
    lrs = protocol.lrs[ranks.rank :: ranks.world]
    shares: list[list[LinearScore]] = [_train_and_score(found, replace(protocol, lrs=lrs), ranks.device) if lrs else []]
    if ranks.world > 1:
        shares *= ranks.world
        dist.all_gather_object(shares, shares[ranks.rank])
    scores = {score.lr: score for score in chain.from_iterable(shares)}
    return [scores[lr] for lr in protocol.lrs]


def _train_and_score(found: Features, protocol: LinearProtocol, device: torch.device) -> list[LinearScore]:
    train = move_if_it_fits(found.train, device)
    heads = train_heads(train, found.train_labels, found.classes, protocol, device)
    scores = score_heads(heads, found.val, found.val_labels)
    return [LinearScore(lr, *score) for lr, score in zip(protocol.lrs, scores, strict=True)]


def pick_best(scores: Sequence[LinearScore]) -> LinearScore:
    """Return the score of the highest top-1. Among equals the highest top-5 wins, then the first."""
    return max(scores, key=lambda score: (score.top1, score.top5))


def find_best_end(scores: Sequence[LinearScore]) -> str | None:
    """Return "lowest" or "highest" if only that end of the learning rates has the best top-1, else None.

    A wider range of learning rates may then find a better score.
    """
    best, lrs = pick_best(scores), sorted(score.lr for score in scores)
    alone = sum(score.top1 == best.top1 for score in scores) == 1
    if len(lrs) == 1 or not alone or lrs[0] < best.lr < lrs[-1]:
        return None
    return "lowest" if best.lr == lrs[0] else "highest"


# The command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dino-fast linear`: print the scores of heads on a checkpoint's backbone, and write them to --json FILE."""
    options = build_parser().parse_args(arguments)
    protocol = LinearProtocol(options.lrs, options.epochs, options.batch, options.seed)
    backbone, center, evaluation = load_backbone_from(options)
    network = choose_features(backbone, options.blocks, options.mean_patch)
    with join_ranks(options.device) as ranks, ShardIndex(options.train) as train, ShardIndex(options.val) as val:
        how = build_extraction(options, evaluation, center, ranks)
        scores = evaluate_linear(network, train, val, how, protocol)
        counts = {name: len(choose_samples(index, how.limit)) for name, index in (("train", train), ("val", val))}
        counts["classes"] = len(train.classes)
    if not ranks.first:
        return 0
    print(f"{name_network(evaluation)}: {counts['train']} train and {counts['val']} val images")
    print(f"short side {center.resize}, center crop {center.crop}, {counts['classes']} classes")
    features = {}
    if isinstance(network, TokenFeatures):
        print(f"features: {network}")
        features = {"blocks": network.blocks, "mean_patch": network.mean_patch}
    _print_scores(scores, protocol)
    write_json(options.json, {
        **evaluation, **features, **counts,
        "epochs": protocol.epochs, "batch": protocol.batch, "seed": protocol.seed,
        "best": asdict(pick_best(scores)), "linear": [asdict(score) for score in scores],
    })  # fmt: skip
    return 0


def _print_scores(scores: Sequence[LinearScore], protocol: LinearProtocol) -> None:
    print(f"{protocol.epochs} epochs, batch {protocol.batch}, seed {protocol.seed}; lr is multiplied by batch / 256")
    for score in scores:
        print(f"lr = {score.lr:<7g}: top-1 {score.top1:6.2f} %   top-5 {score.top5:6.2f} %")
    best, end = pick_best(scores), find_best_end(scores)
    other = {"lowest": "lower", "highest": "higher"}
    hint = f"   (the {end} rate tried; pass {other[end]} ones with --lrs)" if end else ""
    print(f"best lr = {best.lr:g}: top-1 {best.top1:.2f} %   top-5 {best.top5:.2f} %{hint}")


_DESCRIPTION = (
    "Score a trained backbone by linear classification: one linear layer is trained on its frozen features of --train "
    "and scored on --val. The layer is trained as published: by SGD with momentum 0.9 and no weight decay, at the "
    "learning rate lr · batch / 256, which falls to 0 along a cosine. Several learning rates are tried at once."
)
_EPILOG = (
    "Four things differ from the published protocol. (1) Features are computed once, from the center crop: training "
    "has no random crops and flips. (2) The best of several learning rates is chosen by its top-1 on --val; the scores "
    "of all are printed. (3) Scores are those after the last epoch, not of the best epoch. (4) A batch has 1024 "
    "images, not 128 per GPU. The features of a ResNet are those after its average pool, as published. With fewer than "
    "five classes, top-5 counts all of them."
)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command's flags."""
    default = LinearProtocol()
    parser = EvaluationParser("linear", _DESCRIPTION, _EPILOG)
    parser.add_argument(
        "--epochs", type=parse_whole_number(1), default=default.epochs, metavar="N",
        help="passes over --train (default: %(default)s, as published)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=parse_whole_number(1), default=default.batch, metavar="N",
        help="images in a step of SGD (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--lrs", type=_parse_rates, default=default.lrs, metavar="LR,LR,…",
        help="learning rates of the first epoch, for a batch of 256 (default: "
        f"{','.join(f'{lr:g}' for lr in default.lrs)}; published: 0.001, to be tuned for each checkpoint)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=parse_whole_number(0), default=default.seed, metavar="N",
        help="seed of the initial weights and of the order of the samples (default: %(default)s)",
    )  # fmt: skip
    tokens = parser.add_mutually_exclusive_group()
    tokens.add_argument(
        "--blocks", type=parse_whole_number(1), metavar="N",
        help="features of a vision transformer: the [CLS] tokens of its last N blocks, joined (default for ViT-Ti and "
        f"ViT-S: {BLOCKS}, as published)",
    )  # fmt: skip
    tokens.add_argument(
        "--mean-patch", action="store_true",
        help="features of a vision transformer: its last [CLS] token with the mean patch token (default for ViT-B, as "
        "published)",
    )  # fmt: skip
    return parser


def _parse_rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise argparse.ArgumentTypeError(f"expected numbers above 0 with commas between them, not {text!r}")
    return rates
