"""The schedules against the published ones, which are numpy arrays over the whole run."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dino_fast.loss import LossRecipe
from dino_fast.optim import OptimRecipe
from dino_fast.schedules import Schedules, scaled_lr, teacher_temperature, warmup_cosine

Array = NDArray[np.float64]


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
    optim = OptimRecipe(min_lr=end, warmup_epochs=warmup_epochs, weight_decay=end, weight_decay_end=peak)
    schedules = Schedules(optim, LossRecipe(), peak, epochs, steps_per_epoch)
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
    recipe = LossRecipe(teacher_temp=end, warmup_teacher_temp=start, warmup_teacher_temp_epochs=warmup)
    expected = np.concatenate([np.linspace(start, end, warmup), np.full(max(epochs - warmup, 0), end)])[:epochs]
    np.testing.assert_allclose([teacher_temperature(e, recipe) for e in range(epochs)], expected, rtol=1e-12)


def test_the_warm_up_starts_at_zero_and_reaches_the_peak_at_its_last_step() -> None:
    values = [warmup_cosine(step, 10, 4, 0.3, 0.1) for step in range(10)]
    assert values[0] == 0
    assert values[3] == values[4] == 0.3
    assert values[2] < 0.3
    assert values[5] < 0.3
    assert values[9] > 0.1


def test_the_last_layer_is_frozen_by_epoch() -> None:
    schedules = Schedules(OptimRecipe(freeze_last_layer_epochs=2), LossRecipe(), 0.1, 3, 5)
    assert [schedules.at(step).freeze_last_layer for step in range(15)] == [True] * 10 + [False] * 5
    assert [schedules.epoch(step) for step in (0, 4, 5, 14)] == [0, 0, 1, 2]


@pytest.mark.parametrize("step", [-1, 15])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match="outside this run of 15 steps"):
        Schedules(OptimRecipe(), LossRecipe(), 0.1, 3, 5).at(step)


def test_a_run_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to schedule"):
        Schedules(OptimRecipe(), LossRecipe(), 0.1, 3, 0)


def test_the_rate_scales_with_the_global_batch() -> None:
    assert scaled_lr(OptimRecipe(lr=0.03), 512) == 0.06
