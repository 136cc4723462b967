"""The baselines of vision transformers: the published code's figures, and the same networks and steps as ours."""

import argparse
import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import baseline_vit, step_arms
from bench.baseline_vit import PUBLISHED, STOCK, BaselineVit, VitStyle, drop_eagerly
from bench.baselines import Pair, Published, Stock, build_networks
from bench.step_recipe import add_recipe_arguments, build_recipe
from dino_fast.config import Recipe
from dino_fast.model.drop_path import draw_branch_scales
from dino_fast.model.head import DinoHead, HeadRecipe
from dino_fast.model.student_teacher import MultiCropModel
from dino_fast.model.vit import DEPTH, VisionTransformer
from dino_fast.step.hyper import Hyper
from dino_fast.step.optimizers import build_optimizer, set_hyper
from dino_fast.step.train_step import TrainStep
from pipelines.crops import CropRecipe
from tests.golden_runs import assert_summary, draw_inputs, fill, make_schedules

CPU = torch.device("cpu")
RUNS = json.loads((Path(__file__).parents[1] / "golden" / "vit_steps.json").read_text())
PUBLISHED_RUNS = [pytest.param(run, id=run["name"], marks=[pytest.mark.slow] * (len(run["steps"]) > 4)) for run in RUNS]


@pytest.mark.parametrize("style", [PUBLISHED, STOCK], ids=["published", "stock"])
@pytest.mark.parametrize("size", [(64, 64), (96, 96), (40, 40), (64, 96)])
def test_the_features_are_ours(style: VitStyle, size: tuple[int, int]):
    ours = VisionTransformer(16, 192, 3, built_for=64).double()
    fill(ours)
    network = BaselineVit(ours, style, drop_path=0.0).double()
    network.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network(images), ours(images), rtol=1e-11, atol=1e-11)


# Steps


def build_pair(patch: int, built_for: int, head: HeadRecipe) -> Pair:
    student = MultiCropModel(VisionTransformer(patch, 192, 3, built_for=built_for), DinoHead(192, head)).double()
    fill(student)
    return student, copy.deepcopy(student).requires_grad_(False)


def draw_golden(t: int, config: dict[str, Any]) -> Iterator[Tensor]:
    """Yield a golden run's draws of one step in the order in which the published code draws them."""
    for number, views in enumerate((2, len(config["crop_sizes"]) - 2)):
        for block in range(1, DEPTH):
            for branch in range(2):
                draws = np.random.default_rng([4000 + t, number, block, branch]).random(views * config["batch"])
                yield torch.from_numpy(draws).view(-1, 1, 1)


