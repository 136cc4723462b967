"""Three short runs of vision transformers against the numbers of the published code (tests/golden/vit_steps.json).

All arithmetic is float64. Agreement here fixes the gradient of the interpolated position embedding, drop path, which
tensors have weight decay, and all that test_golden.py fixes for ResNets.
"""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_fast.model.drop_path import scale_branches
from dino_fast.model.head import DinoHead, HeadRecipe
from dino_fast.model.student_teacher import MultiCropModel
from dino_fast.model.vit import DEPTH, VisionTransformer
from dino_fast.step.optimizers import build_optimizer
from dino_fast.step.train_step import TrainStep
from tests.golden_runs import assert_summary, draw_inputs, fill, make_schedules

RUNS = json.loads((Path(__file__).parents[2] / "golden" / "vit_steps.json").read_text())


def build_step(config: dict[str, Any]) -> TrainStep:
    backbone = VisionTransformer(config["patch_size"], 192, 3, built_for=config["img_size"])
    head = DinoHead(192, HeadRecipe(out_dim=config["out_dim"], norm_last_layer=config["norm_last_layer"]))
    student = MultiCropModel(backbone, head).double()
    fill(student)
    teacher = copy.deepcopy(student).requires_grad_(False)
    recipe = make_schedules(config).recipe
    return TrainStep(student, teacher, build_optimizer(recipe.optim, student), recipe.loss, recipe.optim.clip_grad)


def draw_scales(t: int, config: dict[str, Any]) -> Tensor | None:
    """Return the scales of the golden run's own draws, in float64."""
    rate = config["drop_path_rate"]
    if not rate:
        return None
    views = len(config["crop_sizes"]) - 2, config["batch"]
    counts = 2 * config["batch"], views[0] * views[1]
    draws = np.zeros((2 * DEPTH, sum(counts)))
    for block in range(1, DEPTH):
        for branch in range(2):
            passes = [
                np.random.default_rng([4000 + t, number, block, branch]).random(n) for number, n in enumerate(counts)
            ]
            draws[2 * block + branch] = np.concatenate(passes)
    kept = 1 - np.repeat(np.linspace(0, rate, DEPTH), 2)[:, None]
    return torch.from_numpy(np.where(scale_branches(draws, rate) > 0, 1 / kept, 0))


@pytest.mark.parametrize("run", RUNS, ids=[run["name"] for run in RUNS])
@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["kept", "computed-again"])
def test_the_published_runs(run: dict[str, Any], again: bool):
    config = run["config"]
    schedules, step = make_schedules(config), build_step(config)
    step.student.backbone.activation_checkpointing = again
    decayed = next(group for group in step.optimizer.param_groups if group["decays"])["params"]
    assert len(decayed) == run["decayed"]
    for t, expected in enumerate(run["steps"]):
        out = step(*draw_inputs(t, config), schedules.at(t), draw_scales(t, config))
        assert out.loss.item() == pytest.approx(expected["loss"], rel=1e-9), t
        assert_summary(step.center, expected["center"], 1e-9, f"center after step {t}")
    for network in ("student", "teacher"):
        tensors = getattr(step, network).state_dict()
        assert set(tensors) == set(run[network])
        for name, tensor in tensors.items():
            assert_summary(tensor, run[network][name], 1e-7, name)
