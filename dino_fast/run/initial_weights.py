"""The weights that a new run starts from: another run's checkpoint, or a file in the layout of the published code.

A file is read and checked as a whole before the first value is copied. One that does not fit changes nothing.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dino_fast import checkpoint
from dino_fast.model.backbones import BACKBONES, build_backbone
from dino_fast.step.train_step import TrainStep
from shards.errors import UserError
from shards.text import shorten

Shapes = dict[str, list[int]]

_EXPECTED = "Pass a checkpoint or a run's folder, a .pth file of facebookresearch/dino, or a ResNet's state dict."
_COUNT = ".num_batches_tracked"  # older files lack it, and a batch norm with a fixed momentum does not need it
_CLASSIFIER = ("backbone.fc.weight", "backbone.fc.bias")  # in torchvision's own files
_WEIGHT, _LENGTHS, _DIRECTIONS = (f"head.last_layer.{name}" for name in ("weight", "weight_g", "weight_v"))


class _Ignored:
    """Stands for the objects that full checkpoints of the published code hold beside tensors, and drops them."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


# The run's arguments with its folder, and the learning rate, which the optimizer keeps as a numpy scalar. Where a file
# asks for one of these classes, torch.load calls the stand-in. So allowing them executes nothing.
_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Ignored, name)
    for name in (
        "argparse.Namespace", "pathlib.PosixPath", "pathlib._local.PosixPath", "numpy.dtype",
        "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    )
]  # fmt: skip


class _FileWeights(NamedTuple):
    """The weights of a file by our names."""

    student: dict[str, Tensor]
    """weights by name"""
    teacher: dict[str, Tensor]
    """weights by name; the student's own dict where the file has one network"""
    center: Tensor | None
    """[1, K]"""
    ignored: list[str]
    """names of the weights that have no place here"""

    @property
    def has_head(self) -> bool:
        return any(name.startswith("head.") for name in (*self.student, *self.teacher))


def load_initial_weights(step: TrainStep, path: Path) -> list[str]:
    """Load the weights of another run into `step`, whose optimizer stays as it is. Returns lines to print.

    path: a checkpoint of dino-fast or the folder of its run; a .pth file of facebookresearch/dino, full or of a
    backbone alone; or a state dict of torchvision's ResNets, whose classifier is ignored. Where the file has no head,
    that of `step` stays. Raises UserError for a file that is damaged, that does not fit (with the names, and the
    settings that would fit), or whose weights are not finite. `step` is then as it was.
    """
    state, lines = _read(path)
    found = _find_weights(path, state)
    pairs = _match_all(path, step, found)  # raises
    with torch.no_grad():
        for own, value in pairs:
            own.copy_(value)
    step.update.after_load()
    return [*lines, *_describe(path, found), *_warn_of_lengths(step)]


def _read(path: Path) -> tuple[Any, list[str]]:
    """Return what the file holds, on the CPU, and lines to print."""
    if path.is_dir():
        newest = checkpoint.load_newest(path)
        if newest is None:
            raise UserError(f"{path}: no checkpoint in this folder. {_EXPECTED}")
        state, damaged = newest
        return state, [f"{file} is damaged: the checkpoint before it is used" for file in damaged]
    if path.match("step-*.pt"):
        return checkpoint.load(path), []
    state = _load(path)
    return (checkpoint.load(path) if isinstance(state, dict) and "format" in state else state), []


def _load(path: Path) -> Any:
    """Load tensors and plain data that another program has saved. Nothing in the file is executed."""
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"{path}: {error.strerror}. {_EXPECTED}") from error
    except Exception as error:  # torch's reader raises nearly anything on foreign bytes
        if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
            what = f"{path} holds {asked[1]}, which is neither a tensor nor plain data, and was not executed"
            raise UserError(f"{what}. {_EXPECTED}") from error
        raise UserError(f"{path} is damaged, or not a file of weights. {_EXPECTED}") from error


def _find_weights(path: Path, state: Any) -> _FileWeights:
    """Find the networks and the center, in any layout. Raises UserError where there are none."""
    parts = state["model"] if isinstance(state, dict) and "format" in state else state
    if not isinstance(parts, dict):
        raise UserError(f"{path} holds no weights. {_EXPECTED}")
    networks = [_rename(path, parts[name]) for name in ("student", "teacher") if name in parts]
    networks = networks or [_rename(path, parts)]
    ignored = {name for network in networks for name in _CLASSIFIER if network.pop(name, None) is not None}
    loss = parts.get("dino_loss")
    center = parts.get("center", loss.get("center") if isinstance(loss, dict) else None)
    if center is not None and not _is_plain(center):
        raise UserError(f"{path}: its center is not a tensor of numbers. {_EXPECTED}")
    found = _FileWeights(networks[0], networks[-1], center, sorted(ignored))
    return found if found.has_head else found._replace(center=None)


def _rename(path: Path, weights: Any) -> dict[str, Tensor]:
    """Return a network's weights by our names: the published ones without the prefixes of wrappers."""
    if not isinstance(weights, dict) or not any(isinstance(value, Tensor) for value in weights.values()):
        keys = f" under {_few([str(key) for key in weights])}" if isinstance(weights, dict) and weights else ""
        raise UserError(f"{path} holds no weights{keys}. {_EXPECTED}")
    named: dict[str, Tensor] = {}
    for key, value in weights.items():
        name = re.sub(r"^((module|backbone)\.)+", "", str(key))
        if not _is_plain(value):
            raise UserError(f"{path}: {_few([name])} is not a tensor of numbers. {_EXPECTED}")
        named[name if name.startswith("head.") else f"backbone.{name}"] = value
    if "backbone.cls_token" in named:
        raise UserError(f"{path} holds a vision transformer. Pass a file of a ResNet ({', '.join(BACKBONES)}).")
    return _split_last_layer(named)


