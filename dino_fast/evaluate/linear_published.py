"""The published linear evaluation: random crops and flips in each epoch, and validation after each.

It is `eval_linear.py` of facebookresearch/dino: the backbone is frozen, in evaluation mode. Training images are random
resized crops (bilinear) with flips, and validation images center crops. Three things are done otherwise, for speed, and
change no figure:

- one forward pass of the backbone serves a head for each learning rate;
- the features of the validation images, which never change, are computed once;
- each rank computes the features of its share of a batch, and all ranks train the same heads on all of them. That is
  the same as averaged gradients.

A batch depends on seed, epoch and number alone, and the heads' state is saved after each epoch, so a run that was
stopped goes on as if nothing had happened.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dino_fast.distributed import Ranks, show_progress_once
from dino_fast.evaluate.features import (
    Extraction,
    choose_samples,
    extract_features,
    match_classes,
    move_if_it_fits,
)
from dino_fast.evaluate.linear_cached import refuse_non_finite
from dino_fast.evaluate.linear_heads import (
    Heads,
    LinearProtocol,
    LinearScore,
    count_hits,
    initialize_heads,
    measure_losses,
    pick_best,
    take_sgd_step,
)
from dino_fast.evaluate.resumable import Progress
from pipelines.labeled_crops import LabeledCropLoader, LabeledCrops
from pipelines.loader import count_default_threads
from pipelines.order import WholeOrder
from shards.index import ShardIndex

_MOST_IMAGES = 256  # that go through the backbone at once, for the sake of memory


@dataclass(frozen=True)
class EpochScores:
    """What an epoch of training led to."""

    epoch: int
    """number of the epoch, from 1"""
    losses: list[float]
    """mean loss of each head in the epoch; not finite where its learning rate was too large"""
    scores: list[LinearScore]
    """scores of each head on the validation images after the epoch"""


@dataclass(frozen=True)
class HeadScore:
    """The accuracies of the head of one learning rate."""

    lr: float
    """learning rate of the first epoch for a batch of 256"""
    top1: float
    """percent, after the last epoch"""
    top5: float
    """percent, after the last epoch"""
    best_top1: float
    """percent, after the best epoch, which was chosen on these images, as published"""
    best_top5: float
    """percent, after the same epoch"""
    best_epoch: int
    """number of that epoch, from 1; the first one among equals"""


class _ValFeatures(NamedTuple):
    """This rank's share of the validation images."""

    features: Tensor
    """[m, D]"""
    labels: Tensor
    """[m], int64; they number the classes as the training set does"""
    total: int
    """number of images of all ranks together"""


class _State(NamedTuple):
    """What training has led to so far."""

    heads: Heads
    """the layers"""
    velocity: Heads
    """of SGD"""
    history: list[EpochScores]
    """one entry for each epoch that is done"""


