"""Frozen features of labelled shards, the network that gives them, and the options by which a command names both."""

import argparse
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
from pipelines.labelled import labelled_batches
from pipelines.loader import default_threads
from shards.arguments import Parser
from shards.arguments import path as path_or_url
from shards.errors import UserError
from shards.index import ShardIndex

BATCH = 64

Item = TypeVar("Item")


def load_backbone(path: Path, network: Literal["teacher", "student"]) -> tuple[nn.Module, dict[str, Any], int]:
    """The backbone of a checkpoint file, or of the newest one in a run's folder; the run's recipe as plain data; the
    steps that were done.

    UserError for a file that is no checkpoint, or a folder without one.
    """
    if path.is_dir():
        found = checkpoint.load_newest(path)
        if found is None:
            raise UserError(
                f"--checkpoint {path}: no checkpoint in this folder; pass a step-….pt file or a run's folder"
            )
        state, damaged = found
        for file in damaged:
            print(f"{file} is damaged: the checkpoint before is used", file=sys.stderr)
    else:
        state = checkpoint.load(path)
    weights = {
        name.removeprefix("backbone."): value
        for name, value in state["model"].get(network, {}).items()
        if name.startswith("backbone.")
    }
    try:
        backbone, _ = build_backbone(state["recipe"]["backbone"])
        backbone.load_state_dict(weights)
    except (KeyError, TypeError, RuntimeError, UserError) as error:
        raise UserError(
            f"--checkpoint {path}: its {network} is not of the backbone that its recipe names; pass a file that a run "
            "wrote"
        ) from error
    return backbone, state["recipe"], state["step"]


@dataclass(frozen=True)
class Features:
    """What a classifier is fitted to and what it is scored on, all on one device. Both sets' labels count the classes
    of the training set."""

    train: Tensor  # [N, D], float32
    train_labels: Tensor  # [N], int64, 0 to classes − 1
    val: Tensor  # [M, D], float32
    val_labels: Tensor  # [M], int64, 0 to classes − 1
    classes: int


def features_of(
    backbone: nn.Module, train: ShardIndex, val: ShardIndex, resize: int, crop: int, device: torch.device
) -> Features:
    """The backbone's features of both sets: on the device, or on the CPU where they do not fit there.

    UserError, before anything is computed, for samples without labels and for classes that only `val` has.
    """
    places = torch.tensor(_places(train, val))
    (train_features, train_labels), (val_features, val_labels) = (
        extract(backbone, index, resize, crop, device) for index in (train, val)
    )
    home = train_features.device if train_features.device == val_features.device else torch.device("cpu")
    val_labels = places.to(val_labels.device)[val_labels]
    return Features(
        train_features.to(home), train_labels.to(home), val_features.to(home), val_labels.to(home), len(train.classes)
    )


def _places(train: ShardIndex, val: ShardIndex) -> list[int]:
    """The number among the training set's classes of each class of `val`. UserError where there is none."""
    for index in (train, val):
        if not index.classes or (index.labels < 0).any():
            raise UserError(
                f"{index.folder} has samples without labels: a score needs shards packed from class folders"
            )
    unknown = sorted(set(val.classes) - set(train.classes))
    if unknown:
        raise UserError(f"{val.folder} has classes that {train.folder} lacks: {', '.join(unknown[:5])}")
    numbers = {name: number for number, name in enumerate(train.classes)}
    return [numbers[name] for name in val.classes]


@torch.inference_mode()
def extract(
    backbone: nn.Module, index: ShardIndex, resize: int, crop: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Features [N, D], float32, and labels [N], int64, of every sample, on the device if half of its free memory
    holds them, else on the CPU; the backbone is put in evaluation mode, so that batch norms use their running
    statistics."""
    backbone.to(device).to(memory_format=torch.channels_last).eval()
    batches = labelled_batches(index, BATCH, resize, crop, default_threads())
    total, done = -(-len(index) // BATCH), 0
    features = torch.empty(0)
    for pictures, _ in progress(batches, f"features of {index.folder}", total):
        found = backbone(pictures.to(device, non_blocking=True)).float()
        if not done:  # the first batch says how wide they are
            features = _room(len(index), found.shape[1], device)
        features[done : done + len(found)] = found
        done += len(found)
    return features, torch.from_numpy(np.asarray(index.labels, np.int64)).to(features.device)


def progress(items: Iterable[Item], what: str, total: int) -> Iterable[Item]:
    """The items, with a bar on a terminal that goes when they end."""
    return track(items, what, total, transient=True, disable=not sys.stdout.isatty())


def _room(samples: int, width: int, device: torch.device) -> Tensor:
    # Half, since a protocol works on them too: k-NN holds a normalised copy.
    if device.type == "cuda" and 4 * samples * width > torch.cuda.mem_get_info(device)[0] // 2:
        device = torch.device("cpu")
    return torch.empty(samples, width, device=device)


def check_labels(name: str, features: Tensor, labels: Tensor, classes: int) -> None:
    """ValueError unless there is a feature vector, one label for each, and labels lie in 0 to classes − 1."""
    if not len(labels) or len(features) != len(labels):
        raise ValueError(f"{len(features)} {name} features with {len(labels)} labels cannot be classified")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"the {name} labels do not lie in 0 to {classes - 1}")


class OptionParser(Parser):
    """The options of every evaluation command. A wrong call is one line and exit status 2."""

    def __init__(self, command: str, description: str, epilog: str | None = None) -> None:
        super().__init__(prog=f"dino-fast {command}", description=description, epilog=epilog)
        self.add_argument("--checkpoint", type=Path, required=True, help="a step-….pt file, or a run's folder")
        self.add_argument("--train", type=path_or_url, required=True, help="labelled shards to learn from")
        self.add_argument("--val", type=path_or_url, required=True, help="labelled shards that are classified")
        self.add_argument("--network", choices=("teacher", "student"), default="teacher", help="default: teacher")
        self.add_argument("--resize", type=_pixels, help="short side; default: crop · 256 / 224")
        self.add_argument("--crop", type=_pixels, help="side of the centre crop; default: the recipe's global size")
        self.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
        self.add_argument("--json", type=Path, help="also write the scores to this file")


def _pixels(text: str) -> int:
    if not text.isdigit() or not 16 <= int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"expected pixels, 16 to 4096, not {text!r}")
    return int(text)


def chosen(options: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """The backbone that the options of an `OptionParser` name, and what was chosen, as a result's JSON begins:
    checkpoint, step, network, resize, crop. UserError for what cannot be."""
    if options.json and not options.json.parent.is_dir():
        raise UserError(f"--json {options.json}: no such folder; make it first")
    if options.json and options.json.is_dir():
        raise UserError(f"--json {options.json}: this is a folder; name a file in it")
    backbone, recipe, step = load_backbone(options.checkpoint, options.network)
    crop = options.crop or recipe["crops"]["global_size"]
    resize = options.resize or round(crop * 256 / 224)
    if resize < crop:
        raise UserError(f"--resize {resize} is smaller than the crop of {crop} pixels: raise it, or lower --crop")
    return backbone, {
        "checkpoint": str(options.checkpoint), "step": step, "network": options.network, "resize": resize, "crop": crop,
    }  # fmt: skip
