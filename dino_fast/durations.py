"""Lengths of time in a recipe: epochs, steps or images, of which a run makes steps."""

import re
from typing import NamedTuple

Duration = int | float | str  # 100 (epochs), or "100 epochs", "5000 steps", "2.5M images"

_WRITTEN = re.compile(r"(\d+(?:\.\d+)?)(?:\s*([kM]?)\s*(epochs?|steps?|images?))?")
_TIMES = {"": 1, "k": 1_000, "M": 1_000_000}


class Length(NamedTuple):
    """A duration taken apart."""

    number: float
    unit: str
    """"epochs", "steps" or "images" """


def parse(duration: Duration) -> Length:
    """A number alone counts epochs. ValueError for what is not understood."""
    match = _WRITTEN.fullmatch(str(duration).strip())
    if match is None:
        raise ValueError(
            f'expected epochs, such as 100, or a length such as "5000 steps" or "2M images", not {duration}'
        )
    number, times, unit = match.groups()
    return Length(float(number) * _TIMES[times or ""], (unit or "epochs").rstrip("s") + "s")


def to_steps(duration: Duration, steps_per_epoch: int, batch: int) -> int:
    """The nearest number of steps of `batch` images; at least 1 for what is longer than nothing."""
    number, unit = parse(duration)
    steps = {"epochs": number * steps_per_epoch, "steps": number, "images": number / batch}[unit]
    return max(round(steps), 1 if number > 0 else 0)
