"""The weights that a new run starts from: another run's checkpoint, a published file, or that of another program.

A file is read and checked as a whole before the first value is copied. One that does not fit changes nothing.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_fast.model.backbones import BACKBONES
from dino_fast.step.train_step import TrainStep
from dino_fast.weights.matching import Shapes, find_backbone_name, find_kinds, match_weights, pick_backbone
from dino_fast.weights.weight_files import DIRECTIONS, FileWeights, name_few, read_weights


def load_initial_weights(step: TrainStep, path: Path) -> list[str]:
    """Load the weights of another run into `step`, whose optimizer stays as it is. Returns lines to print.

    path: a checkpoint of dino-fast or the folder of its run; a .pth file of facebookresearch/dino, full or of a
    backbone alone; or a state dict of torchvision's ResNets, or of the model of timm that is trained, in a .safetensors
    file or in what other programs save around it. Classifiers, projectors and moving averages of other programs are
    ignored. Where the file has no head, that of `step` stays. Raises UserError for a file that is damaged, that does
    not fit (with the names, and the settings that would fit), or whose weights are not finite. `step` is then as it
    was.
    """
    found, lines = read_weights(path, find_kinds(step.bare_student.backbone))
    pairs = _match_all(path, step, found)  # raises
    with torch.no_grad():
        for own, value in pairs:
            own.copy_(value)
    step.update.after_load()
    return [*lines, *_describe(path, found), *_warn_of_lengths(step)]


def _match_all(path: Path, step: TrainStep, found: FileWeights) -> list[tuple[Tensor, Tensor]]:
    """Return each tensor of `step` that the file has a value for, with that value. Raises UserError unless all fit."""
    student, teacher = (
        {name: own for name, own in network.state_dict().items() if found.has_head or name.startswith("backbone.")}
        for network in (step.bare_student, step.teacher)
    )
    one = found.student is found.teacher
    pairs = [
        *match_weights(f"{path}: its {'network' if one else 'student'}", student, found.student, _suggest_settings),
        *match_weights(f"{path}: its {'network' if one else 'teacher'}", teacher, found.teacher, _suggest_settings),
    ]
    if found.center is not None:
        center = {"center": step.center}
        pairs += match_weights(f"{path}: its center", center, {"center": found.center}, _suggest_settings)
    return pairs


def _suggest_settings(ours: Shapes, theirs: Shapes) -> str:
    """Return the settings with which the file would fit, as far as it tells them."""
    has, wanted = _infer_settings(ours), _infer_settings(theirs)
    if "backbone" not in wanted and pick_backbone(ours) != pick_backbone(theirs):
        others = f"{', '.join(BACKBONES)}, or not complete"
        return f"Its backbone is none of {others}. Pass another file, or for a model of timm --backbone timm/NAME."
    flags = [f"--{name} {value}" for name, value in wanted.items() if value != has.get(name)]
    return f"Pass {' '.join(flags)}." if flags else "Pass another file."


def _infer_settings(shapes: Shapes) -> dict[str, str]:
    """Return the settings of a network with weights of these shapes, as far as shapes tell them."""
    name = find_backbone_name(shapes)
    settings: dict[str, Any] = {"backbone": name} if name else {}
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


def _number(name: str) -> int:
    """Return the number of a layer, 0 where it is the only one."""
    return int("0" + "".join(re.findall(r"\d", name)))


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
