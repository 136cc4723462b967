"""Measure the mean and the standard deviation of each color channel, as training normalizes images by them."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shards.errors import UserError
from shards.index import ShardIndex
from shards.inspect.rgb import UnreadableError, decode_rgb
from shards.packing.workers import Tick, run_tasks

_TASK = 256  # images of a worker's task


@dataclass(frozen=True)
class ChannelStatistics:
    """Red, green and blue of some images, where black is 0 and white is 1."""

    images: int
    """number of images that were measured"""
    unreadable: int
    """number of images that could not be decoded, and were left out"""
    mean: tuple[float, float, float]
    """mean over all pixels"""
    std: tuple[float, float, float]
    """standard deviation over all pixels"""

    def to_json(self) -> str:
        """Return the figures as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"


class _Task(NamedTuple):
    """Some samples of a folder."""

    folder: str
    """path or URL of the shards"""
    ids: npt.NDArray[np.int64]
    """numbers of the samples"""


class _Sums(NamedTuple):
    """What a worker found."""

    images: int
    """number of images that could be decoded"""
    means: npt.NDArray[np.float64]
    """each image's mean level, summed over images [3]"""
    squares: npt.NDArray[np.float64]
    """each image's mean squared level, summed over images [3]"""


def measure_channels(
    index: ShardIndex, count: int | None, workers: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> ChannelStatistics:
    """Measure `count` images that are spread evenly over the index, or all images.

    Every image counts the same, whatever its size. The figures do not depend on the number of workers. `progress` is
    called with (images done, images in total). Raises UserError if no image can be decoded.
    """
    total = len(index) if count is None else min(count, len(index))
    ids = np.arange(total) * len(index) // max(total, 1)
    tasks = [_Task(str(index.folder), ids[first : first + _TASK]) for first in range(0, total, _TASK)]
    found = run_tasks(_measure, tasks.__getitem__, len(tasks), workers, lambda done: progress(done, total))
    images = sum(sums.images for sums in found)
    if not images:
        raise UserError(f"{index.folder}: none of {total} images can be decoded. Run `make-shards check` on it.")
    mean = np.sum([sums.means for sums in found], axis=0) / images
    variance = np.sum([sums.squares for sums in found], axis=0) / images - mean**2
    std = np.sqrt(np.maximum(variance, 0))
    return ChannelStatistics(images, total - images, _to_shares(mean), _to_shares(std))


def _measure(task: _Task, tick: Tick) -> _Sums:
    """Add up the samples of a task. Runs in a worker."""
    images, means, squares = 0, np.zeros(3), np.zeros(3)
    with ShardIndex(task.folder) as index:
        for done, id in enumerate(task.ids.tolist()):
            tick(done)
            try:
                levels = np.asarray(decode_rgb(index, id))
            except UnreadableError:
                continue
            counts = [np.bincount(levels[..., channel].ravel(), minlength=256) for channel in range(3)]
            shares = np.array(counts) / (levels.size // 3)
            images += 1
            means += shares @ np.arange(256)
            squares += shares @ np.arange(256) ** 2
    return _Sums(images, means, squares)


def _to_shares(levels: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    """Return levels of 0 to 255 as shares of white, with four decimals."""
    red, green, blue = (round(level / 255, 4) for level in levels.tolist())
    return red, green, blue
