"""The weights that a new run starts from: another run's checkpoint, a published file, or that of another program.

A file is read and checked as a whole before the first value is copied. One that does not fit changes nothing.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino_fast.model.backbones import BACKBONES, build_backbone
from dino_fast.model.timm_backbones import find_classifiers
from dino_fast.run.weight_files import (
    DIRECTIONS,
    EXPECTED,
    OUR_KINDS,
    FileWeights,
    Kinds,
    name_few,
    read_weights,
)
from dino_fast.step.train_step import TrainStep
from shards.errors import UserError

Shapes = dict[str, list[int]]

_COUNT = ".num_batches_tracked"  # older files lack it, and a batch norm with a fixed momentum does not need it


def load_initial_weights(step: TrainStep, path: Path) -> list[str]:
    """Load the weights of another run into `step`, whose optimizer stays as it is. Returns lines to print.

    path: a checkpoint of dino-fast or the folder of its run; a .pth file of facebookresearch/dino, full or of a
    backbone alone; or a state dict of torchvision's ResNets, or of the model of timm that is trained, in a .safetensors
    file or in what other programs save around it. Classifiers, projectors and moving averages of other programs are
    ignored. Where the file has no head, that of `step` stays. Raises UserError for a file that is damaged, that does
    not fit (with the names, and the settings that would fit), or whose weights are not finite. `step` is then as it
    was.
    """
    found, lines = read_weights(path, _find_kinds(step.bare_student.backbone))
    pairs = _match_all(path, step, found)  # raises
    with torch.no_grad():
        for own, value in pairs:
            own.copy_(value)
    step.update.after_load()
    return [*lines, *_describe(path, found), *_warn_of_lengths(step)]


def _find_kinds(backbone: nn.Module) -> Kinds:
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


def _match_all(path: Path, step: TrainStep, found: FileWeights) -> list[tuple[Tensor, Tensor]]:
    """Return each tensor of `step` that the file has a value for, with that value. Raises UserError unless all fit."""
    student, teacher = (
        {name: own for name, own in network.state_dict().items() if found.has_head or name.startswith("backbone.")}
        for network in (step.bare_student, step.teacher)
    )
    one = found.student is found.teacher
    pairs = [
        *_match(f"{path}: its {'network' if one else 'student'}", student, found.student),
        *_match(f"{path}: its {'network' if one else 'teacher'}", teacher, found.teacher),
    ]
    if found.center is not None:
        pairs += _match(f"{path}: its center", {"center": step.center}, {"center": found.center})
    return pairs


def _match(what: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return our tensors with the given values in our types. Raises UserError unless all fit and are finite."""
    ours, theirs = _shapes(own), _shapes(given)
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
        raise UserError(f"{what} does not fit this run: {keys}. {_suggest_settings(ours, theirs)}")
    pairs = {
        name: (value, given[name].to(value.dtype))
        for name, value in own.items()
        if name in given and given[name].shape == value.shape  # a count may be anything
    }
    if broken := [name for name, (_, value) in pairs.items() if not value.isfinite().all()]:
        names = name_few(broken)
        raise UserError(f"{what} has values that are not finite, in {len(broken)} keys ({names}). {EXPECTED}")
    return list(pairs.values())


def _shapes(weights: Mapping[str, Tensor]) -> Shapes:
    return {name: list(value.shape) for name, value in weights.items() if not name.endswith(_COUNT)}


def _suggest_settings(ours: Shapes, theirs: Shapes) -> str:
    """Return the settings with which the file would fit, as far as it tells them."""
    has, wanted = _infer_settings(ours), _infer_settings(theirs)
    if "backbone" not in wanted and _pick_backbone(ours) != _pick_backbone(theirs):
        others = f"{', '.join(BACKBONES)}, or not complete"
        return f"Its backbone is none of {others}. Pass another file, or for a model of timm --backbone timm/NAME."
    flags = [f"--{name} {value}" for name, value in wanted.items() if value != has.get(name)]
    return f"Pass {' '.join(flags)}." if flags else "Pass another file."


def _infer_settings(shapes: Shapes) -> dict[str, str]:
    """Return the settings of a network with weights of these shapes, as far as shapes tell them."""
    backbone = _pick_backbone(shapes)
    settings: dict[str, Any] = {"backbone": name for name in BACKBONES if backbone == _backbone_shapes(name)}  # noqa: B035
    layers = sorted((name for name in shapes if re.fullmatch(r"head\.mlp\.(\d+\.)?weight", name)), key=_number)
    linear = [shapes[name] for name in layers if len(shapes[name]) == 2]  # [out, in] each; a batch norm has [width]
    if linear:
        settings["head.layers"] = len(linear)
        settings["head.bottleneck_dim"] = linear[-1][0]
        settings["head.batch_norm"] = any(re.fullmatch(r"head\..*running_mean", name) for name in shapes)
    if len(linear) > 1:
        settings["head.hidden_dim"] = linear[0][0]
    if DIRECTIONS in shapes:
        settings["head.out_dim"] = shapes[DIRECTIONS][0]
    return {name: str(value).lower() for name, value in settings.items()}


def _pick_backbone(shapes: Shapes) -> Shapes:
    return {name: shape for name, shape in shapes.items() if name.startswith("backbone.")}


def _number(name: str) -> int:
    """Return the number of a layer, 0 where it is the only one."""
    return int("0" + "".join(re.findall(r"\d", name)))


def _backbone_shapes(name: str) -> Shapes:
    with torch.device("meta"):
        network, _ = build_backbone(name)
    return {f"backbone.{name}": shape for name, shape in _shapes(network.state_dict()).items()}


def _describe(path: Path, found: FileWeights) -> list[str]:
    """Return lines that say what was loaded, and what was not."""
    parts = {"backbone": True, "head": found.has_head, "center": found.center is not None}
    loaded = " and ".join(part for part, is_there in parts.items() if is_there)
    new = ", ".join([*(part for part, is_there in parts.items() if not is_there), "optimizer", "step count"])
    whose = "one network for student and teacher" if found.student is found.teacher else "student and teacher"
    lines = [f"started from {path}: {loaded} of {whose}. New: {new}."]
    if found.place:
        lines.append(f"The weights of {path} are those under {name_few(found.place)}.")
    if found.ignored:
        lines.append(f"ignored in {path}: {name_few(found.ignored, 10)}")
    return lines


def _warn_of_lengths(step: TrainStep) -> list[str]:
    """Return a warning where prototypes are not of length 1 in a run that does not learn lengths."""
    lengths = step.bare_student.head.last_layer.weight_g
    least, most = (value.item() for value in lengths.detach().aminmax())
    if lengths.requires_grad or max(1 - least, most - 1) < 1e-3:
        return []
    return [f"Its prototypes stay {least:.3g} to {most:.3g} long. --head.norm_last_layer false would learn lengths."]