def _is_plain(value: Any) -> bool:
    """Return whether `value` is a dense tensor of real numbers."""
    if not isinstance(value, Tensor) or value.is_meta or value.is_quantized or value.is_complex():
        return False
    return value.layout == torch.strided


def _split_last_layer(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split the last layer's W into lengths and directions.

    Released heads, also the ResNet-50's, hold W itself (issue 189 of facebookresearch/dino).
    """
    if _WEIGHT in weights and weights[_WEIGHT].ndim == 2:
        rows = weights.pop(_WEIGHT)
        lengths = rows.to(torch.promote_types(rows.dtype, torch.float32)).norm(dim=1, keepdim=True)
        weights |= {_LENGTHS: lengths, _DIRECTIONS: rows}
    return weights


def _match_all(path: Path, step: TrainStep, found: _FileWeights) -> list[tuple[Tensor, Tensor]]:
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
        keys = ", ".join(f"{len(names)} {kind} ({_few(names)})" for kind, names in problems.items() if names)
        raise UserError(f"{what} does not fit this run: {keys}. {_suggest_settings(ours, theirs)}")
    pairs = {
        name: (value, given[name].to(value.dtype))
        for name, value in own.items()
        if name in given and given[name].shape == value.shape  # a count may be anything
    }
    if broken := [name for name, (_, value) in pairs.items() if not value.isfinite().all()]:
        raise UserError(f"{what} has values that are not finite, in {len(broken)} keys ({_few(broken)}). {_EXPECTED}")
    return list(pairs.values())


def _shapes(weights: Mapping[str, Tensor]) -> Shapes:
    return {name: list(value.shape) for name, value in weights.items() if not name.endswith(_COUNT)}


def _suggest_settings(ours: Shapes, theirs: Shapes) -> str:
    """Return the settings with which the file would fit, as far as it tells them."""
    has, wanted = _infer_settings(ours), _infer_settings(theirs)
    if "backbone" not in wanted:
        return f"Its backbone is none of {', '.join(BACKBONES)}, or not complete. Pass another file."
    flags = [f"--{name} {value}" for name, value in wanted.items() if value != has.get(name)]
    return f"Pass {' '.join(flags)}." if flags else "Pass another file."


def _infer_settings(shapes: Shapes) -> dict[str, str]:
    """Return the settings of a network with weights of these shapes, as far as shapes tell them."""
    backbone = {name: shape for name, shape in shapes.items() if name.startswith("backbone.")}
    settings: dict[str, Any] = {"backbone": name for name in BACKBONES if backbone == _backbone_shapes(name)}  # noqa: B035
    layers = sorted((name for name in shapes if re.fullmatch(r"head\.mlp\.(\d+\.)?weight", name)), key=_number)
    linear = [shapes[name] for name in layers if len(shapes[name]) == 2]  # [out, in] each; a batch norm has [width]
    if linear:
        settings["head.layers"] = len(linear)
        settings["head.bottleneck_dim"] = linear[-1][0]
        settings["head.batch_norm"] = any(re.fullmatch(r"head\..*running_mean", name) for name in shapes)
    if len(linear) > 1:
        settings["head.hidden_dim"] = linear[0][0]
    if _DIRECTIONS in shapes:
        settings["head.out_dim"] = shapes[_DIRECTIONS][0]
    return {name: str(value).lower() for name, value in settings.items()}


def _number(name: str) -> int:
    """Return the number of a layer, 0 where it is the only one."""
    return int("0" + "".join(re.findall(r"\d", name)))


def _backbone_shapes(name: str) -> Shapes:
    with torch.device("meta"):
        network, _ = build_backbone(name)
    return {f"backbone.{name}": shape for name, shape in _shapes(network.state_dict()).items()}


def _describe(path: Path, found: _FileWeights) -> list[str]:
    """Return lines that say what was loaded, and what was not."""
    parts = {"backbone": True, "head": found.has_head, "center": found.center is not None}
    loaded = " and ".join(part for part, is_there in parts.items() if is_there)
    new = ", ".join([*(part for part, is_there in parts.items() if not is_there), "optimizer", "step count"])
    whose = "one network for student and teacher" if found.student is found.teacher else "student and teacher"
    lines = [f"started from {path}: {loaded} of {whose}. New: {new}."]
    if found.ignored:
        lines.append(f"ignored in {path}: {', '.join(name.removeprefix('backbone.') for name in found.ignored)}")
    return lines


def _warn_of_lengths(step: TrainStep) -> list[str]:
    """Return a warning where prototypes are not of length 1 in a run that does not learn lengths."""
    lengths = step.bare_student.head.last_layer.weight_g
    least, most = (value.item() for value in lengths.detach().aminmax())
    if lengths.requires_grad or max(1 - least, most - 1) < 1e-3:
        return []
    return [f"Its prototypes stay {least:.3g} to {most:.3g} long. --head.norm_last_layer false would learn lengths."]


def _few(names: Sequence[str]) -> str:
    """Return the first three names, made safe for a terminal: they come from a stranger's file."""
    return ", ".join(shorten(name, 80) for name in names[:3]) + (", …" if len(names) > 3 else "")
