"""Features of vision transformers for linear classification, against those of the published code."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dino_fast.__main__ import main as dino_fast
from dino_fast.evaluate.token_features import TokenFeatures, choose_features
from dino_fast.model.backbones import build_backbone
from dino_fast.model.vit import VisionTransformer
from shards.errors import UserError
from tests.dino_fast.model.test_vit import assert_digest, build, draw_images

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "linear.json").read_text())


@pytest.mark.parametrize(
    "given",
    GOLDEN["features"],
    ids=lambda given: f"{given['arch']}-{given['patch_size']}-{given['n_last_blocks']}-{given['avgpool_patchtokens']}",
)
@torch.no_grad()
def test_the_published_features(given: dict[str, Any]):
    features = TokenFeatures(
        build(given["arch"], given["patch_size"]), given["n_last_blocks"], given["avgpool_patchtokens"]
    )
    found = features(draw_images(*given["size"]))
    assert_digest(found, given["features"])
    assert found.flatten()[-8:].tolist() == pytest.approx(given["last8"], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "width", "text"),
    [
        ("vit_tiny_patch16", 4 * 192, "the [CLS] tokens of the last 4 blocks"),
        ("vit_small_patch16", 4 * 384, "the [CLS] tokens of the last 4 blocks"),
        ("vit_base_patch16", 2 * 768, "the last [CLS] token with the mean patch token"),
    ],
)
def test_the_default_is_the_published_one(name: str, width: int, text: str):
    with torch.device("meta"):
        features = choose_features(build_backbone(name)[0])
        assert features(torch.zeros(2, 3, 32, 32)).shape == (2, width)
    assert str(features) == text


def test_other_features_on_demand_and_none_that_do_not_exist():
    vit = VisionTransformer(16, 192, 3, built_for=32)
    images = draw_images(32, 32).float()
    last = vit(images)
    assert torch.equal(choose_features(vit, blocks=1)(images), last)
    joined = choose_features(vit, mean_patch=True)(images)
    assert torch.equal(joined[:, ::2], last)
    assert torch.allclose(joined[:, 1::2], vit.last_tokens(images, 1)[0][:, 1:].mean(1))
    assert choose_features(vit, blocks=12)(images).shape == (2, 12 * 192)
    with pytest.raises(UserError, match=r"--blocks 13: this backbone has 12\. Pass at most 12\."):
        choose_features(vit, blocks=13)
    resnet = nn.Identity()
    assert choose_features(resnet) is resnet
    for wrong in ({"blocks": 1}, {"mean_patch": True}):
        with pytest.raises(UserError, match="are for vision transformers"):
            choose_features(resnet, **wrong)


def test_the_command_says_which_it_took(train_here, labeled_shards: Path, tmp_path: Path, capsys):
    vit = ("--backbone", "vit_tiny_patch16", "--crops.global_size", "48", "--crops.local_size", "32")
    assert train_here(tmp_path / "run", *vit, "--max_steps", "1") == 0
    capsys.readouterr()
    shards, file = str(labeled_shards), tmp_path / "scores.json"
    command = ["linear", "--checkpoint", str(tmp_path / "run"), "--train", shards, "--val", shards, "--device", "cpu"]
    command += ["--epochs", "2", "--lrs", "0.1", "--json", str(file)]
    for flags, text, expected in [
        ((), "the [CLS] tokens of the last 4 blocks", (4, False)),
        (("--blocks", "1"), "the last [CLS] token", (1, False)),
        (("--mean-patch",), "the last [CLS] token with the mean patch token", (1, True)),
    ]:
        assert dino_fast([*command, *flags]) == 0
        assert f"features: {text}\n" in capsys.readouterr().out
        result = json.loads(file.read_text())
        assert (result["blocks"], result["mean_patch"]) == expected
    with pytest.raises(SystemExit):
        dino_fast([*command, "--blocks", "2", "--mean-patch"])
    assert "not allowed with argument" in capsys.readouterr().err
