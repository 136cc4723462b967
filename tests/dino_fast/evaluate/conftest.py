"""What tests of evaluations share: a small network with random weights, and shards of one class."""

import shutil
from pathlib import Path

import pytest
import torch

from dino_fast.model.backbones import build_backbone
from shards.__main__ import main as make_shards

SMALL = "timm/test_resnet"


@pytest.fixture(scope="session")
def small_network(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The flags of a network that tells images apart by their colors, on the CPU."""
    torch.manual_seed(0)
    path: Path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(build_backbone(SMALL)[0].state_dict(), path)
    return "--checkpoint", str(path), "--backbone", SMALL, "--device", "cpu"


@pytest.fixture
def bright_only(labeled_shards: Path, tmp_path: Path) -> Path:
    """Pack only class 1 of `labeled_shards`, which has the number 0 here."""
    shutil.copytree(labeled_shards.parent / "images" / "class_1", tmp_path / "images" / "class_1")
    arguments = ["pack", str(tmp_path / "images"), str(tmp_path / "bright"), "--workers", "1", "--format", "folders"]
    assert make_shards(arguments) == 0
    return tmp_path / "bright"
