"""Frozen features of labeled shards, and the backbone of a checkpoint that computes them."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from dino_fast.model.backbones import BACKBONES, build_backbone
from dino_fast.weights.matching import (
    Shapes,
    find_backbone_name,
    find_kinds,
    list_shapes,
    match_weights,
    pick_backbone,
)
from dino_fast.weights.weight_files import OUR_KINDS, find_weights, is_ours, read_file
from pipelines.labeled import CenterCrop, load_labeled_batches
from pipelines.loader import count_default_threads
from pipelines.photometric import MEAN, STD, Normalization
from shards.errors import UserError
from shards.index import ShardIndex

BATCH_SIZE = 64  # images that go through the backbone at once

Item = TypeVar("Item")


class TrainedBackbone(NamedTuple):
    """A backbone out of a file of weights."""

    name: str
    """the backbone's"""
    network: nn.Module
    """maps [N, 3, H, W] to [N, D]"""
    recipe: dict[str, Any]
    """the run's recipe as plain data; empty where another program wrote the file"""
    step: int | None
    """steps that the run had done; None where another program wrote the file"""


def load_backbone(path: Path, network: Literal["teacher", "student"], name: str | None = None) -> TrainedBackbone:
    """Load the backbone of a file of weights, or of the newest checkpoint in a run's folder.

    name: the backbone's, where neither a recipe nor the weights' shapes tell it. Damaged checkpoints are named on
    standard error. Raises UserError for a file that holds no backbone, or that does not fit.
    """
    state, lines = read_file(path)
    for line in lines:
        print(line, file=sys.stderr)
    recipe, step = (state["recipe"], state["step"]) if is_ours(state) else ({}, None)
    name = _choose_name(path, name, recipe.get("backbone"))
    backbone = build_backbone(name)[0] if name else None
    found = find_weights(path, state, OUR_KINDS if backbone is None else find_kinds(backbone))
    given = pick_backbone(found.teacher if network == "teacher" else found.student)
    if name is None or backbone is None:
        name = _recognize(path, given)
        backbone, _ = build_backbone(name)
    own = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
    with torch.no_grad():
        for value, theirs in match_weights(f"{path}: its {network}", own, given, _suggest_backbone):
            value.copy_(theirs)
    return TrainedBackbone(name, backbone, recipe, step)


def _choose_name(path: Path, asked: str | None, recorded: str | None) -> str | None:
    if asked and recorded and asked != recorded:
        raise UserError(f"--backbone {asked}: the recipe of {path} says {recorded}. Leave the flag out.")
    return asked or recorded


def _recognize(path: Path, weights: Mapping[str, Tensor]) -> str:
    """Return the name of the backbone whose weights have these shapes. Raises UserError where none of ours has."""
    name = find_backbone_name(list_shapes(weights))
    if name is None:
        raise UserError(
            f"{path}: its backbone is none of {', '.join(BACKBONES)}, or not complete. For a model of timm pass "
            "--backbone timm/NAME."
        )
    return name


def _suggest_backbone(_: Shapes, theirs: Shapes) -> str:
    """Return what to do about weights that do not fit."""
    name = find_backbone_name(theirs)
    return f"Pass --backbone {name}." if name else "Pass another file, or the --backbone that it is of."


def read_normalization(recipe: dict[str, Any]) -> Normalization:
    """Return the normalization of a run from its recipe. In early checkpoints it is not a setting, but ImageNet's."""
    data = recipe.get("data", {})
    return Normalization(tuple(data.get("mean", MEAN)), tuple(data.get("std", STD)))


@dataclass(frozen=True)
class Features:
    """The features that a classifier learns from and those that it classifies, all on one device."""

    train: Tensor
    """[N, D], float32"""
    train_labels: Tensor
    """[N], int64, 0 to classes − 1"""
    val: Tensor
    """[M, D], float32"""
    val_labels: Tensor
    """[M], int64, 0 to classes − 1. They number the classes as the training set does."""
    classes: int
    """number of classes in the training set"""


def compute_features(
    backbone: nn.Module, train: ShardIndex, val: ShardIndex, center: CenterCrop, device: torch.device
) -> Features:
    """Compute the backbone's features of both sets, on the device, or on the CPU where they do not fit there.

    Raises UserError, before it computes anything, for samples without labels and for classes that only `val` has.
    """
    train_numbers = torch.tensor(_match_classes(train, val))
    (train_features, train_labels), (val_features, val_labels) = (
        extract_features(backbone, index, center, device) for index in (train, val)
    )
    home = train_features.device if train_features.device == val_features.device else torch.device("cpu")
    val_labels = train_numbers.to(val_labels.device)[val_labels]
    return Features(
        train_features.to(home), train_labels.to(home), val_features.to(home), val_labels.to(home), len(train.classes)
    )


def _match_classes(train: ShardIndex, val: ShardIndex) -> list[int]:
    """Return, for each class of `val`, its number in `train`. Raises UserError where `train` lacks it."""
    for index in (train, val):
        if not index.classes or (index.labels < 0).any():
            raise UserError(f"{index.folder} has samples without labels. Pass shards packed from class folders.")
    unknown = sorted(set(val.classes) - set(train.classes))
    if unknown:
        raise UserError(
            f"{val.folder} has classes that {train.folder} lacks: {', '.join(unknown[:5])}. Pass two sets of the same "
            "classes."
        )
    numbers = {name: number for number, name in enumerate(train.classes)}
    return [numbers[name] for name in val.classes]


@torch.inference_mode()
def extract_features(
    backbone: nn.Module, index: ShardIndex, center: CenterCrop, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Compute features [N, D], float32, and labels [N], int64, of every sample.

    The results are on the device if they fit into half of its free memory, else on the CPU. The backbone stays in
    evaluation mode: batch norms use their running statistics.
    """
    backbone.to(device).to(memory_format=torch.channels_last).eval()
    batches = load_labeled_batches(index, BATCH_SIZE, center, count_default_threads())
    total, done = -(-len(index) // BATCH_SIZE), 0
    features = torch.empty(0)
    for images, _ in show_progress(batches, f"features of {index.folder}", total):
        batch = backbone(images.to(device, non_blocking=True)).float()
        if not done:  # only now is the width D known
            features = _allocate_features(len(index), batch.shape[1], device)
        features[done : done + len(batch)] = batch
        done += len(batch)
    return features, torch.from_numpy(np.asarray(index.labels, np.int64)).to(features.device)


def show_progress(items: Iterable[Item], what: str, total: int) -> Iterable[Item]:
    """Yield the items. On a terminal a progress bar shows how many are done; it disappears at the end."""
    return track(items, what, total, transient=True, disable=not sys.stdout.isatty())


def _allocate_features(samples: int, width: int, device: torch.device) -> Tensor:
    # Only half of the free memory is used, since a protocol needs some, too: k-NN holds a normalized copy.
    if device.type == "cuda" and 4 * samples * width > torch.cuda.mem_get_info(device)[0] // 2:
        device = torch.device("cpu")
    return torch.empty(samples, width, device=device)


def check_labels(name: str, features: Tensor, labels: Tensor, classes: int) -> None:
    """Raise ValueError unless each feature vector has one label in 0 to classes − 1, and there is at least one."""
    if not len(labels) or len(features) != len(labels):
        raise ValueError(f"{len(features)} {name} features with {len(labels)} labels cannot be classified")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"the {name} labels do not lie in 0 to {classes - 1}")
