"""Fine-tuning of a whole network on labeled shards: the command `dino-fast finetune`.

What it does is in `finetuning/`. A batch, and all that is drawn for it, depends on seed and step alone, so a run that
was stopped goes on as if nothing had happened.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dino_fast.distributed import Ranks, join_ranks
from dino_fast.evaluate.arguments import (
    EvaluationParser,
    load_backbone_from,
    name_network,
    parse_whole_number,
    write_json,
)
from dino_fast.evaluate.features import BATCH_SIZE, choose_samples, match_classes
from dino_fast.evaluate.finetuning.class_table import format_class_table, list_classes
from dino_fast.evaluate.finetuning.classifier import Plan
from dino_fast.evaluate.finetuning.recipe import (
    LAYER_DECAY_OF_BASE,
    RECIPES,
    RESNET,
    VIT,
    choose_epochs,
    choose_layer_decay,
    choose_recipe,
)
from dino_fast.evaluate.finetuning.sweep import RateScore, Task, finetune, name_classifier, pick_best
from dino_fast.evaluate.resumable import Progress, describe_files, describe_settings
from dino_fast.evaluate.training_flags import (
    add_output_flag,
    explain_out_of_memory,
    format_rates,
    parse_rates,
    refuse_single_class,
)
from dino_fast.model.backbones import evaluating
from dino_fast.model.vit import VisionTransformer
from dino_fast.step.precision import Precision, set_up_math
from pipelines.labeled import CenterCrop, load_labeled_batches
from pipelines.labeled_crops import LabeledCropLoader, LabeledCrops
from pipelines.loader import count_default_threads
from pipelines.order import SampleOrder
from shards.errors import UserError
from shards.index import ShardIndex

BATCH = 256  # images of a step by default, where there are as many


class _Job(NamedTuple):
    """What the flags ask for."""

    options: argparse.Namespace
    """the flags"""
    backbone: nn.Module
    """pretrained, on the CPU"""
    center: CenterCrop
    """how validation images are prepared; training crops have its side"""
    train: ShardIndex
    """what is learned from"""
    val: ShardIndex
    """what is classified"""
    ranks: Ranks
    """they share each batch"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dino-fast finetune`: print the scores of each learning rate, and write them to --json FILE."""
    options = build_parser().parse_args(arguments)
    backbone, center, evaluation = load_backbone_from(options)
    with join_ranks(options.device) as ranks, ShardIndex(options.train) as train, ShardIndex(options.val) as val:
        refuse_single_class(train)
        job = _Job(options, backbone, center, train, val, ranks)
        task, lrs = _build_task(job)
        set_up_math(task.plan.precision, ranks.device)
        result = {**evaluation, **_describe(job, task)}
        with Progress.open(options.output, _list_settings(job, result, lrs), ranks) as progress:
            if ranks.first:
                _print_head(result)
            with explain_out_of_memory():
                scores = finetune(task, lrs, ranks, progress)
    if ranks.first:
        _report(job, result, scores)
    return 0


# What is trained


def _build_task(job: _Job) -> tuple[Task, tuple[float, ...]]:
    """Return the task and the learning rates. Raises UserError for sets that do not fit, or a batch that does not."""
    options, center, ranks = job.options, job.center, job.ranks
    numbers, ids = match_classes(job.train, job.val), choose_samples(job.train, options.limit)
    width = _measure_width(job.backbone, center.crop)
    plan = _make_plan(job, width, len(ids))
    recipe = plan.recipe
    crops = LabeledCrops(
        center.crop, interpolation=recipe.interpolation, rand_augment=recipe.rand_augment,
        normalization=center.normalization,
    )  # fmt: skip
    order = SampleOrder(len(ids), plan.batch, plan.seed)
    loader = LabeledCropLoader(
        job.train, str(job.train.folder), order, crops, ranks.device, torch.float32, count_default_threads(),
        ranks.rank, ranks.world, ids,
    )  # fmt: skip

    def load_val() -> Iterator[tuple[Tensor, Tensor]]:
        share = choose_samples(job.val, options.limit)[ranks.rank :: ranks.world]
        for images, labels in load_labeled_batches(job.val, BATCH_SIZE, center, count_default_threads(), share):
            yield images, torch.from_numpy(numbers)[labels]

    task = Task(job.backbone, width, len(job.train.classes), plan, loader, load_val, options.output)
    return task, options.lrs or recipe.lrs


