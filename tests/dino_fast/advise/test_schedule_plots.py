"""The plots show the schedules."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dino_fast.advise.schedule_plots import plot, plot_schedules
from dino_fast.config import read_recipe
from dino_fast.run.schedules import Schedules

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=80, unique=True).map(lambda many: [n / 1e5 for n in many]))
def test_a_plot_shows_its_values_to_an_eighth_of_a_row(values: list[float]):
    low, high = min(values), max(values)
    *rows, axis = plot(values, low, high)
    start = axis.index("└") + 1
    shown = [
        sum(" ▁▂▃▄▅▆▇█".index(row[start + column] if start + column < len(row) else " ") for row in rows)
        for column in range(len(values))
    ]
    exact = [(value - low) / (high - low) * 8 * len(rows) for value in values]
    assert all(abs(one - other) <= 0.5 + 1e-6 for one, other in zip(shown, exact, strict=True))
    assert axis == " " * (start - 1) + "└" + "─" * len(values)
    assert (float(rows[0].split()[0]), float(rows[-1].split()[0])) == pytest.approx((high, low), rel=1e-3)


@pytest.mark.parametrize("width", [10, 40, 80, 97, 300])
def test_plots_are_not_wider_than_the_terminal(width: int):
    recipe = read_recipe(["--config", str(CONFIGS / "resnet50_800ep.yaml")])
    lines = list(plot_schedules(Schedules(recipe, 314), width))
    assert max(map(len, lines)) == min(max(width, 40), 120)
    assert "weight decay: 1e-06 at every step" in lines
    assert {"learning rate by step", "EMA momentum by step", "teacher temperature by step"} <= set(lines)
    assert lines[1].startswith("    4.781 ┤")  # the peak, although no column need be at its step
    assert sum(line.endswith(" 251,199") for line in lines) == 3
