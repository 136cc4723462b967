"""The schedules of a run at evenly spaced steps, as numbers and as plots of characters."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dino_fast.run.schedules import Schedules
from dino_fast.step.hyper import Hyper

_TITLES = {
    "lr": "learning rate", "weight_decay": "weight decay", "momentum": "EMA momentum",
    "teacher_temp": "teacher temperature",
}  # fmt: skip


class Characters(NamedTuple):
    """What a plot is drawn with."""

    blocks: str
    """nine characters, filled to 0, 1 … 8 eighths"""
    tick: str
    """the axis where a value stands"""
    bar: str
    """the axis elsewhere"""
    corner: str
    """where the axes meet"""
    line: str
    """the axis below"""


BOXES = Characters(" ▁▂▃▄▅▆▇█", "┤", "│", "└", "─")
ASCII = Characters(" .,:-=+*#", "+", "|", "+", "-")
_PLOT_ROWS = 4
_AXIS_COLUMNS = 9  # left of a plot, for the values of its axis
_LEAST_COLUMNS, _MOST_COLUMNS = 40, 120  # of a plot with its axis


def sample_schedules(schedules: Schedules, points: int) -> dict[str, list[float]]:
    """Return the schedules at so many steps, evenly from the first to the last, and those steps as "step"."""
    steps = [round(point * (schedules.total_steps - 1) / (points - 1)) for point in range(points)]
    hypers = [schedules.at(step) for step in steps]
    return {"step": steps} | {name: [getattr(hyper, name) for hyper in hypers] for name in _TITLES}


def sample_extremes(schedules: Schedules) -> list[Hyper]:
    """Return the hyper-parameters of the steps at which a schedule has its highest or lowest value."""
    last = schedules.total_steps - 1
    warm = schedules.temperature_epochs * schedules.steps_per_epoch
    return [schedules.at(min(max(step, 0), last)) for step in (0, schedules.warmup_steps - 1, warm, last)]


def choose_characters(encoding: str | None) -> Characters:
    """Return the best characters that an output of this encoding has."""
    try:
        "".join(BOXES).encode(encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return ASCII
    return BOXES


def plot_schedules(schedules: Schedules, width: int, characters: Characters = BOXES) -> Iterator[str]:
    """Yield plots of the schedules over the steps, in lines of at most `width` columns, but of 40 at least."""
    columns = min(max(width, _LEAST_COLUMNS), _MOST_COLUMNS) - _AXIS_COLUMNS - 2
    samples, extremes = sample_schedules(schedules, columns), sample_extremes(schedules)
    for name, title in _TITLES.items():
        values = samples[name]
        range_ = [*values, *(getattr(hyper, name) for hyper in extremes)]
        if min(range_) == max(range_):
            yield f"{title}: {values[0]:.4g} at every step"
            continue
        yield f"{title} by step"
        yield from plot(values, min(range_), max(range_), characters)
        last = f"{schedules.total_steps - 1:,}"
        yield f"{'':{_AXIS_COLUMNS}} 0{last:>{columns}}"


def plot(values: Sequence[float], low: float, high: float, characters: Characters = BOXES) -> Iterator[str]:
    """Yield the lines of a plot: one column of blocks for each value, from `low` (empty) to `high` (full), and axes."""
    eighths = [round((value - low) / (high - low) * _PLOT_ROWS * 8) for value in values]
    labels = {_PLOT_ROWS - 1: f"{high:.4g}", 0: f"{low:.4g}"}
    for row in reversed(range(_PLOT_ROWS)):
        blocks = "".join(characters.blocks[min(max(filled - 8 * row, 0), 8)] for filled in eighths)
        axis = characters.tick if row in labels else characters.bar
        yield f"{labels.get(row, ''):>{_AXIS_COLUMNS}} {axis}{blocks}".rstrip()
    yield f"{'':{_AXIS_COLUMNS}} {characters.corner}{characters.line * len(values)}"
