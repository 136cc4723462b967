"""Frozen features of labeled shards, and the backbone of a checkpoint that computes them."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from dino_fast import checkpoint
from dino_fast.model.backbones import build_backbone
from pipelines.labeled import CenterCrop, load_labeled_batches
from pipelines.loader import count_default_threads
from pipelines.photometric import MEAN, STD, Normalization
from shards.errors import UserError
from shards.index import ShardIndex

BATCH_SIZE = 64  # images that go through the backbone at once

Item = TypeVar("Item")


def load_backbone(path: Path, network: Literal["teacher", "student"]) -> tuple[nn.Module, dict[str, Any], int]:
    """Load the backbone of a checkpoint file, or of the newest checkpoint in a run's folder.

    Return the backbone, the run's recipe as plain data, and how many steps the run had done. Raises UserError for a
    file that is no checkpoint, and for a folder without one.
    """
    state = _load_state(path)
    weights = {
        name.removeprefix("backbone."): value
        for name, value in state["model"].get(network, {}).items()
        if name.startswith("backbone.")
    }
    try:
        backbone, _ = build_backbone(state["recipe"]["backbone"])
        backbone.load_state_dict(weights)
    except UserError as error:  # no such backbone, or timm is missing
        raise UserError(f"--checkpoint {path}: {error}") from error
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"--checkpoint {path}: the weights of its {network} do not fit the backbone that its recipe names. Pass a "
            "checkpoint that `dino-fast train` wrote."
        ) from error
    return backbone, state["recipe"], state["step"]


def read_normalization(recipe: dict[str, Any]) -> Normalization:
    """Return the normalization of a run from its recipe. In early checkpoints it is not a setting, but ImageNet's."""
    data = recipe.get("data", {})
    return Normalization(tuple(data.get("mean", MEAN)), tuple(data.get("std", STD)))


def _load_state(path: Path) -> dict[str, Any]:
    """Load a checkpoint file, or the newest valid one in a folder. Damaged ones are named on standard error."""
    if not path.is_dir():
        return checkpoint.load(path)
    found = checkpoint.load_newest(path)
    if found is None:
        raise UserError(
            f"--checkpoint {path}: this folder holds no checkpoint. Pass a step-….pt file, or a run's output folder."
        )
    state, damaged = found
    for file in damaged:
        print(f"{file} is damaged. The checkpoint before it is used.", file=sys.stderr)
    return state


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

    Raises UserError, before it computes anything, for samples
    without labels and for classes that only `val` has.
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

    The results are on the
    device if they fit into half of its free memory, else on the CPU. The backbone stays in evaluation mode: batch
    norms use their running statistics.
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
