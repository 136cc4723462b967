"""A small network with random weights, in a file as another program saves it."""

from pathlib import Path

import pytest
import torch

from dino_fast.model.backbones import build_backbone

SMALL = "timm/test_resnet"


@pytest.fixture(scope="session")
def small_network(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The flags of a network that tells images apart by their colors, on the CPU."""
    torch.manual_seed(0)
    path: Path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(build_backbone(SMALL)[0].state_dict(), path)
    return "--checkpoint", str(path), "--backbone", SMALL, "--device", "cpu"
