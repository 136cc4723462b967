"""The backbones: torchvision's networks but for the classifier, whose place nothing takes."""

import typing

import pytest
import torch
from torchvision import models

from dino_fast.config import Recipe
from dino_fast.model.backbones import BACKBONES, build_backbone, count_blocks
from shards.errors import UserError

RESNETS = [name for name in BACKBONES if name.startswith("resnet")]


def test_the_recipe_names_all_backbones() -> None:
    named, others = typing.get_args(typing.get_type_hints(Recipe)["backbone"])
    assert typing.get_args(named) == BACKBONES
    assert others is str  # timm/NAME


# As published: S/16 has 21.7 million parameters and B/16 85.8 (evaluations of facebookresearch/dino).
@pytest.mark.parametrize(
    ("name", "width", "millions"),
    [("vit_tiny_patch16", 192, 5.5), ("vit_small_patch16", 384, 21.7), ("vit_small_patch8", 384, 21.7),
     ("vit_base_patch16", 768, 85.8), ("vit_base_patch8", 768, 85.8)],
)  # fmt: skip
def test_vision_transformers_have_the_published_sizes(name: str, width: int, millions: float) -> None:
    with torch.device("meta"):
        backbone, features = build_backbone(name)
        out = backbone(torch.empty(2, 3, 224, 224))
    assert features == width
    assert out.shape == (2, width)
    assert sum(value.numel() for value in backbone.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    assert backbone.patch == int(name.rpartition("patch")[2])
    assert count_blocks(name) == 12


def test_a_vision_transformer_starts_as_published() -> None:
    """Linear layers and embeddings: N(0, 0.02), biases 0. The patches' convolution keeps torch's first weights."""
    torch.manual_seed(0)
    backbone, _ = build_backbone("vit_tiny_patch16")
    for name, value in backbone.named_parameters():
        if name.startswith("patch_embed"):
            assert value.abs().max() <= 1 / (3 * 16 * 16) ** 0.5  # uniform
        elif name.endswith("bias"):
            assert not value.any()
        elif "norm" in name:
            assert (value == 1).all()
        else:
            assert value.std().item() == pytest.approx(0.02, rel=0.15)


@pytest.mark.parametrize("name", RESNETS)
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