@pytest.mark.parametrize("run", PUBLISHED_RUNS)
def test_the_published_step_has_the_published_figures(run: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    config = run["config"]
    schedules = make_schedules(config)
    head = HeadRecipe(out_dim=config["out_dim"], norm_last_layer=config["norm_last_layer"])
    recipe = replace(schedules.recipe, precision="fp32", head=head, drop_path=config["drop_path_rate"])
    pair = build_pair(config["patch_size"], config["img_size"], head)
    step = Published(recipe, pair, schedules.at(0), CPU)
    step.center = step.center.double()
    for t, expected in enumerate(run["steps"]):
        step.hyper, draws = schedules.at(t), draw_golden(t, config)
        set_hyper(step.optimizer, step.hyper.lr, step.hyper.weight_decay)
        monkeypatch.setattr(baseline_vit.torch, "rand", lambda *_, draws=draws, **__: next(draws))
        assert step(*draw_inputs(t, config)).item() == pytest.approx(expected["loss"], rel=1e-9), t
        assert not config["drop_path_rate"] or next(draws, None) is None
        assert_summary(step.center, expected["center"], 1e-9, f"center after step {t}")
    for network in ("student", "teacher"):
        for name, tensor in getattr(step, network).backbone.state_dict().items():
            assert_summary(tensor, run[network][f"backbone.{name}"], 1e-7, name)


def test_the_stock_step_is_ours():
    """Over two steps. The second has a center and AdamW's averages."""
    head = HeadRecipe(out_dim=64, hidden_dim=32, bottleneck_dim=16)
    recipe = Recipe(precision="fp32", head=head, drop_path=0.0, optim=replace(make_recipe().optim, clip_grad=0.1))
    pair = build_pair(16, 64, head)
    for model in pair:
        model.float()
    hyper = Hyper(lr=1e-4, weight_decay=0.1, momentum=0.9, teacher_temp=0.04, freeze_last_layer=False)
    stock, (student, teacher) = Stock(recipe, pair, hyper, CPU), copy.deepcopy(pair)
    ours = TrainStep(student, teacher, build_optimizer(recipe.optim, student), recipe.loss, recipe.optim.clip_grad)
    for number in range(2):
        r = torch.Generator().manual_seed(number)
        views = torch.randn(4, 3, 64, 64, generator=r), torch.randn(6, 3, 48, 48, generator=r)
        torch.testing.assert_close(stock(*views), ours(*views, hyper).loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(stock.center, ours.center, rtol=1e-4, atol=1e-6)
    for found, expected, before in zip((stock.student, stock.teacher), (student, teacher), pair, strict=True):
        moved, wanted = (flatten(network) - flatten(before) for network in (found, expected))
        assert wanted.norm() > 0
        assert (moved - wanted).norm() < 2e-2 * wanted.norm()


def flatten(network: torch.nn.Module) -> Tensor:
    """Return all weights but the biases of the keys, whose gradients are 0 but for rounding, which AdamW magnifies."""
    named = network.backbone.named_parameters()  # type: ignore[operator,union-attr]
    return torch.cat([parameter.detach().flatten() for name, parameter in named if not name.endswith("qkv.bias")])


# Drop path


@pytest.mark.parametrize("drop", [PUBLISHED.drop, STOCK.drop], ids=["published", "stock"])
def test_whole_samples_are_dropped_at_the_rate(drop: Any):
    torch.manual_seed(0)
    branch = torch.randn(4000, 2, 3)
    dropped = drop(branch, 0.3)
    kept = (dropped != 0).all(dim=(1, 2))
    assert ((dropped == 0).all(dim=(1, 2)) | kept).all()
    torch.testing.assert_close(dropped[kept], branch[kept] / 0.7)
    assert 1 - kept.float().mean().item() == pytest.approx(0.3, abs=0.03)


def test_draws_have_the_type_of_the_branch():
    assert drop_eagerly(torch.ones(8, 2, 3, dtype=torch.float16), 0.5).dtype == torch.float16


def test_only_the_student_drops_and_its_last_block_most():
    head = HeadRecipe(out_dim=8, hidden_dim=8, bottleneck_dim=8)
    recipe = Recipe(backbone="vit_tiny_patch16", head=head, drop_path=0.2)
    networks = build_networks(recipe, build_pair(16, 32, head), CPU, torch.channels_last, STOCK)
    student, teacher = ([block.rate for block in network.backbone.blocks] for network in networks)
    assert student == pytest.approx(np.linspace(0, 0.2, DEPTH))
    assert teacher == [0.0] * DEPTH


# The arms


def make_recipe() -> Recipe:
    parser = argparse.ArgumentParser()
    add_recipe_arguments(parser)
    return build_recipe(parser.parse_args(["--backbone", "vit_tiny_patch16", "--locals", "2", "--batch", "2"]))


def test_a_vit_has_the_published_optimizer_and_drop_path():
    recipe = make_recipe()
    assert (recipe.optim.name, recipe.optim.lr, recipe.optim.weight_decay) == ("adamw", 5e-4, 0.04)
    assert recipe.drop_path == 0.1


def test_our_arm_draws_drop_path_for_each_step(monkeypatch: pytest.MonkeyPatch):
    seen: list[Tensor] = []
    recipe = replace(make_recipe(), drop_path=0.5)
    monkeypatch.setattr(step_arms, "build_train_step", lambda *_, **__: lambda *given: seen.append(given[3]))
    run = step_arms.build_ours(recipe, CPU)
    for _ in range(2):
        run(torch.empty(0), torch.empty(0))
    expected = [draw_branch_scales(0.5, DEPTH, recipe.seed, number, np.arange(2), views=4) for number in range(2)]
    assert [scales.tolist() for scales in seen] == [scales.tolist() for scales in expected]
    assert seen[0].shape == (2 * DEPTH, 8)
    assert not seen[0].equal(seen[1])


@pytest.mark.parametrize("name", ["published", "stock", "ours"])
def test_an_arm_makes_a_step(name: str):
    crops = CropRecipe(32, local_size=16, locals=2)
    recipe = replace(make_recipe(), precision="bf16", crops=crops, head=HeadRecipe(64, 32, 16))
    figures = step_arms.measure_round(step_arms.build_arm(step_arms.ARM_KINDS[name], recipe, CPU), recipe, CPU, 1)
    assert figures["images"] > 0
