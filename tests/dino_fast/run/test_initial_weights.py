"""Fresh runs from other runs' weights. Files in the published layouts are written here from torch's own modules, and
the networks of a step that took them are held against those modules' outputs."""

import argparse
import collections
import copy
import functools
import io
import json
import re
import struct
import sys
import warnings
from dataclasses import replace
from pathlib import Path, PosixPath
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from dino_fast import checkpoint
from dino_fast.config import read_recipe
from dino_fast.model.backbones import BACKBONES, build_backbone
from dino_fast.model.head import HeadRecipe
from dino_fast.model.student_teacher import build_student_teacher
from dino_fast.run.initial_weights import load_initial_weights
from dino_fast.step.hyper import Hyper
from dino_fast.step.loss import LossRecipe
from dino_fast.step.optimizers import OptimRecipe, build_optimizer
from dino_fast.step.train_step import TrainStep
from shards.errors import UserError

HEAD = HeadRecipe(out_dim=48, hidden_dim=32, bottleneck_dim=16, layers=2, batch_norm=True)
HYPER = Hyper(lr=0.05, weight_decay=1e-2, momentum=0.9, teacher_temp=0.05, freeze_last_layer=False)


def a_step(head: HeadRecipe = HEAD, backbone: str = "resnet18") -> TrainStep:
    torch.manual_seed(0)
    student, teacher = build_student_teacher(backbone, head)
    return TrainStep(student, teacher, build_optimizer(OptimRecipe(name="sgd"), student), LossRecipe())


