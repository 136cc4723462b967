"""The multi-crop recipe as data, and crop windows from counters.

The law of a window is torchvision's RandomResizedCrop: ten tries at an area uniform in `scale` and an aspect ratio
log-uniform in 3/4 to 4/3, then a central window of the nearest allowed aspect ratio.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
from annotated_types import Ge, Le

from pipelines.counters import WINDOWS, uniform

Windows = npt.NDArray[np.int64]  # [views, B, 4]: top, left, height, width in pixels

_RATIO = (3 / 4, 4 / 3)
_TRIES = 10

# A ResNet halves a picture five times: of 16 pixels its last stage gets a single one, for which torch 2.15 computes
# wrong weight gradients in bfloat16 on a CPU (3×3 convolution, stride 2; they change from call to call).
Pixels = Annotated[int, Ge(24), Le(1024)]


@dataclass(frozen=True)
class CropRecipe:
    """Two global views and some local ones."""

    global_size: Pixels = 224
    """side of a global view, pixels"""
    global_scale: tuple[float, float] = (0.4, 1.0)
    """share of the picture's area that a global view covers, least and most"""
    local_size: Pixels = 96
    """side of a local view, pixels"""
    local_scale: tuple[float, float] = (0.05, 0.4)
    """share of the picture's area that a local view covers, least and most"""
    locals: Annotated[int, Ge(0), Le(64)] = 8
    """number of local views; 0 for none"""

    @property
    def views(self) -> int:
        return 2 + self.locals

    @property
    def resolutions(self) -> tuple[tuple[int, slice], ...]:
        """Side in pixels and views of each resolution: the globals', then the locals' where there are any."""
        globals_ = (self.global_size, slice(0, 2))
        return (globals_, (self.local_size, slice(2, self.views))) if self.locals else (globals_,)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Side of each view, pixels, globals first."""
        return (self.global_size,) * 2 + (self.local_size,) * self.locals


def windows(
    recipe: CropRecipe, seed: int, epoch: int, ids: npt.NDArray[np.int64], height: npt.ArrayLike, width: npt.ArrayLike
) -> Windows:
    """The crop windows of samples `ids` [B], whose pictures are `height` [B] by `width` [B] pixels, for every view."""
    views = np.arange(recipe.views)
    draws = uniform(seed, WINDOWS, epoch, ids[None, :], views[:, None], 2 * _TRIES + 2)
    scale = np.array([recipe.global_scale] * 2 + [recipe.local_scale] * recipe.locals)[:, None, :]
    return random_resized_crop(draws, scale, np.asarray(height, np.int64), np.asarray(width, np.int64))


def random_resized_crop(
    draws: npt.NDArray[np.float64],
    scale: npt.NDArray[np.float64],
    height: npt.NDArray[np.int64],
    width: npt.NDArray[np.int64],
) -> Windows:
    """Windows [V, B, 4] from uniform numbers `draws` [V, B, 22], area range `scale` [V, 1, 2], picture sizes [B]."""
    area_draw, ratio_draw = draws[..., 0:_TRIES], draws[..., _TRIES : 2 * _TRIES]
    area = (scale[..., :1] + (scale[..., 1:] - scale[..., :1]) * area_draw) * (height * width)[:, None]
    low, high = np.log(_RATIO)
    ratio = np.exp(low + (high - low) * ratio_draw)
    tall, wide = np.rint(np.sqrt(area / ratio)).astype(np.int64), np.rint(np.sqrt(area * ratio)).astype(np.int64)
    fits = (tall > 0) & (wide > 0) & (tall <= height[:, None]) & (wide <= width[:, None])
    first = fits.argmax(-1)[..., None]
    tall, wide = np.take_along_axis(tall, first, -1)[..., 0], np.take_along_axis(wide, first, -1)[..., 0]
    top = np.floor(draws[..., -2] * (height - tall + 1)).astype(np.int64)
    left = np.floor(draws[..., -1] * (width - wide + 1)).astype(np.int64)
    found = np.stack([top, left, tall, wide], -1)
    return np.where(fits.any(-1)[..., None], found, central_window(height, width))


def central_window(height: npt.NDArray[np.int64], width: npt.NDArray[np.int64]) -> Windows:
    """The fallback [B, 4]: the largest central window whose aspect ratio is allowed."""
    wide = np.minimum(width, np.maximum(1, np.rint(height * _RATIO[1]).astype(np.int64)))
    tall = np.minimum(height, np.maximum(1, np.rint(width / _RATIO[0]).astype(np.int64)))
    return np.stack([(height - tall) // 2, (width - wide) // 2, tall, wide], -1)
