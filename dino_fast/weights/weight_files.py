"""The networks in a file of weights: a checkpoint, a published file, or what another program has saved.

Nothing in a file is executed.
"""

import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dino_fast import checkpoint
from dino_fast.weights.safetensors_file import is_safetensors, read_safetensors
from shards.errors import UserError
from shards.text import shorten

EXPECTED = (
    "Pass a checkpoint or a run's folder, a .pth file of facebookresearch/dino, or a backbone's state dict "
    "(also as .safetensors, or in a checkpoint of another program)."
)
# Where programs keep the state dict of their network, from Lightning and MoCo to torchvision, DeiT and VISSL.
_PLACES = (
    "state_dict", "model_state_dict", "model", "network", "net", "classy_state_dict", "base_model", "trunk",
)  # fmt: skip
_DEEPEST = 8  # state dicts inside each other; a forged file may hold itself
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_forward_module"}  # parts of names: DDP's, torch.compile's
Kinds = Mapping[str, Collection[str]]
"""A name of each kind of backbone, and its modules, besides its classifier. What stands before this name stands before
all of the backbone's."""
OUR_KINDS: Kinds = {
    "layer1.0.conv1.weight": {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"},
    "patch_embed.proj.weight": {"cls_token", "pos_embed", "patch_embed", "blocks", "norm"},
}
_AVERAGE = re.compile(r"(^|\.)(momentum|ema|target|teacher|model_ema|encoder_k)")  # a copy that follows the network
_WEIGHT, _LENGTHS, DIRECTIONS = (f"head.last_layer.{name}" for name in ("weight", "weight_g", "weight_v"))


class _Ignored:
    """Stands for the objects that full checkpoints of the published code hold beside tensors, and drops them."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class _IgnoredDict:
    """Stands for objects that are filled like a dict, which torch's reader does only to one."""

    def __new__(cls, *_: object) -> OrderedDict[Any, Any]:  # type: ignore[misc]  # it is no instance on purpose
        return OrderedDict()


# The run's arguments with its folder, and the learning rate, which the optimizer keeps as a numpy scalar. Where a file
# asks for one of these classes, torch.load calls the stand-in. So allowing them executes nothing.
_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Ignored, name)
    for name in (
        "argparse.Namespace", "pathlib.PosixPath", "pathlib._local.PosixPath", "numpy.dtype",
        "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    )
]  # fmt: skip
# Other programs keep their settings, too.
_SETTINGS = re.compile(
    r"(omegaconf|pytorch_lightning|lightning|lightning_fabric|typing|collections|pathlib|enum)\."
    r"|builtins\.(dict|list|tuple|set|str|bytes|int|float|bool|object)$"
)


class FileWeights(NamedTuple):
    """The weights of a file by our names."""

    student: dict[str, Tensor]
    """weights by name"""
    teacher: dict[str, Tensor]
    """weights by name; the student's own dict where the file has one network"""
    center: Tensor | None
    """[1, K]"""
    ignored: list[str]
    """modules whose weights have no place here"""
    place: list[str]
    """where in the file the weights are, if that is not at the top"""

    @property
    def has_head(self) -> bool:
        return any(name.startswith("head.") for name in (*self.student, *self.teacher))


def read_weights(path: Path, kinds: Kinds = OUR_KINDS) -> tuple[FileWeights, list[str]]:
    """Return the weights of a file, or of the newest checkpoint in a run's folder, and lines to print.

    kinds: the kinds of backbones that may be in it. Raises UserError for a file that is damaged, or that holds no
    network, or several.
    """
    state, lines = read_file(path)
    return find_weights(path, state, kinds), lines


def read_file(path: Path) -> tuple[Any, list[str]]:
    """Return what a file of weights holds, on the CPU, and lines to print.

    path may be a run's folder, too. Raises UserError for a file that is damaged, or of another kind.
    """
    if path.is_dir():
        newest = checkpoint.load_newest(path)
        if newest is None:
            raise UserError(f"{path}: no checkpoint in this folder. {EXPECTED}")
        state, damaged = newest
        return state, [f"{file} is damaged: the checkpoint before it is used" for file in damaged]
    if path.match(f"step-*-{'[0-9a-f]' * 16}.pt"):
        return checkpoint.load(path), []
    state = _load(path)
    return (checkpoint.load(path) if is_ours(state) else state), []


def is_ours(state: Any) -> bool:
    """Return whether this is a checkpoint of dino-fast."""
    return isinstance(state, dict) and {"format", "model"} <= state.keys()