@torch.no_grad()
def _measure_width(backbone: nn.Module, crop: int) -> int:
    with evaluating(backbone):
        features: Tensor = backbone(torch.zeros(1, 3, crop, crop))
    return features.shape[1]


def _make_plan(job: _Job, width: int, samples: int) -> Plan:
    options = job.options
    recipe = RECIPES[options.recipe or choose_recipe(job.backbone)]
    if not isinstance(job.backbone, VisionTransformer):
        recipe = replace(recipe, drop_path=0.0)
    batch = _choose_batch(job, samples)
    steps = samples // batch
    epochs = options.epochs or choose_epochs(recipe, steps)
    precision = _choose_precision(options.precision, job.ranks.device)
    return Plan(recipe, choose_layer_decay(recipe, width), epochs, steps, batch, options.seed, precision)


def _choose_batch(job: _Job, samples: int) -> int:
    """Return the images of a step over all ranks. Raises UserError where they cannot be shared, or are too many."""
    asked, world = job.options.batch, job.ranks.world
    if asked and asked % world:
        raise UserError(f"--batch {asked} is not a multiple of the {world} ranks. Choose one that is.")
    if max(asked or 0, world) > samples:
        what = f"--batch {asked}" if asked else f"one image for each of the {world} ranks"
        raise UserError(f"{what} is more than the images of {job.train.folder} ({samples}). Lower it.")
    return asked or min(BATCH, samples) // world * world


def _choose_precision(asked: Literal["auto"] | Precision, device: torch.device) -> Precision:
    if asked != "auto":
        return asked
    if device.type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


# What is reported


def _describe(job: _Job, task: Task) -> dict[str, Any]:
    """Return the counts and settings of a result's JSON."""
    plan, limit = task.plan, job.options.limit
    recipe = {**asdict(plan.recipe), "layer_decay": plan.layer_decay}
    recipe["interpolation"] = plan.recipe.interpolation.value
    counts = {name: len(choose_samples(index, limit)) for name, index in (("train", job.train), ("val", job.val))}
    return {
        **counts, "classes": task.classes, "epochs": plan.epochs, "batch": plan.batch, "seed": plan.seed,
        "precision": plan.precision, **{name: value for name, value in recipe.items() if name not in ("lrs", "epochs")},
    }  # fmt: skip


def _list_settings(job: _Job, result: dict[str, Any], lrs: Sequence[float]) -> dict[str, Any]:
    """Return what the result depends on, by the names of flags. Paths may change, and what lies there may not."""
    return {
        **describe_settings(result), **describe_files(job.backbone, job.train, job.val),
        "lrs": list(lrs), "limit": job.options.limit, "device": job.ranks.device.type,
    }  # fmt: skip


def _print_head(result: dict[str, Any]) -> None:
    """Print what is trained and how."""
    print(f"{name_network(result)}: {result['train']} train and {result['val']} val images")
    print(f"short side {result['resize']}, center crop {result['crop']}, {result['classes']} classes")
    decay = f", layer decay {result['layer_decay']:g}" if result["layer_decay"] < 1 else ""
    print(
        f"{result['epochs']} epochs, batch {result['batch']}, seed {result['seed']}, {result['precision']}, "
        f"{result['optimizer']}{decay}; lr is multiplied by batch / 256",
        flush=True,
    )


