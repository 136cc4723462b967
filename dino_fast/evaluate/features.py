"""Frozen features of labelled shards, and the network that gives them."""

import sys
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import track
from torch import Tensor, nn

from dino_fast import checkpoint
from dino_fast.backbones import build_backbone
from pipelines.labelled import labelled_batches
from pipelines.loader import default_threads
from shards.errors import UserError
from shards.index import ShardIndex

BATCH = 64


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
    backbone, _ = build_backbone(state["recipe"]["backbone"])
    weights = {
        name.removeprefix("backbone."): value
        for name, value in state["model"][network].items()
        if name.startswith("backbone.")
    }
    backbone.load_state_dict(weights)
    return backbone, state["recipe"], state["step"]


@torch.inference_mode()
def extract(
    backbone: nn.Module, index: ShardIndex, resize: int, crop: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Features [N, D], float32, and labels [N], int64, of every sample, on the device; the backbone is put in
    evaluation mode, so that batch norms use their running statistics."""
    backbone.to(device).to(memory_format=torch.channels_last).eval()
    batches = labelled_batches(index, BATCH, resize, crop, default_threads())
    features, labels = [], []
    total = -(-len(index) // BATCH)
    for pictures, numbers in track(batches, f"features of {index.folder}", total, transient=True):
        features.append(backbone(pictures.to(device, non_blocking=True)).float())
        labels.append(numbers.to(device))
    return torch.cat(features), torch.cat(labels)
