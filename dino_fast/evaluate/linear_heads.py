"""Linear layers on frozen features, one for each learning rate, trained side by side by SGD, and their scores.

The training is that of `eval_linear.py` in facebookresearch/dino: initial weights with a standard deviation of 0.01,
biases of 0, cross-entropy, momentum 0.9, no weight decay, lr · batch / 256, and a cosine to 0 that steps once an epoch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_fast.evaluate.features import check_labels

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
    """seed of the initial weights, of the order of the samples, and of random crops"""

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
        """Return the order of cached features in an epoch, [samples], int64: a pure function of (seed, epoch)."""
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

    def make_velocity(self) -> "Heads":
        """Return the velocity of SGD before the first step, in the shapes of the heads."""
        return Heads(torch.zeros_like(self.weights), torch.zeros_like(self.biases))


@dataclass(frozen=True)
class LinearScore:
    """A head's accuracies after an epoch."""

    lr: float
    """learning rate of the first epoch for a batch of 256"""
    top1: float
    """percent of the images whose class has the largest logit"""
    top5: float
    """percent of the images whose class is among the first min(5, classes)"""


def initialize_heads(
    width: int, classes: int, protocol: LinearProtocol, device: torch.device, dtype: torch.dtype = torch.float32
) -> Heads:
    """Return the heads before training, for features [N, width]: equal ones, on the device and of the type."""
    heads = len(protocol.lrs)
    one = torch.randn(classes, width, generator=torch.Generator().manual_seed(protocol.seed)) * INITIAL_STD
    return Heads(one.to(device, dtype).repeat(heads, 1, 1), torch.zeros(heads, classes, device=device, dtype=dtype))


def take_sgd_step(heads: Heads, velocity: Heads, x: Tensor, y: Tensor, rates: Tensor) -> Tensor:
    """Update the heads in place by SGD with momentum, for x [B, D], y [B] and learning rates [R, 1].

    The gradient of the mean cross-entropy with respect to the logits is (softmax − one-hot) / B, for each head alone.
    Returns the logits before the update, [B, R, C].
    """
    logits = heads.compute_logits(x)
    gradient = logits.softmax(2).sub_(F.one_hot(y, logits.shape[2])[:, None]).div_(len(x))
    velocity.weights.flatten(0, 1).addmm_(gradient.flatten(1).T, x, beta=MOMENTUM)
    velocity.biases.mul_(MOMENTUM).add_(gradient.sum(0))
    heads.weights.addcmul_(velocity.weights, rates[:, :, None], value=-1)
    heads.biases.addcmul_(velocity.biases, rates, value=-1)
    return logits


def measure_losses(logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean cross-entropy of each head, [R], for logits [B, R, C] and labels y [B]."""
    right = logits.gather(2, y[:, None, None].expand(-1, logits.shape[1], 1))[:, :, 0]
    return (logits.logsumexp(2) - right).mean(0)


def score_heads(heads: Heads, features: Tensor, labels: Tensor) -> list[tuple[float, float]]:
    """Return top-1 and top-5 of each head, in percent, for features [M, D] and labels [M].

    Both are on the heads' device or on the CPU. An image whose logits overflow is a miss. Raises ValueError where the
    labels do not fit.
    """
    check_labels("test", features, labels, heads.biases.shape[1])
    hits = count_hits(heads, features, labels)
    return [(top1, top5) for top1, top5 in (100 * hits.double() / len(labels)).tolist()]


@torch.inference_mode()
def count_hits(heads: Heads, features: Tensor, labels: Tensor) -> Tensor:
    """Return how many of the images are right in each head, first and among the first five: [R, 2], int64."""
    count, classes = heads.biases.shape
    hits = torch.zeros(count, 2, dtype=torch.int64, device=heads.biases.device)
    rows = max(1, _MAX_LOGITS // (count * classes))
    for x, y in zip(features.split(rows), labels.split(rows), strict=True):
        logits = heads.compute_logits(x.to(heads.weights))
        correct = logits.topk(min(5, classes), dim=2).indices == y.to(hits.device)[:, None, None]
        correct &= logits.isfinite().all(2, keepdim=True)
        hits += torch.stack([correct[:, :, 0].sum(0), correct.sum((0, 2))], 1)
    return hits


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
