"""The parts of fine-tuning: mixing against its formulas, layer decay against timm's, and the schedule."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dino_fast.evaluate.finetuning.layer_groups import make_parameter_groups, number_layers
from dino_fast.evaluate.finetuning.mixing import Mix, compute_mixed_loss, draw_mix, find_neighbors, mix_images
from dino_fast.evaluate.finetuning.recipe import (
    RESNET,
    VIT,
    choose_epochs,
    choose_layer_decay,
    choose_recipe,
    scale_rate,
)
from dino_fast.model.backbones import build_backbone


@settings(max_examples=50)
@given(step=st.integers(0, 10**6), seed=st.integers(0, 2**60), side=st.integers(8, 300))
def test_the_share_is_what_is_left_of_the_image(step: int, seed: int, side: int):
    mix = draw_mix(0.8, 1.0, seed, step, side)
    assert mix == draw_mix(0.8, 1.0, seed, step, side)
    assert 0 <= mix.share <= 1
    images = torch.stack([torch.zeros(3, side, side), torch.ones(3, side, side)])
    mixed = mix_images(images, mix)
    assert mixed[0].mean().item() == pytest.approx(1 - mix.share, abs=1e-5)
    assert mixed[1].mean().item() == pytest.approx(mix.share, abs=1e-5)
    if mix.box is not None:
        assert set(mixed.unique().tolist()) <= {0, 1}


def test_draws_have_the_distributions_of_mixup_and_cutmix():
    draws = [draw_mix(0.8, 1.0, 0, step, 224) for step in range(4000)]
    shares = np.array([mix.share for mix in draws if mix.box is None])
    assert len(shares) / 4000 == pytest.approx(0.5, abs=0.03)
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert shares.var() == pytest.approx(1 / (4 * 2.6), rel=0.06)  # of Beta(0.8, 0.8)
    boxes = np.array([mix.box for mix in draws if mix.box is not None])
    assert (boxes.min(), boxes.max()) == (0, 224)
    assert np.abs((boxes[:, 0] + boxes[:, 2] - boxes[:, 1] - boxes[:, 3]).mean()) < 8  # rows and columns alike
    assert all(draw_mix(0.8, 0, 0, step, 32).box is None for step in range(50))
    assert all(draw_mix(0, 1.0, 0, step, 32).box is not None for step in range(50))
    assert draw_mix(0, 0, 0, 1, 32) == Mix(1.0, None)


@pytest.mark.parametrize("count", [2, 5])
def test_the_loss_is_that_of_smoothed_and_mixed_labels(count: int):
    r = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(count, 7, generator=r), torch.randint(7, (count,), generator=r)
    smooth = nn.functional.one_hot(labels, 7) * 0.9 + 0.1 / 7
    partners = find_neighbors(count, torch.device("cpu"))
    assert partners.tolist() == [1, 0, 3, 2, 4][:count]
    target = 0.3 * smooth + 0.7 * smooth[partners]
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(compute_mixed_loss(logits, labels, Mix(0.3, None), 0.1), expected)


@pytest.mark.parametrize(("ours", "theirs"), [("vit_tiny_patch16", "vit_tiny_patch16_224")])
def test_layer_decay_is_timms(ours: str, theirs: str):
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    with torch.device("meta"):
        network, head = build_backbone(ours)[0], nn.Linear(192, 5)
        reference = timm.create_model(theirs, num_classes=5)
    expected = {}
    spared = {"pos_embed", "cls_token"}
    names = {id(value): name for name, value in reference.named_parameters()}
    for group in param_groups_layer_decay(reference, 0.05, spared, layer_decay=0.7):
        for value in group["params"]:
            expected[names[id(value)]] = (pytest.approx(group["lr_scale"]), group["weight_decay"])
    names = {id(value): name for name, value in network.named_parameters()}
    names |= {id(value): f"head.{name}" for name, value in head.named_parameters()}
    found = {}
    for group in make_parameter_groups(network, head, 0.05, 0.7):
        for value in group["params"]:
            found[names[id(value)]] = (group["scale"], group["weight_decay"])
    assert found == expected


def test_layers_of_other_networks():
    pytest.importorskip("timm")
    with torch.device("meta"):
        resnet, convnext = build_backbone("resnet18")[0], build_backbone("timm/convnext_atto")[0]
    layers = number_layers(resnet)
    assert layers["conv1.weight"] == 0
    assert layers["layer1.0.conv1.weight"] < layers["layer2.0.conv1.weight"] < layers["layer4.1.bn2.bias"]
    layers = number_layers(convnext)
    assert layers.keys() == dict(convnext.named_parameters()).keys()
    assert layers["stem.0.weight"] == 0
    assert layers["stages.1.blocks.0.conv_dw.weight"] < layers["stages.3.blocks.0.conv_dw.weight"]
    assert (choose_recipe(resnet), choose_recipe(convnext)) == ("resnet", "vit")


def test_the_schedule_rises_and_falls():
    rates = [scale_rate(step, 20, 4) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1]
    assert rates[4] == 1
    assert rates[12] == pytest.approx(0.5)
    assert all(before > after > 0 for before, after in pairwise(rates[4:]))
    assert scale_rate(0, 1, 0) == 1


def test_small_sets_get_more_epochs_and_vit_b_a_stronger_decay():
    assert [choose_epochs(VIT, steps) for steps in (1, 8, 100, 5000)] == [1000, 625, 100, 100]
    assert choose_epochs(RESNET, 5000) == 30
    assert [choose_layer_decay(VIT, width) for width in (192, 384, 768)] == [0.75, 0.75, 0.65]
    assert choose_layer_decay(RESNET, 2048) == 1