class HeadTrainer:
    """Trains heads on random crops of `train`, and scores them on `val` after each epoch.

    network: maps images [N, 3, H, W] to features [N, D]. Raises UserError where the classes of the two sets do not fit,
    and where features are not finite.
    """

    def __init__(
        self, network: nn.Module, train: ShardIndex, val: ShardIndex, how: Extraction, protocol: LinearProtocol
    ) -> None:
        numbers, ids = match_classes(train, val), choose_samples(train, how.limit)
        self._network, self._how, self._ranks, self._protocol = network, how, how.ranks, protocol
        self._classes = len(train.classes)
        self._order = WholeOrder(len(ids), protocol.batch, protocol.seed)
        crops = LabeledCrops(how.center.crop, normalization=how.center.normalization)
        self._loader = LabeledCropLoader(
            train, str(train.folder), self._order, crops, how.ranks.device, torch.float32, count_default_threads(),
            how.ranks.rank, how.ranks.world, ids,
        )  # fmt: skip
        self._val = self._load_val(val, torch.from_numpy(numbers))

    def _load_val(self, val: ShardIndex, numbers: Tensor) -> _ValFeatures:
        ids, ranks = choose_samples(val, self._how.limit), self._ranks
        features = extract_features(self._network, val, ids, self._how)
        refuse_non_finite(features)
        labels = numbers[torch.from_numpy(val.labels[ids].astype("int64"))]
        share = slice(ranks.rank, None, ranks.world)
        return _ValFeatures(move_if_it_fits(features[share], ranks.device), labels[share], len(ids))

    @torch.inference_mode()
    def train(self, progress: Progress) -> list[EpochScores]:
        """Train the heads, from where `progress` is. Returns the scores after every epoch."""
        state = self._restore(progress)
        for epoch in range(len(state.history), self._protocol.epochs):
            losses = self._train_epoch(epoch, state)
            state.history.append(EpochScores(epoch + 1, losses, self._validate(state.heads)))
            progress.save(epoch + 1, _pack(state))
            if self._ranks.first:
                print(_describe_epoch(state.history[-1], self._protocol.epochs), flush=True)
        return state.history

    def _train_epoch(self, epoch: int, state: _State) -> list[float]:
        """Train the heads through an epoch, counted from 0. Returns the mean loss of each head over all images."""
        device, count, done = self._ranks.device, self._order.steps_per_epoch, 0
        rates = torch.tensor(self._protocol.learning_rates_at(epoch), device=device)[:, None]
        total = torch.zeros(len(rates), device=device)
        with show_progress_once(f"epoch {epoch + 1}", self._ranks) as report:
            for batch in self._loader.load_batches(range(epoch * count, (epoch + 1) * count)):
                images = self._order.count(batch.step)
                shares = self._compute(batch.images, state.heads), batch.labels
                x, y = (gather_shares(share, images, self._ranks) for share in shares)
                total += images * measure_losses(take_sgd_step(state.heads, state.velocity, x, y, rates), y)
                done += images
                report(done, self._order.samples)
        losses: list[float] = (total / self._order.samples).tolist()
        return losses

    def _compute(self, images: Tensor, heads: Heads) -> Tensor:
        """Map this rank's images [n, 3, H, W], of which there may be none, to features [n, D], float32."""
        if not len(images):
            return heads.weights.new_empty(0, heads.weights.shape[2])
        with torch.autocast(images.device.type, torch.float16, enabled=self._how.half):
            return torch.cat([self._network(part).float() for part in images.split(_MOST_IMAGES)])

    def _validate(self, heads: Heads) -> list[LinearScore]:
        """Score each head on all ranks' validation images."""
        hits = count_hits(heads, self._val.features, self._val.labels)
        if self._ranks.world > 1:
            dist.all_reduce(hits)
        percent = (100 * hits.double() / self._val.total).tolist()
        return [LinearScore(lr, *of_head) for lr, of_head in zip(self._protocol.lrs, percent, strict=True)]

    def _restore(self, progress: Progress) -> _State:
        """Return the state that was saved last, or the first one."""
        saved, device = progress.load(), self._ranks.device
        if saved is None:
            heads = initialize_heads(self._val.features.shape[1], self._classes, self._protocol, device)
            return _State(heads, heads.make_velocity(), [])
        heads, velocity = (Heads(*(part.to(device) for part in saved[name])) for name in ("heads", "velocity"))
        return _State(heads, velocity, [_unpack_epoch(each) for each in saved["history"]])


def gather_shares(share: Tensor, count: int, ranks: Ranks) -> Tensor:
    """Join the ranks' shares [n, …] of a `WholeOrder`'s batch of `count` images, in the order of the ranks."""
    if ranks.world == 1:
        return share
    padded = share.new_zeros(-(-count // ranks.world), *share.shape[1:])
    padded[: len(share)] = share
    gathered = share.new_empty(ranks.world * len(padded), *share.shape[1:])
    dist.all_gather_into_tensor(gathered, padded)
    return gathered[:count]  # only the last shares are smaller than the others


def _pack(state: _State) -> dict[str, Any]:
    """Return the state as tensors and plain data."""
    heads, velocity = ((each.weights, each.biases) for each in (state.heads, state.velocity))
    return {"heads": heads, "velocity": velocity, "history": [asdict(each) for each in state.history]}


def _unpack_epoch(saved: dict[str, Any]) -> EpochScores:
    return EpochScores(saved["epoch"], saved["losses"], [LinearScore(**score) for score in saved["scores"]])


def _describe_epoch(done: EpochScores, epochs: int) -> str:
    """Return a line on an epoch: its best head."""
    best = pick_best(done.scores)
    loss = done.losses[done.scores.index(best)]
    return (
        f"epoch {done.epoch}/{epochs}: best lr = {best.lr:g}: loss {loss:.4f}   top-1 {best.top1:.2f} %   "
        f"top-5 {best.top5:.2f} %"
    )


# What is reported at the end


def summarize(history: Sequence[EpochScores]) -> list[HeadScore]:
    """Return the last and the best scores of each head."""
    found = []
    for number, last in enumerate(history[-1].scores):
        of_head = [epoch.scores[number] for epoch in history]
        best = pick_best(of_head)
        epoch = history[of_head.index(best)].epoch
        found.append(HeadScore(last.lr, last.top1, last.top5, best.top1, best.top5, epoch))
    return found


def list_losses(history: Sequence[EpochScores]) -> list[list[float | None]]:
    """Return the losses of each head in each epoch as JSON can hold them: None for what is not finite."""
    return [[loss if math.isfinite(loss) else None for loss in epoch.losses] for epoch in history]
