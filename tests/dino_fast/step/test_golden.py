"""Three short runs through the real step against the numbers of the published code (tests/golden/reference_steps.json).

All arithmetic is float64. Agreement here fixes the multi-crop grouping of batch norm, per-tensor clipping, the frozen
last layer, the weight-decay groups, the schedules, the center, the moving average and the three optimizers.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_fast.model.head import HeadRecipe
from dino_fast.model.student_teacher import build_student_teacher
from dino_fast.run.schedules import Schedules
from dino_fast.step.optimizers import build_optimizer
from dino_fast.step.train_step import TrainStep
from tests.golden_runs import assert_summary, draw_inputs, fill, make_schedules
from tests.interpreted import kernels

RUNS = json.loads((Path(__file__).parents[2] / "golden" / "reference_steps.json").read_text())


@dataclass
class Replay:
    reference: dict[str, Any]
    steps: list[dict[str, Any]]
    step: TrainStep


@pytest.fixture(scope="module", params=RUNS, ids=[run["name"] for run in RUNS])
def replay(request: pytest.FixtureRequest) -> Replay:
    run = request.param
    config = run["config"]
    schedules = make_schedules(config)
    step = _train_step(config, schedules)
    rows = []
    for t in range(config["epochs"] * config["steps_per_epoch"]):
        hyper = schedules.at(t)
        globals_, locals_ = draw_inputs(t, config)
        out = step(globals_, locals_, hyper)
        center = step.center.clone()
        rows.append({"epoch": schedules.epoch(t), "hyper": hyper, "loss": out.loss.item(), "center": center})
    return Replay(run, rows, step)


def _train_step(
    config: dict[str, Any], schedules: Schedules, dtype: torch.dtype = torch.float64, **options: Any
) -> TrainStep:
    head = HeadRecipe(
        out_dim=config["out_dim"],
        batch_norm=config["use_bn_in_head"],
        norm_last_layer=config["norm_last_layer"],
    )
    student, teacher = build_student_teacher(config["arch"], head)
    for network in (student, teacher):
        # The float64 convolutions of the CPU take 1.5 times as long channels-last.
        fill(network.to(dtype).to(memory_format=torch.contiguous_format))
    optimizer = build_optimizer(schedules.recipe.optim, student)
    return TrainStep(student, teacher, optimizer, schedules.recipe.loss, schedules.recipe.optim.clip_grad, **options)


def test_losses(replay: Replay) -> None:
    assert [row["loss"] for row in replay.steps] == pytest.approx(
        [row["loss"] for row in replay.reference["steps"]], rel=1e-9
    )


def testmake_schedules(replay: Replay) -> None:
    for row, expected in zip(replay.steps, replay.reference["steps"], strict=True):
        assert row["epoch"] == expected["epoch"]
        for name in ("lr", "weight_decay", "momentum", "teacher_temp"):
            assert getattr(row["hyper"], name) == pytest.approx(expected[name], rel=1e-12), name


def test_center(replay: Replay) -> None:
    for row, expected in zip(replay.steps, replay.reference["steps"], strict=True):
        assert_summary(row["center"], expected["center"], 1e-9, f"center after step {expected['step']}")


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_tensors(replay: Replay, network: str) -> None:
    tensors = getattr(replay.step, network).state_dict()
    expected = replay.reference[network]
    assert set(tensors) == set(expected)
    for name, tensor in tensors.items():
        assert_summary(tensor, expected[name], 1e-7, name)


@pytest.mark.parametrize(
    ("run", "steps"),
    [
        pytest.param(RUNS[0], 2, id=RUNS[0]["name"]),
        *(pytest.param(run, 12, id=f"all of {run['name']}", marks=pytest.mark.slow) for run in RUNS),
    ],
)
def test_the_kernels_keep_to_it_in_float32(run: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, the kernels are slow by the block: a few large ones do here."""
    kernels("dino_fast.step.kernels.dino_loss")
    update = kernels("dino_fast.step.kernels.update")
    if not torch.cuda.is_available():
        for name in ("BLOCK", "CHUNK"):
            monkeypatch.setattr(update, name, update.tl.constexpr(1 << 16))
    schedules = make_schedules(run["config"])
    step = _train_step(run["config"], schedules, torch.float32, kernels=True)
    for t, expected in zip(range(steps), run["steps"], strict=False):
        globals_, locals_ = (views.float() for views in draw_inputs(t, run["config"]))
        out = step(globals_, locals_, schedules.at(t))
        # Float32's rounding grows from step to step: these batch norms see four images.
        assert out.loss.item() == pytest.approx(expected["loss"], rel=1e-5 * 3**t), t
        norm = step.center.double().norm().item()
        assert norm == pytest.approx(expected["center"]["norm"], rel=1e-4 * 3**t), t
