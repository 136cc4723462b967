"""The backbones: torchvision's networks but for the classifier, whose place nothing takes."""

import pytest
import torch
from torchvision import models

from dino_fast.model.backbones import BACKBONES, build_backbone
from shards.errors import UserError


@pytest.mark.parametrize("name", BACKBONES)
def test_state_is_torchvisions_without_the_classifier(name: str) -> None:
    with torch.device("meta"):
        backbone, features = build_backbone(name)
        theirs = getattr(models, name)()
    expected = {key: value.shape for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    assert {key: value.shape for key, value in backbone.state_dict().items()} == expected
    assert features == theirs.fc.in_features


def test_features_are_the_pooled_last_stage() -> None:
    backbone, features = build_backbone("resnet18")
    theirs = models.resnet18().eval()
    theirs.load_state_dict(backbone.state_dict(), strict=False)
    pooled: list[torch.Tensor] = []
    theirs.avgpool.register_forward_hook(lambda module, inputs, output: pooled.append(output.flatten(1)))
    x = torch.randn(2, 3, 64, 64)
    theirs(x)
    out = backbone.eval()(x)
    assert out.shape == (2, features)
    torch.testing.assert_close(out, pooled[0])


def test_residual_branches_start_open() -> None:
    backbone, _ = build_backbone("resnet18")
    assert (backbone.state_dict()["layer1.0.bn2.weight"] == 1).all()


def test_an_unknown_name_lists_the_choices_and_the_nearest() -> None:
    with pytest.raises(UserError, match=r"Did you mean 'resnet50'.*resnet18, resnet34, resnet50, resnet101"):
        build_backbone("resnet5O")
    with pytest.raises(UserError, match=r"unknown backbone 'vit'\. The choices are"):
        build_backbone("vit")
