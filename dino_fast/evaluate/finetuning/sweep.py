"""Fine-tuning at several learning rates, one after another, each from the same weights; and what came of each.

The state is saved after an epoch, unless it was saved less than a minute ago. A learning rate that is finished leaves
its classifier in the output folder, and is not trained again.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dino_fast.distributed import Ranks
from dino_fast.evaluate.finetuning.classifier import ClassHits, Classifier, Plan, Training, count_class_hits
from dino_fast.evaluate.resumable import Progress
from pipelines.labeled_crops import LabeledCropLoader
from shards.errors import UserError
from shards.storage.atomic_write import convert_write_errors, make_temporary_path

_SAVE_SECONDS = 60  # between saves, but for epochs with a validation: an epoch of a small set takes less than a save
VALIDATIONS = 20  # of a training, at most, besides the last one: small sets have many short epochs


@dataclass(frozen=True)
class RateScore:
    """What a learning rate led to."""

    lr: float
    """peak learning rate for a batch of 256"""
    top1: float
    """percent, after the last epoch"""
    top5: float
    """percent, after the last epoch; of min(5, classes)"""
    epochs: int
    """epochs that were trained; fewer than planned where the training diverged"""
    diverged: bool
    """whether the loss was not finite"""
    history: list[dict[str, Any]]
    """epoch, loss, top1 and top5 of each validation"""
    class_images: list[int]
    """number of validation images of each class"""
    class_hits: list[int]
    """how many of them are classified right"""


@dataclass(frozen=True)
class Task:
    """What is trained, and on what."""

    backbone: nn.Module
    """pretrained, on the CPU; it stays as it is"""
    width: int
    """of its features"""
    classes: int
    """number of classes of the training set"""
    plan: Plan
    """how long, and with which settings"""
    loader: LabeledCropLoader
    """of the training images"""
    load_val: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    """yields this rank's share of the validation images [n, 3, S, S] with their labels [n], on the CPU"""
    output: Path
    """folder of the results"""


def finetune(task: Task, lrs: Sequence[float], ranks: Ranks, progress: Progress) -> list[RateScore]:
    """Train at each learning rate, from where `progress` is. Returns what came of each."""
    state = progress.load() or {"finished": [], "training": None, "history": []}
    finished = [RateScore(**score) for score in state["finished"]]
    for lr in lrs[len(finished) :]:
        training = Training(_build_classifier(task, ranks), task.plan, lr, ranks)
        if state["training"] is not None:
            training.load_state_dict(state["training"])
        finished.append(_train(task, training, lr, finished, state["history"], ranks, progress))
        state = {"finished": finished, "training": None, "history": []}
        if ranks.first:
            _save_classifier(task, training.classifier, finished[-1])
        progress.save(len(finished) * task.plan.epochs, _to_plain(finished, None, []))
    return finished


def _build_classifier(task: Task, ranks: Ranks) -> Classifier:
    classifier = Classifier(copy.deepcopy(task.backbone), task.width, task.classes, task.plan.seed)
    return classifier.to(ranks.device).to(memory_format=torch.channels_last)


def _train(
    task: Task,
    training: Training,
    lr: float,
    finished: Sequence[RateScore],
    history: list[dict[str, Any]],
    ranks: Ranks,
    progress: Progress,
) -> RateScore:
    """Train at one learning rate through the epochs that are not in `history` yet."""
    plan = task.plan
    every = -(-plan.epochs // VALIDATIONS)
    hits, diverged, saved = None, False, time.monotonic()
    for epoch in range(len(history), plan.epochs):
        loss = training.train_epoch(epoch, task.loader)
        diverged = not math.isfinite(loss)
        last = diverged or epoch + 1 == plan.epochs
        hits = validate(task, training, ranks) if last or (epoch + 1) % every == 0 else None
        history.append(_describe(epoch + 1, loss, hits))
        if ranks.first:
            print(_format_row(lr, history[-1], plan.epochs), flush=True)
        if last:
            break
        if hits is not None or time.monotonic() - saved > _SAVE_SECONDS:
            progress.save(len(finished) * plan.epochs + epoch + 1, _to_plain(finished, training, history))
            saved = time.monotonic()
    assert hits is not None
    return _score(lr, hits, diverged, history)


def validate(task: Task, training: Training, ranks: Ranks) -> ClassHits:
    """Classify all ranks' validation images."""
    total = ClassHits(*(torch.zeros(task.classes, dtype=torch.int64, device=ranks.device) for _ in range(3)))
    for images, labels in task.load_val():
        found = count_class_hits(training.classify(images.to(ranks.device)), labels.to(ranks.device))
        for sum_, more in zip(total, found, strict=True):
            sum_ += more
    if ranks.world > 1:
        for sum_ in total:
            dist.all_reduce(sum_)
    return total


# What is kept


def _to_plain(
    finished: Sequence[RateScore], training: Training | None, history: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return the progress as tensors and plain data."""
    return {
        "finished": [asdict(score) for score in finished],
        "training": training.state_dict() if training is not None else None,
        "history": list(history),
    }


def _save_classifier(task: Task, classifier: Classifier, score: RateScore) -> None:
    """Write the weights of a finished learning rate, with names that begin with `backbone.` and `head.`."""
    name = name_classifier(score.lr)
    with convert_write_errors(str(task.output / name)), make_temporary_path(task.output, name) as temporary:
        torch.save({"state_dict": {key: value.cpu() for key, value in classifier.state_dict().items()}}, temporary)
        temporary.replace(task.output / name)


def name_classifier(lr: float) -> str:
    """Return the file of a finished learning rate's classifier."""
    return f"classifier-lr-{lr:g}.pt"


# What is reported


def _describe(epoch: int, loss: float, hits: ClassHits | None) -> dict[str, Any]:
    """Return what JSON holds of an epoch."""
    row: dict[str, Any] = {"epoch": epoch, "loss": loss if math.isfinite(loss) else None}
    return row if hits is None else {**row, **_percent(hits)}


def _percent(hits: ClassHits) -> dict[str, float]:
    images = max(1, int(hits.images.sum()))
    return {"top1": 100 * int(hits.first.sum()) / images, "top5": 100 * int(hits.among_five.sum()) / images}


def _score(lr: float, hits: ClassHits, diverged: bool, history: Sequence[dict[str, Any]]) -> RateScore:
    return RateScore(
        lr, **_percent(hits), epochs=len(history), diverged=diverged, history=[row for row in history if "top1" in row],
        class_images=hits.images.tolist(), class_hits=hits.first.tolist(),
    )  # fmt: skip


def _format_row(lr: float, row: dict[str, Any], epochs: int) -> str:
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
    scores = f"   top-1 {row['top1']:.2f} %   top-5 {row['top5']:.2f} %" if "top1" in row else ""
    return f"lr = {lr:g}, epoch {row['epoch']}/{epochs}: loss {loss}{scores}"


def pick_best(scores: Sequence[RateScore]) -> RateScore:
    """Return the score of the highest top-1. Among equals the highest top-5 wins, then the first.

    Raises UserError where all trainings diverged.
    """
    if all(score.diverged for score in scores):
        raise UserError("the loss was not finite at any learning rate. Pass lower ones with --lrs.")
    return max(scores, key=lambda score: (not score.diverged, score.top1, score.top5))
