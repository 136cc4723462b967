"""How the weights of a file fit a network of ours: by name and shape, and which backbone they are of."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor, nn

from dino_fast.model.backbones import BACKBONES, build_backbone
from dino_fast.model.timm_backbones import find_classifiers
from dino_fast.weights.weight_files import EXPECTED, OUR_KINDS, Kinds, name_few
from shards.errors import UserError

_COUNT = ".num_batches_tracked"  # older files lack it, and a batch norm with a fixed momentum does not need it

Shapes = Mapping[str, list[int]]  # by name
Value = TypeVar("Value")


def find_kinds(backbone: nn.Module) -> Kinds:
    """Return by which names a backbone is found in a file: those of ours, or for a model of timm its own."""
    classifiers = find_classifiers(backbone)
    if classifiers is None:
        return OUR_KINDS
    names = list(backbone.state_dict())
    landmark = next(name for name in names if not any(other.endswith(f".{name}") for other in names))
    # A module that the classifier lies in is named by what else is in it: head.norm beside head.fc.
    outer = {classifier.split(".")[0] for classifier in classifiers}
    paths = (name.split(".") for name in names)
    return {landmark: {".".join(path[: 2 if path[0] in outer else 1]) for path in paths}}


def match_weights(
    what: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor], suggest: Callable[[Shapes, Shapes], str]
) -> list[tuple[Tensor, Tensor]]:
    """Return our tensors with the given values in our types.

    what: the beginning of a message, such as "weights.pth: its teacher"; suggest: returns what to do, from the shapes
    of ours and of theirs. Raises UserError unless all fit and are finite.
    """
    ours, theirs = list_shapes(own), list_shapes(given)
    problems = {
        "missing": [name for name in ours if name not in theirs],
        "unexpected": [name for name in theirs if name not in ours],
        "misshapen": [
            f"{name} {theirs[name]} for {shape}"
            for name, shape in ours.items()
            if name in theirs and theirs[name] != shape
        ],
    }
    if any(problems.values()):
        keys = ", ".join(f"{len(names)} {kind} ({name_few(names)})" for kind, names in problems.items() if names)
        raise UserError(f"{what} does not fit the network: {keys}. {suggest(ours, theirs)}")
    pairs = {
        name: (value, given[name].to(value.dtype))
        for name, value in own.items()
        if name in given and given[name].shape == value.shape  # a count may be anything
    }
    if broken := [name for name, (_, value) in pairs.items() if not value.isfinite().all()]:
        names = name_few(broken)
        raise UserError(f"{what} has values that are not finite, in {len(broken)} keys ({names}). {EXPECTED}")
    return list(pairs.values())


def list_shapes(weights: Mapping[str, Tensor]) -> Shapes:
    """Return the shapes by name, without batch norms' counts."""
    return {name: list(value.shape) for name, value in weights.items() if not name.endswith(_COUNT)}


def find_backbone_name(shapes: Shapes) -> str | None:
    """Return which of our backbones has the shapes whose names begin with `backbone.`, or None."""
    shapes = pick_backbone(shapes)
    return next((name for name in BACKBONES if shapes == _list_backbone_shapes(name)), None)


def pick_backbone(named: Mapping[str, Value]) -> dict[str, Value]:
    """Return what belongs to names that begin with `backbone.`."""
    return {name: value for name, value in named.items() if name.startswith("backbone.")}


@cache
def _list_backbone_shapes(name: str) -> Shapes:
    with torch.device("meta"):
        network, _ = build_backbone(name)
    return {f"backbone.{name}": shape for name, shape in list_shapes(network.state_dict()).items()}
