"""The backbone out of a file of weights, ours or foreign, or with the weights that timm has for it."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dino_fast.model.backbones import BACKBONES, build_backbone
from dino_fast.model.timm_backbones import PREFIX, load_timm_model
from dino_fast.weights.matching import (
    Shapes,
    find_backbone_name,
    find_kinds,
    list_shapes,
    match_weights,
    pick_backbone,
)
from dino_fast.weights.weight_files import OUR_KINDS, find_weights, is_ours, read_file
from pipelines.photometric import MEAN, STD, Normalization
from shards.errors import UserError


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
    normalization: Normalization
    """that of the images it was trained on"""


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
    return TrainedBackbone(name, backbone, recipe, step, _read_normalization(recipe))


def load_pretrained_backbone(name: str | None) -> TrainedBackbone:
    """Load the weights that timm downloads, or has downloaded, for a model `timm/NAME`.

    Raises UserError for another backbone, for a model without weights, and where they cannot be had.
    """
    if name is None or not name.startswith(PREFIX):
        raise UserError(
            f"--pretrained needs --backbone timm/NAME, not {name}. For weights in a file pass --checkpoint FILE."
        )
    network, mean, std = load_timm_model(name)
    return TrainedBackbone(name, network, {}, None, Normalization(mean, std))


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


def _read_normalization(recipe: dict[str, Any]) -> Normalization:
    """Return the normalization of a run from its recipe. In early checkpoints it is not a setting, but ImageNet's."""
    data = recipe.get("data", {})
    return Normalization(tuple(data.get("mean", MEAN)), tuple(data.get("std", STD)))