def _report(job: _Job, result: dict[str, Any], scores: Sequence[RateScore]) -> None:
    """Print the scores and the classes of the best, and write the JSON. Raises UserError where nothing was learned."""
    for score in scores:
        diverged = f"   (the loss was not finite in epoch {score.epochs})" if score.diverged else ""
        print(f"lr = {score.lr:<7g}: top-1 {score.top1:6.2f} %   top-5 {score.top5:6.2f} %{diverged}")
    best = pick_best(scores)
    classes = list_classes(job.train.classes, best.class_images, best.class_hits)
    print(f"best lr = {best.lr:g}: top-1 {best.top1:.2f} %   top-5 {best.top5:.2f} %, chosen on --val; its classes:")
    for line in format_class_table(classes):
        print(line)
    print(f"its weights: {job.options.output / name_classifier(best.lr)}")
    rows = [_describe_score(job, score) for score in scores]
    found = {"best": rows[scores.index(best)], "finetune": rows, "per_class": classes}
    write_json(job.options.json, {**result, **found})


def _describe_score(job: _Job, score: RateScore) -> dict[str, Any]:
    """Return a row of the JSON."""
    row = {name: value for name, value in asdict(score).items() if not name.startswith("class_")}
    return {**row, "classifier": str(job.options.output / name_classifier(score.lr))}


# The command


_DESCRIPTION = (
    "Train a whole backbone, with a new linear layer, on labeled shards, and score it on others. There are two "
    f"recipes. That of ResNets: SGD with momentum 0.9, weight decay {RESNET.weight_decay:g}, random crops and flips, "
    f"label smoothing 0.1. That of vision transformers, close to DeiT's: AdamW with weight decay {VIT.weight_decay:g}, "
    f"{VIT.warmup_epochs} epochs of warm-up, a cosine, RandAugment, mixup, CutMix, label smoothing and drop path, with "
    f"a layer decay of {VIT.layer_decay:g}, or {LAYER_DECAY_OF_BASE:g} for ViT-B."
)
_EPILOG = (
    "Learning rates are tried one after another, from the same weights. Each leaves its classifier in --output, and is "
    "not trained again. The score of each is that after its last epoch. The best learning rate is chosen by its top-1 "
    "on --val, so that this top-1 is optimistic: for a figure to publish, choose on a part of --train, and then pass "
    "that one rate with --lrs. Under torchrun -m dino_fast finetune ... the GPUs share each batch. "
    "With fewer than five classes, top-5 counts all of them. --cache is not used."
)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command's flags."""
    parser = EvaluationParser("finetune", _DESCRIPTION, _EPILOG)
    add_output_flag(parser, True, "folder for the classifiers, and for the state after epochs")
    parser.add_argument(
        "--recipe", choices=tuple(RECIPES),
        help="resnet or vit (default: resnet for a backbone with batch norms, vit for others)",
    )  # fmt: skip
    parser.add_argument(
        "--epochs", type=parse_whole_number(1), metavar="N",
        help=f"passes over --train (default: {RESNET.epochs} for resnet and {VIT.epochs} for vit, and more for small "
        "sets: as many as 5000 steps take, up to 1000)",
    )  # fmt: skip
    parser.add_argument(
        "--lrs", type=parse_rates, metavar="LR,LR,…",
        help="peak learning rates for a batch of 256, tried one after another (default: "
        f"{format_rates(RESNET.lrs)} for resnet, {format_rates(VIT.lrs)} for vit)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=parse_whole_number(1), metavar="N",
        help=f"images of a step, over all GPUs (default: {BATCH}, or all images if there are fewer)",
    )  # fmt: skip
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="number format of the forward pass; auto: fp32 on a CPU, and on a GPU bf16, or fp16 on an old one "
        "(default: auto)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=parse_whole_number(0), default=0, metavar="N",
        help="seed of the first weights of the layer, and of all that is drawn (default: %(default)s)",
    )  # fmt: skip
    return parser
