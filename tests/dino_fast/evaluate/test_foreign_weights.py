"""Evaluations of weights that other programs saved."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision import models

from dino_fast.__main__ import main as dino_fast
from dino_fast.evaluate.trained_backbone import load_backbone, load_pretrained_backbone
from dino_fast.model.backbones import build_backbone
from pipelines.photometric import Normalization
from shards.errors import UserError
from tests.dino_fast.run.test_initial_weights import safetensors


def draw_resnet() -> dict[str, torch.Tensor]:
    """Return torchvision's ResNet-18 with a classifier, and with statistics that are not those of the beginning."""
    torch.manual_seed(3)
    network = models.resnet18()
    network(torch.randn(8, 3, 32, 32))
    return network.state_dict()


def wrap(weights: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {prefix + name: value for name, value in weights.items()}


@pytest.mark.parametrize(
    "layout",
    ["torchvision", "published backbone", "published, everything", "Lightning", "safetensors"],
)
@torch.no_grad()
def test_the_features_are_those_of_the_file(layout: str, tmp_path: Path):
    weights, path = draw_resnet(), tmp_path / "weights"
    bare = {name: value for name, value in weights.items() if not name.startswith("fc.")}
    student = {name: torch.zeros_like(value) for name, value in bare.items()}
    if layout == "safetensors":
        path.write_bytes(safetensors(weights))
    else:
        torch.save(
            {
                "torchvision": weights,
                "published backbone": bare,
                "published, everything": {
                    "student": wrap(student, "module.backbone."), "teacher": wrap(bare, "module.backbone."),
                    "args": argparse.Namespace(arch="resnet18"), "epoch": 3,
                },
                "Lightning": {"state_dict": wrap(weights, "backbone."), "epoch": 3},
            }[layout],
            path,
        )  # fmt: skip
    name, network, recipe, step, _ = load_backbone(path, "teacher")
    assert (name, recipe, step) == ("resnet18", {}, None)
    expected = models.resnet18()
    expected.load_state_dict(weights)
    expected.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    assert torch.allclose(network.eval()(images), expected.eval()(images), atol=1e-5)


def test_vision_transformers_are_told_apart_by_their_shapes(tmp_path: Path):
    for name in ("vit_tiny_patch16", "vit_small_patch8"):
        torch.save(build_backbone(name)[0].state_dict(), tmp_path / "vit.pth")
        assert load_backbone(tmp_path / "vit.pth", "teacher").name == name


def test_a_model_of_timm_by_its_name(tmp_path: Path):
    timm = pytest.importorskip("timm")
    path = tmp_path / "timm.pth"
    model = timm.create_model("test_vit2", num_classes=10)
    torch.save(model.state_dict(), path)
    with pytest.raises(UserError, match="For a model of timm pass --backbone timm/NAME"):
        load_backbone(path, "teacher")
    network = load_backbone(path, "teacher", "timm/test_vit2").network.eval()
    images = torch.randn(2, 3, 160, 160)
    expected = model.eval().forward_head(model.forward_features(images), pre_logits=True)
    assert torch.allclose(network(images), expected, atol=1e-5)


def test_weights_that_do_not_fit_are_refused_with_the_way_out(train_here, tmp_path: Path):
    path = tmp_path / "resnet.pth"
    torch.save(draw_resnet(), path)
    with pytest.raises(UserError, match=r"its teacher does not fit the network: .* Pass --backbone resnet18\."):
        load_backbone(path, "teacher", "resnet34")
    broken = draw_resnet()
    broken["conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save(broken, path)
    with pytest.raises(UserError, match="has values that are not finite"):
        load_backbone(path, "teacher")
    assert train_here(tmp_path / "run", "--max_steps", "1") == 0
    assert load_backbone(tmp_path / "run", "teacher", "resnet18").step == 1
    with pytest.raises(UserError, match=r"--backbone resnet34: the recipe of .* says resnet18\. Leave the flag out\."):
        load_backbone(tmp_path / "run", "teacher", "resnet34")


def test_the_command_says_what_it_scored(labeled_shards: Path, tmp_path: Path, capsys):
    path, file = tmp_path / "resnet.pth", tmp_path / "knn.json"
    torch.save(draw_resnet(), path)
    shards = str(labeled_shards)
    command = ["knn", "--checkpoint", str(path), "--train", shards, "--val", shards, "--device", "cpu"]
    assert dino_fast([*command, "--crop", "32", "--json", str(file)]) == 0
    assert capsys.readouterr().out.startswith(f"resnet18 of {path}: 40 train and 40 val images\n")
    result = json.loads(file.read_text())
    assert (result["backbone"], result["step"], result["crop"]) == ("resnet18", None, 32)


def test_weights_that_timm_has_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The hub's cache is made by hand: `snapshots` has what a download would have put there."""
    torch.manual_seed(3)
    model = timm.create_model("test_vit2")
    repository = model.pretrained_cfg["hf_hub_id"].replace("/", "--")
    snapshot = tmp_path / f"models--{repository}" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / f"models--{repository}" / "refs").mkdir()
    (tmp_path / f"models--{repository}" / "refs" / "main").write_text("0" * 40)
    save_file(model.state_dict(), snapshot / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = load_pretrained_backbone("timm/test_vit2")
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        expected = model.eval().forward_head(model.forward_features(x), pre_logits=True)
        torch.testing.assert_close(found.network.eval()(x), expected)
    assert found.normalization == Normalization(model.pretrained_cfg["mean"], model.pretrained_cfg["std"])


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (None, r"--pretrained needs --backbone timm/NAME, not None"),
        ("resnet18", r"--pretrained needs --backbone timm/NAME, not resnet18"),
        ("timm/resnet18.no_such_tag", r"timm has weights of .*a1_in1k"),
        ("timm/vit_small_patch16_18x2_224", r"timm has no weights for this model"),
        ("timm/no_such_model", r"timm has no model of this name"),
        ("timm/resnet18.a1_in1k", r"its weights could not be downloaded \(.+\)\. Download them where"),
    ],
)
def test_weights_that_cannot_be_had_are_named(name: str | None, line: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=line):
        load_pretrained_backbone(name)