class PublishedHead(nn.Module):
    """The published head, of torch's own layers; `plain`: as released, its last layer's weights are one matrix."""

    def __init__(self, in_dim: int, recipe: HeadRecipe, plain: bool) -> None:
        super().__init__()
        width, layers = in_dim, []
        for _ in range(recipe.layers - 1):
            norm = [nn.BatchNorm1d(recipe.hidden_dim)] if recipe.batch_norm else []
            layers += [nn.Linear(width, recipe.hidden_dim), *norm, nn.GELU()]
            width = recipe.hidden_dim
        last = nn.Linear(width, recipe.bottleneck_dim)
        self.mlp = nn.Sequential(*layers, last) if layers else last
        prototypes = nn.Linear(recipe.bottleneck_dim, recipe.out_dim, bias=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch would rather have it called otherwise
            self.last_layer = prototypes if plain else nn.utils.weight_norm(prototypes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


def stirred(name: str, value: Tensor) -> Tensor:
    """What to add to a fresh weight, so that it is none any more, and to a variance, which must stay one."""
    if not value.is_floating_point():
        return torch.tensor(7)
    return 0.01 * (torch.rand(value.shape) if name.endswith("running_var") else torch.randn(value.shape))


@functools.cache
def published_backbone(seed: int) -> nn.Module:
    """Not to be changed."""
    torch.manual_seed(seed)
    backbone = models.resnet18(weights=None)
    backbone.fc = nn.Identity()
    for name, value in backbone.state_dict().items():
        value += stirred(name, value)
    return backbone.eval()


class Published(nn.Module):
    """A network with the published names and values that no network begins with, in evaluation mode."""

    def __init__(self, seed: int, recipe: HeadRecipe = HEAD, plain: bool = False) -> None:
        super().__init__()
        self.backbone = published_backbone(seed)
        torch.manual_seed(seed)
        self.head = PublishedHead(512, recipe, plain)
        for name, value in self.head.state_dict().items():
            value += stirred(name, value)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def prefixed(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights.items()}


def full(student: dict[str, Tensor], teacher: dict[str, Tensor], center: Tensor) -> dict[str, Any]:
    """What the published code saves: numpy's learning rates in the optimizer's state, and the arguments with a path."""
    optimizer = torch.optim.SGD([torch.zeros(3)], lr=0.1, momentum=0.9)
    optimizer.param_groups[0]["lr"] = np.float64(0.03)
    return {
        "student": student, "teacher": teacher, "optimizer": optimizer.state_dict(), "epoch": 100,
        "args": argparse.Namespace(arch="resnet18", output_dir=PosixPath("/out"), warmup=np.int64(10)),
        "dino_loss": {"center": center}, "fp16_scaler": {"scale": 65536.0},
    }  # fmt: skip


def state_of(step: TrainStep) -> dict[str, Any]:
    return copy.deepcopy(step.state_dict())


def require_equal(found: Any, expected: Any) -> None:
    """Bit for bit, and of one type."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        require_equal([found[key] for key in expected], list(expected.values()))
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            require_equal(one, other)
    elif isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    else:
        assert found == expected


def require_alike(ours: nn.Module, theirs: nn.Module) -> None:
    """Equal outputs with running statistics, up to the rounding of other memory layouts."""
    crops = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(crops)
        found = ours.eval()([crops] if isinstance(theirs, Published) else crops)
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("plain", "change"),
    [
        (True, {"layers": 2, "hidden_dim": 64, "batch_norm": True}),
        (False, {"layers": 3, "hidden_dim": 32, "batch_norm": False}),
        (False, {"layers": 3, "hidden_dim": 32, "batch_norm": True, "norm_last_layer": False}),
        (True, {"layers": 1, "batch_norm": False}),
    ],
    ids=str,
)
def test_a_full_published_checkpoint(tmp_path: Path, plain: bool, change: dict[str, Any]) -> None:
    recipe = replace(HEAD, **change)
    student, teacher, center = Published(1, recipe, plain), Published(2, recipe, plain), torch.randn(1, 48)
    path = tmp_path / "checkpoint.pth"
    torch.save(full(prefixed("module.", student.state_dict()), teacher.state_dict(), center), path)
    step = a_step(recipe)
    optimizer = state_of(step)["optimizer"]
    lines = load_initial_weights(step, path)
    assert lines[0] == (
        f"started from {path}: backbone and head and center of student and teacher. New: optimizer, step count."
    )
    require_equal(step.center, center)
    require_equal(step.optimizer.state_dict(), optimizer)
    require_alike(step.student, student)
    require_alike(step.teacher, teacher)
    frozen = recipe.norm_last_layer
    assert [line.startswith("Its prototypes stay") for line in lines[1:]] == [True] * frozen
    assert step.bare_student.head.last_layer.weight_g.requires_grad is not frozen


@pytest.mark.parametrize(
    ("prefix", "legacy"), [("", True), ("backbone.", False), ("module.", False), ("module.backbone.", True)]
)
def test_a_backbone_alone(tmp_path: Path, prefix: str, legacy: bool) -> None:
    backbone = published_backbone(1)
    weights = {n: value for n, value in backbone.state_dict().items() if not legacy or "num_batches_tracked" not in n}
    path = tmp_path / "pretrain.pth"
    torch.save(prefixed(prefix, weights), path, _use_new_zipfile_serialization=not legacy)
    step = a_step()
    before = state_of(step)
    (line,) = load_initial_weights(step, path)
    assert line.endswith("backbone of one network for student and teacher. New: head, center, optimizer, step count.")
    require_alike(step.bare_student.backbone, backbone)
    require_equal(step.teacher.state_dict(), step.bare_student.state_dict())
    require_equal(step.teacher.head.state_dict(), {n[5:]: v for n, v in before["teacher"].items() if n[:5] == "head."})
    require_equal(step.center, torch.zeros(1, 48))


def test_torchvisions_classifier_is_left_out(tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = models.resnet18(weights=None)
    torch.save(network.state_dict(), tmp_path / "resnet18.pth")
    step = a_step()
    lines = load_initial_weights(step, tmp_path / "resnet18.pth")
    assert lines[1:] == [f"ignored in {tmp_path / 'resnet18.pth'}: fc"]
    require_equal(step.teacher.state_dict()["backbone.layer4.1.bn2.weight"], network.layer4[1].bn2.weight.data)
    require_equal(step.teacher.backbone.conv1.weight, network.conv1.weight)


def test_one_network_with_its_head_is_for_both(tmp_path: Path) -> None:
    teacher = Published(2)
    for name, state in (("one", teacher.state_dict()), ("only", {"teacher": teacher.state_dict()})):
        torch.save(state, tmp_path / name)
        step = a_step()
        line = load_initial_weights(step, tmp_path / name)[0]
        assert line.endswith(
            "backbone and head of one network for student and teacher. New: center, optimizer, step count."
        )
        require_alike(step.student, teacher)
        require_alike(step.teacher, teacher)


@pytest.fixture(scope="module")
def another_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a run with a checkpoint, after a step that told its networks apart; and its state."""
    step = a_step()
    step(torch.randn(4, 3, 32, 32), None, HYPER)
    folder = tmp_path_factory.mktemp("another") / "run"
    state = state_of(step)
    checkpoint.save(folder, 12, {"recipe": {"seed": 1}, "data": "", "model": state})
    return folder, state


@pytest.mark.parametrize("how", ["file", "renamed", "folder", "damaged"])
def test_a_checkpoint_of_ours(tmp_path: Path, another_run: tuple[Path, dict[str, Any]], how: str) -> None:
    folder, state = another_run
    (path,) = folder.iterdir()
    if how == "renamed":
        path = (tmp_path / "best.pt").resolve()
        path.write_bytes(next(folder.iterdir()).read_bytes())
    elif how == "damaged":
        (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / "step-00000013-0123456789abcdef.pt").write_bytes(path.read_bytes())
        path = tmp_path
    elif how == "folder":
        path = folder
    step = a_step()
    optimizer = state_of(step)["optimizer"]
    lines = load_initial_weights(step, path)
    assert [line.endswith("is damaged: the checkpoint before it is used") for line in lines[:-1]] == [True] * (
        how == "damaged"
    )
    assert "backbone and head and center of student and teacher" in lines[-1]
    after = state_of(step)
    for name in ("student", "teacher", "center"):
        require_equal(after[name], state[name])
    assert not torch.equal(after["student"]["backbone.conv1.weight"], after["teacher"]["backbone.conv1.weight"])
    require_equal(after["optimizer"], optimizer)
    assert state["optimizer"]["state"], "the other run's optimizer had none to take"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_converted(tmp_path: Path, dtype: torch.dtype) -> None:
    student = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in Published(1).state_dict().items()
    }
    torch.save(full(student, student, torch.ones(1, 48, dtype=dtype)), tmp_path / "half.pth")
    step = a_step()
    load_initial_weights(step, tmp_path / "half.pth")
    after = step.bare_student.state_dict()
    require_equal(after, {name: value.to(after[name].dtype) for name, value in student.items()})
    assert step.bare_student.backbone.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_run_goes_on_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(full(Published(1).state_dict(), Published(2).state_dict(), torch.zeros(1, 48)), tmp_path / "full.pth")
    step = a_step()
    calls = []
    weight = step.bare_student.backbone.conv1.weight
    monkeypatch.setattr(step.update, "after_load", lambda: calls.append(weight.clone()))
    load_initial_weights(step, tmp_path / "full.pth")
    require_equal(calls, [Published(1).backbone.conv1.weight])  # once, when the values were there
    before = state_of(step)
    out = step(torch.randn(4, 3, 32, 32), None, HYPER)
    assert out.loss.isfinite()
    for name in ("student", "teacher"):
        assert not torch.equal(before[name]["backbone.conv1.weight"], step.state_dict()[name]["backbone.conv1.weight"])


# ---- What other programs save


@functools.cache
def classifier() -> dict[str, Tensor]:
    """A torchvision ResNet-18 with its classifier."""
    fc = {"fc.weight": torch.randn(10, 512), "fc.bias": torch.zeros(10)}
    return {**published_backbone(1).state_dict(), **fc}


def foreign(kind: str) -> Any:
    """What a program saves of a ResNet-18 whose weights are those of `published_backbone(1)`."""
    network, average = classifier(), prefixed("", hollow(resnet_shapes("resnet18")))
    backbone, average_backbone = ({n: v for n, v in w.items() if n[:3] != "fc."} for w in (network, average))
    training = {"epoch": 3, "arch": "resnet18", "optimizer": {"state": {}, "param_groups": []}}
    if kind == "moco":  # main_moco.py: the queue, and two encoders, of which the second is a moving average
        mlp = {"fc.0.weight": torch.zeros(3), "fc.2.bias": torch.zeros(3)}
        one, other = prefixed("module.encoder_q.", backbone | mlp), prefixed("module.encoder_k.", average_backbone)
        queue = {"module.queue": torch.zeros(4, 3), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
        return {**training, "state_dict": {**other, **one, **queue}}
    if kind == "moco v3":
        one, other = prefixed("module.base_encoder.", network), prefixed("module.momentum_encoder.", average)
        return {**training, "state_dict": {**one, **other, "module.predictor.0.weight": torch.zeros(3)}}
    if kind == "solo-learn":  # Lightning around solo-learn's names
        one, other = prefixed("backbone.", backbone), prefixed("momentum_backbone.", average_backbone)
        heads = {"projector.0.weight": torch.zeros(3), "classifier.weight": torch.zeros(2)}
        return {**training, "pytorch-lightning_version": "2.1", "state_dict": {**other, **one, **heads}}
    weights = {
        "lightning": {"state_dict": prefixed("model.", network), "loops": {"fit_loop": {}}, "callbacks": {}},
        "lightning encoder": {"state_dict": prefixed("encoder.", backbone) | {"head.weight": torch.zeros(2)}},
        "simsiam": {"state_dict": prefixed("module.encoder.", network) | {"module.predictor.0.bias": torch.zeros(2)}},
        "deit": {"model": network, "model_ema": average, "scaler": {}, "args": argparse.Namespace(lr=0.1)},
        "references": {"model": prefixed("module.", network), "model_ema": average, "lr_scheduler": {"last_epoch": 3}},
        "compiled": {"model": prefixed("_orig_mod.", network)},
        "compiled and wrapped": prefixed("module._orig_mod.", network),
        "compiled inside": {"state_dict": prefixed("model.backbone._orig_mod.", backbone)},
        "vissl": {"classy_state_dict": {"base_model": {"model": {"trunk": prefixed("_feature_blocks.", backbone)}}}},
        "swav": prefixed("module.", backbone) | {"module.prototypes.weight": torch.zeros(2)},
    }[kind]
    return {**training, **weights} if kind not in ("compiled and wrapped", "swav") else weights


KINDS = {
    "moco": ("state_dict, encoder_q", "encoder_k, fc, queue, queue_ptr"),
    "moco v3": ("state_dict, base_encoder", "fc, momentum_encoder, predictor"),
    "solo-learn": ("state_dict", "classifier, momentum_backbone, projector"),
    "lightning": ("state_dict, model", "fc"),
    "lightning encoder": ("state_dict, encoder", "head"),
    "simsiam": ("state_dict, encoder", "fc, predictor"),
    "deit": ("model", "fc"),
    "references": ("model", "fc"),
    "compiled": ("model", "fc"),
    "compiled and wrapped": ("", "fc"),
    "compiled inside": ("state_dict, model.backbone", ""),
    "vissl": ("classy_state_dict, base_model, model, …", ""),
    "swav": ("", "prototypes"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_other_programs_save_is_unwrapped_and_what_is_left_out_is_said(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "foreign.ckpt"
    torch.save(foreign(kind), path)
    step = a_step()
    before = state_of(step)
    lines = load_initial_weights(step, path)
    place, ignored = KINDS[kind]
    assert lines[0].startswith(f"started from {path}: backbone of one network for student and teacher. New: head, ")
    expected = [f"The weights of {path} are those under {place}."] * bool(place)
    assert lines[1:] == [*expected, *[f"ignored in {path}: {ignored}"] * bool(ignored)]
    require_alike(step.bare_student.backbone, published_backbone(1))
    require_equal(step.teacher.backbone.state_dict(), step.bare_student.backbone.state_dict())
    require_equal(step.teacher.head.state_dict(), {n[5:]: v for n, v in before["teacher"].items() if n[:5] == "head."})


def test_a_network_of_ours_inside_a_wrapper_keeps_its_head(tmp_path: Path) -> None:
    teacher = Published(2)
    torch.save({"state_dict": prefixed("model.module.", teacher.state_dict())}, tmp_path / "dino.ckpt")
    step = a_step()
    assert "backbone and head of one network" in load_initial_weights(step, tmp_path / "dino.ckpt")[0]
    require_alike(step.teacher, teacher)


@pytest.mark.parametrize("weights", ["state_dict", "model"])
def test_settings_of_other_programs_are_dropped_and_do_not_come_to_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    """Lightning keeps hyper-parameters in a dict of its own, solo-learn in omegaconf's, with types in it."""
    settings = ModuleType("omegaconf.dictconfig")
    exec(
        "class DictConfig:\n def __setstate__(self, _): raise SystemExit\nclass AttributeDict(dict): pass",
        vars(settings),
    )
    for made in (settings.DictConfig, settings.AttributeDict):
        made.__module__ = settings.__name__
    hyper = settings.AttributeDict(lr=0.1, ref=dict, any=Any, more=collections.defaultdict(dict, a={}))
    config = settings.DictConfig()
    config._content, config._path = {"lr": 0.1}, PosixPath("/data")
    for name in ("omegaconf", settings.__name__):
        monkeypatch.setitem(sys.modules, name, settings)
    path = tmp_path / "epoch=3-step=10.ckpt"
    torch.save({weights: classifier(), "hyper_parameters": hyper, "config": config}, path)
    for name in ("omegaconf", settings.__name__):
        monkeypatch.delitem(sys.modules, name)
    step = a_step()
    load_initial_weights(step, path)
    require_alike(step.teacher.backbone, published_backbone(1))


def test_several_backbones_are_refused_by_their_names(refused) -> None:
    two = prefixed("left.", classifier()) | prefixed("right.net.", classifier())
    line = refused({"state_dict": two})
    assert line == " holds several backbones (left, right.net). Save the state dict of one of them alone."
    twice = {"state_dict": classifier() | prefixed("module.", classifier())}
    assert " holds conv1.weight twice, under different prefixes. " in refused(twice)


def test_other_networks_are_refused_by_their_names(refused) -> None:
    line = refused({"state_dict": hollow({"module.features.0.weight": [64, 3, 3, 3], "module.features.0.bias": [64]})})
    assert "2 unexpected (backbone.features.0.weight, backbone.features.0.bias)" in line
    assert line.endswith("or not complete. Pass another file, or for a model of timm --backbone timm/NAME.")
    vit = hollow({"model.cls_token": [1, 1, 384], "model.patch_embed.proj.weight": [384, 3, 16, 16]})
    assert "does not fit the network" in refused({"state_dict": vit})
    line = refused({"model": hollow(resnet_shapes("resnet50")), "args": argparse.Namespace()})
    assert line.endswith(" Pass --backbone resnet50.")


def test_a_file_that_holds_itself_is_refused(refused) -> None:
    state: dict[str, Any] = {}
    state["state_dict"] = state
    assert " holds no weights under state_dict." in refused(state)


@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore:Detected pickle protocol:UserWarning")
def test_whole_files_in_other_forms_are_not_called_damaged(refused, tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "script.pt")
    torch.save(classifier(), tmp_path / "protocol.pt", pickle_protocol=4)
    for name in ("script.pt", "protocol.pt"):
        line = refused((tmp_path / name).read_bytes())
        assert line.startswith(" is not what torch.save writes of a state dict. Save the model's state_dict()")
    line = refused({"model": models.resnet18(weights=None)})
    assert line.startswith(" holds torchvision.models.resnet.ResNet, which is neither a tensor nor plain data")


# ---- .safetensors


def safetensors(weights: dict[str, Tensor], **header: Any) -> bytes:
    """The file of these weights, with changes to its header."""
    names = {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    }  # fmt: skip
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    values = b""
    for name, value in weights.items():
        data = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        offsets = [len(values), len(values) + len(data)]
        entries[name] = {"dtype": names[value.dtype], "shape": list(value.shape), "data_offsets": offsets}
        values += data
    text = json.dumps(entries | header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_safetensors(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    weights = {n: v.to(dtype) if v.is_floating_point() else v for n, v in classifier().items()}
    path = tmp_path / name
    path.write_bytes(safetensors(weights))
    step = a_step()
    lines = load_initial_weights(step, path)
    assert lines[1:] == [f"ignored in {path}: fc"]
    found = step.teacher.backbone.state_dict()
    require_equal(found, {n: weights[n].to(found[n].dtype) for n in found})


def test_types_that_are_not_read_are_named(refused) -> None:
    line = refused(safetensors({"a": torch.zeros(2)}, a={"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}))
    assert line == ": tensors of type F8_E4M3 are not read. Save its weights as float32."


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [3]},
        {"shape": [-1, -2]},
        {"shape": [True, 2]},
        {"shape": [2.0]},
        {"shape": "2"},
        {"shape": [1 << 70]},
        {"shape": [1 << 70, 0]},
        {"data_offsets": [0, 16]},
        {"data_offsets": [-8, 0]},
        {"data_offsets": [8, 0]},
        {"data_offsets": [0]},
        {"data_offsets": None},
        {"dtype": ["F32"]},
    ],
    ids=str,
)
def test_a_forged_header_of_safetensors_is_refused(refused, entry: dict[str, Any]) -> None:
    right = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    line = refused(safetensors({"a": torch.zeros(2)}, a={**right, **entry}))
    assert line == " is damaged: its header does not describe its bytes. Copy it again."


def test_damaged_safetensors_are_refused(refused) -> None:
    whole = safetensors({"a": torch.zeros(2)})
    nested = b'{"a":' + b"[" * 100_000
    for data in (
        whole[:-1], whole[:40], whole.replace(b'"a"', b'"a', 1), whole.replace(b'"F32"', b'"F\xff2"', 1),
        struct.pack("<Q", 90_000_000) + b"{}", struct.pack("<Q", len(nested)) + nested,
        struct.pack("<Q", 4) + b"{  }", struct.pack("<Q", 1) + b"{",
    ):  # fmt: skip
        assert " is damaged: its header does not" in refused(data) or " holds no weights" in refused(data)


# ---- What does not fit


@pytest.fixture(scope="module")
def untouched() -> tuple[TrainStep, dict[str, Any]]:
    """A step that must not change, and its state."""
    step = a_step()
    return step, state_of(step)


@pytest.fixture
def refused(tmp_path: Path, untouched: tuple[TrainStep, dict[str, Any]], monkeypatch: pytest.MonkeyPatch):
    """A function that expects a file of `state` to be refused in one line, which it returns, by an untouched step."""
    step, before = untouched
    monkeypatch.setattr(step.update, "after_load", lambda: pytest.fail("it says that something was loaded"))

    def refuse(state: Any) -> str:
        path = tmp_path / "foreign.pth"
        path.write_bytes(state) if isinstance(state, bytes) else torch.save(state, path)
        with pytest.raises(UserError) as caught:
            load_initial_weights(step, path)
        require_equal(step.state_dict(), before)
        line = str(caught.value)
        assert line.startswith(str(path))
        assert line.isprintable()
        assert len(line) < 1000
        return line.removeprefix(str(path))

    return refuse


def hollow(shapes: dict[str, Any]) -> dict[str, Tensor]:
    """Ones of these shapes, which take no room in a file."""
    return {name: torch.ones(()).expand(shape) for name, shape in shapes.items()}


@functools.cache
def resnet_shapes(name: str) -> dict[str, torch.Size]:
    with torch.device("meta"):
        network = getattr(models, name)(weights=None)
    return {name: value.shape for name, value in network.state_dict().items()}


def hollow_network(recipe: HeadRecipe = HEAD, plain: bool = False) -> dict[str, Tensor]:
    """A published network with a resnet18, of ones."""
    backbone = {name: shape for name, shape in resnet_shapes("resnet18").items() if not name.startswith("fc.")}
    head = {name: value.shape for name, value in PublishedHead(512, recipe, plain).state_dict().items()}
    return hollow({f"backbone.{n}": s for n, s in backbone.items()} | {f"head.{n}": s for n, s in head.items()})


@pytest.mark.parametrize(
    ("plain", "change"),
    [
        (False, {"layers": 3}),
        (True, {"layers": 1}),
        (False, {"batch_norm": False}),
        (True, {"layers": 4, "hidden_dim": 40, "batch_norm": False, "bottleneck_dim": 24, "out_dim": 50}),
        (False, {"layers": 11, "out_dim": 50}),
    ],
    ids=str,
)
def test_another_head_is_refused_with_the_settings_that_do(
    refused, tmp_path: Path, plain: bool, change: dict[str, Any]
) -> None:
    recipe = replace(HEAD, **change)
    weights = hollow_network(recipe, plain)
    line = refused(full(weights, weights, torch.zeros(1, recipe.out_dim)))
    assert line.startswith(": its student does not fit the network: ")
    assert "head." in line
    assert "backbone" not in line
    flags = dict(re.findall(r"--head\.(\w+) (\w+)", line.partition(". Pass ")[2]))
    expected = {name: str(value).lower() for name, value in change.items()}
    assert {name: value for name, value in flags.items() if name in change} == expected
    read = {name: value == "true" if value in ("true", "false") else int(value) for name, value in flags.items()}
    load_initial_weights(a_step(replace(HEAD, **read)), tmp_path / "foreign.pth")


@pytest.mark.parametrize("backbone", ["resnet34", "resnet50", "resnet101"])
def test_another_backbone_is_refused_with_its_name(refused, backbone: str) -> None:
    line = refused(hollow(resnet_shapes(backbone)))
    assert line.endswith(f". Pass --backbone {backbone}.")
    assert re.match(r": its network does not fit the network: \d+ unexpected \(backbone.*?, …\)", line)


def test_a_backbone_that_is_none_of_ours(refused) -> None:
    line = refused(hollow(resnet_shapes("resnet152")))
    assert f"Its backbone is none of {', '.join(BACKBONES)}, or not complete. Pass another file, or" in line


def test_keys_that_are_missing_unexpected_and_misshapen_are_counted_and_named(refused) -> None:
    good = hollow_network()
    bad = {name: value for name, value in good.items() if not name.startswith("backbone.layer4.1.bn2.")}
    bad |= {"backbone.conv1.weight": torch.zeros(64, 1, 7, 7), "head.extra\n\x1b[31m": torch.zeros(3)}
    for student, teacher, who in ((bad, good, "student"), (good, bad, "teacher")):
        line = refused(full(student, teacher, torch.zeros(1, 48)))
        assert line.startswith(f": its {who} does not fit the network: 4 missing (backbone.layer4.1.bn2.weight, ")
        assert ", 1 unexpected (head.extra" in line
        assert "1 misshapen (backbone.conv1.weight [64, 1, 7, 7] for [64, 3, 7, 7]). Its backbone is none of" in line


def test_a_head_in_one_network_alone_and_a_foreign_center(refused) -> None:
    whole = hollow_network()
    bare = {name: value for name, value in whole.items() if name.startswith("backbone.")}
    assert ": its student does not fit the network: 10 missing (head." in refused(full(bare, whole, torch.zeros(1, 48)))
    line = refused(full(whole, whole, torch.zeros(1, 47)))
    assert line.startswith(": its center does not fit the network: 1 misshapen (center [1, 47] for [1, 48]). ")
    assert "its center is not a tensor" in refused(full(whole, whole, [0.0] * 48))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("where", "value"), [("student", np.nan), ("teacher", np.inf), ("running", 1e300), ("center", -np.inf)]
)
def test_values_that_are_not_finite_are_refused(refused, where: str, value: float) -> None:
    parts: dict[str, Any] = full(hollow_network(), hollow_network(), torch.zeros(1, 48))
    holder, name = {
        "student": (parts["student"], "backbone.conv1.weight"),
        "teacher": (parts["teacher"], "head.last_layer.weight_v"),
        "running": (parts["teacher"], "backbone.bn1.running_var"),
        "center": (parts["dino_loss"], "center"),
    }[where]
    holder[name] = holder[name].double().clone(memory_format=torch.contiguous_format)
    holder[name].view(-1)[-1] = value
    assert f"has values that are not finite, in 1 keys ({name}). " in refused(parts)


def test_a_count_of_another_shape_does_not_stop_it_half_way(tmp_path: Path) -> None:
    weights = {name: torch.zeros(5) if "num_batches" in name else v for name, v in Published(1).state_dict().items()}
    torch.save(weights, tmp_path / "odd.pth")
    step = a_step()
    load_initial_weights(step, tmp_path / "odd.pth")
    require_alike(step.teacher, Published(1))


VIT = "vit_tiny_patch16"


def vit_weights(seed: int) -> dict[str, Tensor]:
    """Return random weights of a vision transformer by the published names, which timm's are, too."""
    torch.manual_seed(seed)
    backbone, _ = build_backbone(VIT)
    return {name: value + stirred(name, value) for name, value in backbone.state_dict().items()}


@pytest.mark.parametrize("layout", ["backbone alone", "full", "timm with a classifier", "safetensors"])
def test_a_vision_transformer_is_loaded_by_its_names(tmp_path: Path, layout: str) -> None:
    student, teacher = vit_weights(1), vit_weights(1)
    path = tmp_path / "vit.pth"
    if layout == "full":
        teacher = vit_weights(2)
        heads = PublishedHead(192, HEAD, plain=False).state_dict()
        torch.save(
            full(
                prefixed("module.", prefixed("backbone.", student) | prefixed("head.", heads)),
                prefixed("backbone.", teacher) | prefixed("head.", heads),
                torch.ones(1, HEAD.out_dim),
            ),
            path,
        )
    elif layout == "safetensors":
        path.write_bytes(safetensors(student))
    else:
        classifier = {"head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10)}
        torch.save(student | (classifier if "classifier" in layout else {}), path)
    step = a_step(backbone=VIT)
    load_initial_weights(step, path)
    require_equal(step.student.backbone.state_dict(), student)
    require_equal(step.teacher.backbone.state_dict(), teacher)


def test_a_vision_transformer_of_another_size_names_the_setting(refused) -> None:
    torch.manual_seed(0)
    assert refused(vit_weights(0)).endswith(f" Pass --backbone {VIT}.")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["meta", "sparse", "complex", "quantized"])
def test_tensors_that_are_not_just_numbers_are_refused(refused, kind: str) -> None:
    tensor = torch.zeros(64, 3, 7, 7)
    odd = {
        "meta": tensor.to("meta"), "sparse": tensor.to_sparse(), "complex": tensor.to(torch.complex64),
        "quantized": torch.quantize_per_tensor(tensor, 1, 0, torch.qint8),
    }[kind]  # fmt: skip
    assert ": conv1.weight is not a tensor of numbers" in refused({**hollow_network(), "conv1.weight": odd})


def test_what_holds_no_weights_is_refused(refused) -> None:
    assert " holds no weights under a." in refused({"epoch": 3, "state_dict": {"a": [torch.zeros(3)]}})
    assert " holds no weights under epoch, weights." in refused({"epoch": 3, "weights": {"a": torch.zeros(3)}})
    for state in ([torch.zeros(3)], {"student": None, "teacher": {}}, {}, 3):
        assert " holds no weights." in refused(state)
    assert ": epoch is not a tensor of numbers" in refused({**hollow_network(), "epoch": 3})


def test_what_is_no_file_of_weights_is_refused(refused) -> None:
    whole = io.BytesIO()
    torch.save(hollow_network(), whole)
    for junk in (b"", b"hello world", bytes(1000), b"PK\x03\x04" + bytes(100), whole.getvalue()[:-2000]):
        assert " is damaged, or not a file of weights. Pass a checkpoint" in refused(junk)


def test_what_is_not_there(tmp_path: Path, untouched: tuple[TrainStep, dict[str, Any]]) -> None:
    for path, words in ((tmp_path / "none.pth", "No such file"), (tmp_path, "no checkpoint in this folder")):
        with pytest.raises(UserError, match=words) as caught:
            load_initial_weights(untouched[0], path)
        assert str(path) in str(caught.value)
        assert "Pass a checkpoint or a run's folder" in str(caught.value)
    with pytest.raises(UserError, match="no such checkpoint"):
        load_initial_weights(untouched[0], tmp_path / "step-00000001-0123456789abcdef.pt")


# ---- The released ResNet-50, in its full size


def released_resnet50() -> dict[str, Tensor]:
    """The names and shapes of each of its networks: issue 189 of facebookresearch/dino."""
    backbone = {f"backbone.{n}": s for n, s in resnet_shapes("resnet50").items() if not n.startswith("fc.")}
    norm = {f"head.mlp.1.{name}": [4096] for name in ("weight", "bias", "running_mean", "running_var")}
    head = {
        "head.mlp.0.weight": [4096, 2048], "head.mlp.0.bias": [4096], **norm, "head.mlp.1.num_batches_tracked": [],
        "head.mlp.3.weight": [256, 4096], "head.mlp.3.bias": [256], "head.last_layer.weight": [60000, 256],
    }  # fmt: skip
    return hollow(backbone | head)


def test_the_released_resnet50_names_its_settings(refused) -> None:
    line = refused(full(prefixed("module.", released_resnet50()), released_resnet50(), torch.zeros(1, 60000)))
    flags = dict(re.findall(r"--(\S+) (\w+)", line.partition(". Pass ")[2]))
    sizes = {"head.hidden_dim": "4096", "head.bottleneck_dim": "256", "head.out_dim": "60000"}
    assert flags == {"backbone": "resnet50"} | sizes  # 2 layers with batch norms are HEAD's, too


@pytest.mark.slow
def test_the_released_resnet50_fits_its_recipe(tmp_path: Path) -> None:
    path, weights = tmp_path / "full.pth", released_resnet50()
    torch.save(full(prefixed("module.", weights), weights, torch.zeros(1, 60000)), path)
    recipe = read_recipe(["--config", str(Path(__file__).parents[3] / "configs" / "resnet50_800ep.yaml")])
    step = a_step(recipe.head, recipe.backbone)
    assert "backbone and head and center of student and teacher" in load_initial_weights(step, path)[0]
    for network in (step.bare_student, step.teacher):
        assert all(v.eq(1).all() for n, v in network.state_dict().items() if not n.endswith("weight_g"))
        require_equal(network.head.last_layer.weight_g.detach(), torch.full((60000, 1), 16.0))
