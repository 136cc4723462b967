"""The quick linear evaluation: heads are trained on features that are computed once, from the center crop.

`linear_published.py` is the published protocol.
"""

import sys
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain

import torch
from rich.progress import track
from torch import Tensor, nn

from dino_fast.distributed import gather_objects
from dino_fast.evaluate.features import (
    Extraction,
    Features,
    are_finite,
    check_labels,
    compute_features,
    move_if_it_fits,
)
from dino_fast.evaluate.linear_heads import (
    Heads,
    LinearProtocol,
    LinearScore,
    initialize_heads,
    score_heads,
    take_sgd_step,
)
from shards.errors import UserError
from shards.index import ShardIndex


@torch.inference_mode()
def train_heads(
    features: Tensor, labels: Tensor, classes: int, protocol: LinearProtocol, device: torch.device
) -> Heads:
    """Train a head for each learning rate on the device; all of them start alike and see the same batches.

    features: [N, D], of the type that is computed in, or in half precision; labels: [N], int64, from 0 to classes − 1;
    both on the device or on the CPU. An epoch's last batch may be smaller. Raises ValueError where labels do not fit.
    """
    check_labels("train", features, labels, classes)
    dtype = torch.promote_types(features.dtype, torch.float32)
    heads = initialize_heads(features.shape[1], classes, protocol, device, dtype)
    velocity = heads.make_velocity()
    for epoch in _show_progress(range(protocol.epochs)):
        rates = torch.tensor(protocol.learning_rates_at(epoch), dtype=dtype, device=device)[:, None]
        for rows in protocol.shuffle(epoch, len(labels)).to(features.device).split(protocol.batch):
            y = labels[rows.to(labels.device)].to(device)
            take_sgd_step(heads, velocity, features[rows].to(device, dtype), y, rates)
    return heads


def _show_progress(epochs: range) -> Iterable[int]:
    """Yield the epochs. On a terminal a bar shows how many are done; it disappears at the end."""
    return track(epochs, "linear heads", len(epochs), transient=True, disable=not sys.stdout.isatty())


def evaluate_linear(
    network: nn.Module, train: ShardIndex, val: ShardIndex, how: Extraction, protocol: LinearProtocol
) -> list[LinearScore]:
    """Train heads on a network's features of `train` and score them on those of `val`: one score per learning rate.

    The ranks share the learning rates. Raises UserError where the classes do not fit, or where features are not finite.
    """
    found, ranks = compute_features(network, train, val, how), how.ranks
    for features in (found.train, found.val):
        refuse_non_finite(features)
    lrs = protocol.lrs[ranks.rank :: ranks.world]
    share = _train_and_score(found, replace(protocol, lrs=lrs), ranks.device) if lrs else []
    scores = {score.lr: score for score in chain.from_iterable(gather_objects(share, ranks))}
    return [scores[lr] for lr in protocol.lrs]


def refuse_non_finite(features: Tensor) -> None:
    """Raise UserError for features [N, D] that are not finite."""
    if not are_finite(features):
        raise UserError(
            "--checkpoint: the features of its backbone are not finite, because the run diverged. Pass an earlier "
            "step-….pt file."
        )


def _train_and_score(found: Features, protocol: LinearProtocol, device: torch.device) -> list[LinearScore]:
    train = move_if_it_fits(found.train, device)
    heads = train_heads(train, found.train_labels, found.classes, protocol, device)
    scores = score_heads(heads, found.val, found.val_labels)
    return [LinearScore(lr, *score) for lr, score in zip(protocol.lrs, scores, strict=True)]
