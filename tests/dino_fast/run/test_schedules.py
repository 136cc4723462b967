"""The schedules against the published ones, which are numpy arrays over the whole run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dino_fast.config import Recipe, read_recipe
from dino_fast.durations import Duration, to_steps
from dino_fast.run.schedules import Schedules, scale_lr, teacher_temperature, warmup_cosine
from dino_fast.step.loss import LossRecipe
from dino_fast.step.optimizers import OptimRecipe
from shards.errors import UserError

Array = NDArray[np.float64]
CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def _published(base: float, final: float, total: int, warmup: int) -> Array:
    rise = np.linspace(0, base, warmup)
    i = np.arange(total - warmup)
    fall = final + 0.5 * (base - final) * (1 + np.cos(np.pi * i / max(len(i), 1)))
    return np.concatenate([rise, fall])


@given(
    peak=st.floats(0, 10),
    end=st.floats(0, 1),
    epochs=st.integers(1, 12),
    steps_per_epoch=st.integers(1, 9),
    data=st.data(),
)
def test_every_step_equals_the_published_array(
    peak: float, end: float, epochs: int, steps_per_epoch: int, data: st.DataObject
) -> None:
    warmup_epochs = data.draw(st.integers(0, epochs))  # the last is a run that is all warm-up
    optim = OptimRecipe(
        lr=peak, min_lr=end, warmup_epochs=warmup_epochs, weight_decay=end, weight_decay_end=peak,
        freeze_last_layer_epochs=0,
    )  # fmt: skip
    schedules = Schedules(Recipe(batch_size=256, epochs=epochs, optim=optim), steps_per_epoch)
    total = epochs * steps_per_epoch
    got = [schedules.at(step) for step in range(total)]
    for mine, published in (
        ([h.lr for h in got], _published(peak, end, total, warmup_epochs * steps_per_epoch)),
        ([h.weight_decay for h in got], _published(end, peak, total, 0)),
        ([h.momentum for h in got], _published(0.996, 1, total, 0)),
    ):
        np.testing.assert_allclose(mine, published, rtol=1e-12, atol=1e-14)


@given(start=st.floats(0.01, 0.1), end=st.floats(0.01, 0.1), warmup=st.integers(0, 20), epochs=st.integers(1, 30))
@example(start=0.04, end=0.07, warmup=1, epochs=3)
def test_teacher_temperature_equals_the_published_array(start: float, end: float, warmup: int, epochs: int) -> None:
    recipe = LossRecipe(teacher_temp=end, warmup_teacher_temp=start)
    expected = np.concatenate([np.linspace(start, end, warmup), np.full(max(epochs - warmup, 0), end)])[:epochs]
    np.testing.assert_allclose([teacher_temperature(e, warmup, recipe) for e in range(epochs)], expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("recipe", "epochs", "batch", "norm_last_layer", "temperatures", "warmup"),
    [
        ("vit_small16_100ep", 100, 512, True, (0.04, 0.04), 0),  # the published README's two ways to train ViT-S/16
        ("vit_small16_300ep", 300, 1024, False, (0.04, 0.07), 30),
    ],
)
def test_the_schedules_of_a_vit_recipe_are_those_of_the_published_arguments(
    recipe: str, epochs: int, batch: int, norm_last_layer: bool, temperatures: tuple[float, float], warmup: int
) -> None:
    """On ImageNet, at every 97th step. What the README does not pass are the published defaults."""
    settings = read_recipe(["--config", str(CONFIGS / f"{recipe}.yaml")])
    steps_per_epoch = 1_281_167 // batch
    schedules, total = Schedules(settings, steps_per_epoch), epochs * steps_per_epoch
    steps = range(0, total, 97)
    got = [schedules.at(step) for step in steps]
    published = {
        "lr": _published(5e-4 * batch / 256, 1e-6, total, 10 * steps_per_epoch)[steps],
        "weight_decay": _published(0.04, 0.4, total, 0)[steps],
        "momentum": _published(0.996, 1, total, 0)[steps],
        "teacher_temp": np.concatenate([np.linspace(*temperatures, warmup), np.full(epochs - warmup, temperatures[1])])[
            [step // steps_per_epoch for step in steps]
        ],
    }
    for name, expected in published.items():
        np.testing.assert_allclose([getattr(hyper, name) for hyper in got], expected, rtol=1e-12, err_msg=name)
    assert [hyper.freeze_last_layer for hyper in got] == [step < steps_per_epoch for step in steps]
    assert (schedules.total_steps, settings.head.norm_last_layer) == (total, norm_last_layer)


def test_the_warm_up_starts_at_zero_and_reaches_the_peak_at_its_last_step() -> None:
    values = [warmup_cosine(step, 10, 4, 0.3, 0.1) for step in range(10)]
    assert values[0] == 0
    assert values[3] == values[4] == 0.3
    assert values[2] < 0.3
    assert values[5] < 0.3
    assert values[9] > 0.1


def test_the_last_layer_is_frozen_by_epoch() -> None:
    schedules = three_epochs(freeze_last_layer_epochs=2)
    assert [schedules.at(step).freeze_last_layer for step in range(15)] == [True] * 10 + [False] * 5
    assert [schedules.epoch(step) for step in (0, 4, 5, 14)] == [0, 0, 1, 2]


@pytest.mark.parametrize("step", [-1, 15])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match="outside this run of 15 steps"):
        three_epochs().at(step)


def test_a_run_without_steps_is_refused() -> None:
    with pytest.raises(UserError, match="a run without a step"):
        three_epochs(steps_per_epoch=0)


def three_epochs(steps_per_epoch: int = 5, **optim: Any) -> Schedules:
    return Schedules(Recipe(epochs=3, optim=OptimRecipe(**{"warmup_epochs": 0, **optim})), steps_per_epoch)


def test_lengths_in_steps_and_images_are_those_in_epochs() -> None:
    """Ten epochs of 20 steps of 50 images."""
    written: list[dict[str, Duration]] = [
        {"epochs": 10, "warm": 2, "freeze": 1, "temperature": 3},
        {"epochs": "10 epochs", "warm": "2epochs", "freeze": "1 epoch", "temperature": "3.0"},
        {"epochs": "200 steps", "warm": "40 steps", "freeze": "20 steps", "temperature": "60 steps"},
        {"epochs": "10k images", "warm": "2k images", "freeze": "1000 images", "temperature": "0.003M images"},
    ]
    runs = []
    for lengths in written:
        optim = OptimRecipe(warmup_epochs=lengths["warm"], freeze_last_layer_epochs=lengths["freeze"])
        loss = LossRecipe(teacher_temp=0.07, warmup_teacher_temp_epochs=lengths["temperature"])
        schedules = Schedules(Recipe(batch_size=50, epochs=lengths["epochs"], optim=optim, loss=loss), 20)
        runs.append([schedules.at(step) for step in range(schedules.total_steps)])
    assert len(runs[0]) == 200
    assert all(run == runs[0] for run in runs)


def test_a_run_need_not_end_with_an_epoch() -> None:
    schedules = Schedules(Recipe(epochs="37 steps", optim=OptimRecipe(warmup_epochs="5 steps")), 10)
    assert schedules.total_steps == 37
    assert schedules.at(36).lr > schedules.recipe.optim.min_lr
    assert [schedules.epoch(step) for step in (9, 10, 36)] == [0, 1, 3]


def test_a_phase_longer_than_the_run_is_refused_once_the_data_tell() -> None:
    recipe = Recipe(epochs=3, optim=OptimRecipe(warmup_epochs="16 steps"))
    assert Schedules(recipe, 6).warmup_steps == 16
    with pytest.raises(
        UserError, match=r"^optim.warmup_epochs = 16 steps is more than epochs = 3, with 5 steps an epoch"
    ):
        Schedules(recipe, 5)


@pytest.mark.parametrize("wrong", ["five", "5 stepz", "-1", "1e3", "", "5 k", "1.2.3 epochs", True])
def test_what_is_no_length_is_refused(wrong: Duration) -> None:
    with pytest.raises(ValueError, match="5000 steps"):
        to_steps(wrong, 10, 10)


@given(epochs=st.integers(0, 10**6), steps_per_epoch=st.integers(1, 10**6), batch=st.integers(1, 10**5))
def test_lengths_agree_between_units(epochs: int, steps_per_epoch: int, batch: int) -> None:
    steps = epochs * steps_per_epoch
    written: list[Duration] = [epochs, str(epochs), f"{epochs} epochs", f"{steps} steps", f"{steps * batch} images"]
    assert {to_steps(duration, steps_per_epoch, batch) for duration in written} == {steps}


def test_a_length_of_less_than_a_step_is_a_step() -> None:
    assert [to_steps(duration, 10, 256) for duration in ("1 image", "0.01", "0 images", 0)] == [1, 1, 0, 0]


def test_the_rate_scales_with_the_global_batch() -> None:
    assert scale_lr(OptimRecipe(lr=0.03), 512) == 0.06