def _load(path: Path) -> Any:
    """Load tensors and plain data that another program has saved. Nothing in the file is executed."""
    try:
        if is_safetensors(path):
            return read_safetensors(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}. {EXPECTED}") from error
    try:
        with torch.serialization.safe_globals([*_STAND_INS, *_make_stand_ins(path)]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises nearly anything on foreign bytes
        if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
            what = f"{path} holds {asked[1]}, which is neither a tensor nor plain data, and was not executed"
            raise UserError(f"{what}. {EXPECTED}") from error
        if zipfile.is_zipfile(path):  # whole, so not damaged: a TorchScript archive, or another pickle protocol
            what = f"{path} is not what torch.save writes of a state dict"
            raise UserError(f"{what}. Save the model's state_dict() with torch.save. {EXPECTED}") from error
        raise UserError(f"{path} is damaged, or not a file of weights. {EXPECTED}") from error


def _make_stand_ins(path: Path) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Return stand-ins for the classes of other programs' settings that a file asks for."""
    try:
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # torch.load will raise what is to be said
        return []
    return [
        (_IgnoredDict if name.lower().endswith("dict") else _Ignored, name) for name in asked if _SETTINGS.match(name)
    ]


def find_weights(path: Path, state: Any, kinds: Kinds) -> FileWeights:
    """Find the networks and the center in what `read_file` returned. Raises UserError where there are none."""
    parts, place = (state["model"], []) if is_ours(state) else _unwrap(state)
    if not isinstance(parts, dict):
        raise UserError(f"{path} holds no weights. {EXPECTED}")
    networks = [_rename(path, parts[name], kinds) for name in ("student", "teacher") if name in parts]
    networks = networks or [_rename(path, parts, kinds)]
    loss = parts.get("dino_loss")
    center = parts.get("center", loss.get("center") if isinstance(loss, dict) else None)
    if center is not None and not _is_plain(center):
        raise UserError(f"{path}: its center is not a tensor of numbers. {EXPECTED}")
    student, teacher = networks[0], networks[-1]
    ignored = sorted({*student.ignored, *teacher.ignored})
    found = FileWeights(student.weights, teacher.weights, center, ignored, [*place, *student.place])
    return found if found.has_head else found._replace(center=None)


def _unwrap(state: Any) -> tuple[Any, list[str]]:
    """Return what holds the weights inside what other programs save around it, and the keys that lead there."""
    keys: list[str] = []
    while len(keys) < _DEEPEST and isinstance(state, dict):
        inner = [key for key in _PLACES if isinstance(state.get(key), dict)]
        if not inner or {"student", "teacher"} & state.keys() or _has_tensors(state):
            break
        keys.append(inner[0])
        state = state[inner[0]]
    return state, keys


def _has_tensors(weights: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in weights.values())


class _Network(NamedTuple):
    """One network of a file."""

    weights: dict[str, Tensor]
    """weights by our names"""
    ignored: list[str]
    """modules whose weights have no place here"""
    place: list[str]
    """what stands before the backbone's names, if that is unusual"""


def _rename(path: Path, weights: Any, kinds: Kinds) -> _Network:
    """Return a network's weights by our names: the published ones without what other programs write before them.

    Raises UserError where there are no weights, or not one backbone.
    """
    if not isinstance(weights, dict) or not _has_tensors(weights):
        keys = f" under {name_few([str(key) for key in weights])}" if isinstance(weights, dict) and weights else ""
        raise UserError(f"{path} holds no weights{keys}. {EXPECTED}")
    named: dict[str, Tensor] = {}
    for key, value in weights.items():
        name = ".".join(part for part in str(key).split(".") if part not in _WRAPPERS)
        if not _is_plain(value):
            raise UserError(f"{path}: {name_few([name])} is not a tensor of numbers. {EXPECTED}")
        if name in named:
            raise UserError(f"{path} holds {name_few([name])} twice, under different prefixes. {EXPECTED}")
        named[name] = value
    return _pick_network(named, _find_root(path, named, kinds), kinds)


def _find_root(path: Path, names: Iterable[str], kinds: Kinds) -> str:
    """Return what stands before the names of the trained backbone. Raises UserError where there are several.

    Where there is none, it is what would stand before its names in a published file.
    """
    landmarks = re.compile(rf"((?:.*\.)?)(?:{'|'.join(map(re.escape, kinds))})")
    found = (landmarks.fullmatch(name) for name in names)
    roots = [match[1] for match in found if match]
    trained = [root for root in roots if not _AVERAGE.search(root)] if len(roots) > 1 else roots
    if len(trained) == 1:
        return trained[0]
    if roots:
        several = name_few([root.rstrip(".") or "no prefix" for root in trained or roots])
        raise UserError(f"{path} holds several backbones ({several}). Save the state dict of one of them alone.")
    return "backbone." if any(name.startswith("backbone.") for name in names) else ""


def _pick_network(named: Mapping[str, Tensor], root: str, kinds: Kinds) -> _Network:
    """Pick the backbone whose names begin with `root`, and the head beside it or in it."""
    home = re.sub(r"[^.]*\.$", "", root)
    has_head = any(name.startswith((f"{home}head.mlp.", f"{home}head.last_layer.")) for name in named)
    modules = next((kind for landmark, kind in kinds.items() if f"{root}{landmark}" in named), None)
    picked: dict[str, Tensor] = {}
    ignored: set[str] = set()
    for name, value in named.items():
        inner = name.removeprefix(root)
        if has_head and name.startswith(f"{home}head."):
            picked[name.removeprefix(home)] = value
        elif name.startswith(root) and (modules is None or _is_inside(inner, modules)):
            picked[f"backbone.{inner}"] = value
        else:
            near = root if name.startswith(root) else home if name.startswith(home) else ""
            ignored.add(("" if near == root else near) + name.removeprefix(near).split(".")[0])
    place = [] if root in ("", "backbone.") else [root.rstrip(".")]
    return _Network(_split_last_layer(picked), sorted(ignored), place)


def _is_inside(name: str, modules: Collection[str]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


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
        weights |= {_LENGTHS: lengths, DIRECTIONS: rows}
    return weights


def name_few(names: Sequence[str], most: int = 3) -> str:
    """Return the first names as one text, made safe for a terminal: they come from a stranger's file."""
    return ", ".join(shorten(name, 80) for name in names[:most]) + (", …" if len(names) > most else "")
