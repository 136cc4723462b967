"""A run whose backbone gets no gradient stops, whatever the cause is, and no healthy run does."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dino_fast.model import backbones
from dino_fast.model.head import HeadRecipe
from dino_fast.model.student_teacher import build_student_teacher
from dino_fast.run import build, health
from dino_fast.run.health import require_gradients
from dino_fast.step.loss import LossRecipe
from dino_fast.step.optimizers import OptimRecipe, build_optimizer
from dino_fast.step.train_step import TrainStep
from shards.errors import UserError
from tests.dino_fast.run.test_rollback import break_gradients
from tests.dino_fast.test_train import rows_of

WELL = {"step": 9, "grad_norm_first_layer": 1e-30, "grad_norm_head": 0.5}


@pytest.fixture(scope="module")
def step() -> TrainStep:
    head = HeadRecipe(out_dim=16, hidden_dim=8, bottleneck_dim=8, batch_norm=True, norm_last_layer=True)
    student, teacher = build_student_teacher("resnet18", head)
    return TrainStep(student, teacher, build_optimizer(OptimRecipe(), student), LossRecipe())


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parameter must have had a gradient after three steps."""
    monkeypatch.setattr(health, "GRADIENT_STEPS", 3)


def test_a_first_layer_without_a_gradient_is_refused(step: TrainStep) -> None:
    with pytest.raises(UserError, match=r"at step 9, the gradient's norm is exactly 0 in its first layer and 0\.5 in"):
        require_gradients({**WELL, "grad_norm_first_layer": 0.0}, [], step)
    for norm in (1e-30, None, math.nan, math.inf):  # None: all steps were skipped
        require_gradients({**WELL, "grad_norm_first_layer": norm}, [], step)


def test_a_parameter_that_never_has_a_gradient_is_refused(step: TrainStep) -> None:
    for name in (
        "backbone.bn1.bias",
        "backbone.layer3.0.conv2.weight",
        "head.mlp.0.weight",
        "head.last_layer.weight_v",
    ):
        with pytest.raises(UserError, match=rf"1 parameters have had no gradient in any step up to 9 \({name}\)"):
            require_gradients(WELL, [name], step)
    with pytest.raises(UserError, match=r"5 parameters .* \(backbone.conv1.weight, .*, …\)"):
        require_gradients(WELL, [name for name, _ in step.bare_student.named_parameters()][:5], step)


def test_what_needs_no_gradient_is_no_alarm(step: TrainStep) -> None:
    """The frozen lengths of prototypes, and biases that batch norm takes away again."""
    require_gradients(WELL, ["head.last_layer.weight_g", "head.mlp.0.bias"], step)


def test_a_run_whose_backbone_gets_no_gradient_stops_at_the_first_log(
    train_here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cut(_: nn.Module, x: Tensor) -> Tensor:
        return x.detach().mean(dim=(2, 3), keepdim=True) + 0 * x.mean(dim=(2, 3), keepdim=True)

    monkeypatch.setattr(backbones.GlobalAveragePool, "forward", cut)
    assert train_here(tmp_path / "run", "--log_every", "2", "--checkpoint.every", "2 steps") == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "the backbone gets no gradient: at step 1, the gradient's norm is exactly 0 in its first layer and" in line
    assert "Pass --compile never" in line
    assert rows_of(tmp_path / "run")[0]["grad_norm_head"] > 0
    assert not list((tmp_path / "run").glob("step-*.pt"))


@pytest.mark.parametrize("kind", ["zero", "none"])
def test_a_run_with_one_parameter_without_a_gradient_stops(
    train_here,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    soon: None,
    kind: str,
) -> None:
    make = build.build_train_step

    def numb(*arguments: Any, **options: Any) -> TrainStep:
        step = make(*arguments, **options)
        norm = step.bare_student.backbone.layer4[1].bn2
        if kind == "zero":
            norm.weight.register_hook(torch.zeros_like)
        else:
            norm.forward = lambda x: nn.functional.batch_norm(x, None, None, None, norm.bias, training=True)
        return step

    monkeypatch.setattr(build, "build_train_step", numb)
    assert train_here(tmp_path / "run", "--optim.weight_decay", "0") == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "1 parameters have had no gradient in any step up to 2 (backbone.layer4.1.bn2.weight)" in line


@pytest.mark.parametrize(
    "flags",
    [
        ("--optim.freeze_last_layer_epochs", "4", "--head.norm_last_layer", "false"),
        ("--head.batch_norm", "true", "--head.norm_last_layer", "true", "--accumulate", "2"),
        ("--precision", "bf16", "--optim.lr", "0", "--optim.min_lr", "0"),
        ("--batch_size", "2", "--crops.locals", "0", "--crops.global_size", "64", "--head.batch_norm", "true"),
    ],
    ids=" ".join,
)
def test_a_frozen_last_layer_a_rate_of_zero_and_tiny_batches_are_no_alarm(
    train_here, tmp_path: Path, soon: None, flags: tuple[str, ...]
) -> None:
    assert train_here(tmp_path / "run", "--max_steps", "6", *flags) == 0


def test_skipped_steps_are_no_alarm(train_here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, soon: None) -> None:
    break_gradients(monkeypatch, 0, 4)
    assert train_here(tmp_path / "run", "--max_steps", "8", "--precision", "bf16") == 0
    assert [row["skipped"] for row in rows_of(tmp_path / "run")] == [1] * 5 + [0] * 3


def test_blocks_that_start_at_zero_while_the_rate_warms_up_are_no_alarm(
    train_here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step's rate is 0, so the second has no gradient behind these norms either."""
    make = build.build_train_step

    def start_at_zero(*arguments: Any, **options: Any) -> TrainStep:
        step = make(*arguments, **options)
        with torch.no_grad():
            for layer in (step.bare_student.backbone.layer1, step.bare_student.backbone.layer4):
                layer[1].bn2.weight.zero_()
        return step

    monkeypatch.setattr(build, "build_train_step", start_at_zero)
    monkeypatch.setattr(health, "GRADIENT_STEPS", 4)
    assert train_here(tmp_path / "run", "--max_steps", "6", "--optim.warmup_epochs", "2") == 0
