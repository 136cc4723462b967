"""Define the multi-crop recipe, and draw crop windows from counter-based random numbers.

Windows have the distribution of torchvision's RandomResizedCrop. It tries ten times: the area is uniform in `scale`,
and the aspect ratio is log-uniform in 3/4 to 4/3. If no try fits into the image, it takes the largest center window
whose aspect ratio is allowed.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
from annotated_types import Ge, Le

from pipelines.random_numbers import WINDOW_STREAM, draw_uniform

Windows = npt.NDArray[np.int64]  # [views, B, 4], or [B, 4] of one view: top, left, height, width in pixels

_RATIO = (3 / 4, 4 / 3)
_TRIES = 10

# A ResNet halves an image five times: of 16 pixels a single one is left before its last stage. For a single pixel torch
# 2.15 computes wrong weight gradients in bfloat16 on a CPU (3×3 convolution, stride 2; they change from call to call).
Pixels = Annotated[int, Ge(24), Le(1024)]


@dataclass(frozen=True)
class CropRecipe:
    """Two global views and some local views."""

    global_size: Pixels = 224
    """side of a global view, pixels"""
    global_scale: tuple[float, float] = (0.4, 1.0)
    """least and greatest share of the image's area that a global view covers"""
    local_size: Pixels = 96
    """side of a local view, pixels"""
    local_scale: tuple[float, float] = (0.05, 0.4)
    """least and greatest share of the image's area that a local view covers"""
    locals: Annotated[int, Ge(0), Le(64)] = 8
    """number of local views; 0 for none"""

    @property
    def views(self) -> int:
        """The number of all views."""
        return 2 + self.locals

    @property
    def resolutions(self) -> tuple[tuple[int, slice], ...]:
        """The side in pixels and the views of each resolution: global views, then local views if there are any."""
        globals_ = (self.global_size, slice(0, 2))
        return (globals_, (self.local_size, slice(2, self.views))) if self.locals else (globals_,)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The side of each view in pixels, global views first."""
        return (self.global_size,) * 2 + (self.local_size,) * self.locals


def draw_windows(
    recipe: CropRecipe, seed: int, epoch: int, ids: npt.NDArray[np.int64], height: npt.ArrayLike, width: npt.ArrayLike
) -> Windows:
    """Return the crop windows of samples `ids` [B] in every view. The images are `height` [B] by `width` [B] pixels."""
    views = np.arange(recipe.views)
    draws = draw_uniform(seed, WINDOW_STREAM, epoch, ids[None, :], views[:, None], 2 * _TRIES + 2)
    scale = np.array([recipe.global_scale] * 2 + [recipe.local_scale] * recipe.locals)[:, None, :]
    return random_resized_crop(draws, scale, np.asarray(height, np.int64), np.asarray(width, np.int64))


def random_resized_crop(
    draws: npt.NDArray[np.float64],
    scale: npt.NDArray[np.float64],
    height: npt.NDArray[np.int64],
    width: npt.NDArray[np.int64],
) -> Windows:
    """Turn uniform numbers into windows [V, B, 4].

    `draws` [V, B, 22] are uniform numbers: 10 for the area, 10 for the aspect ratio, then one each for top and left.
    `scale` [V, 1, 2] are the ranges of the area, `height` and `width` [B] the sizes of the images in pixels.
    """
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
    windows = np.stack([top, left, tall, wide], -1)
    return np.where(fits.any(-1)[..., None], windows, center_window(height, width))


def center_window(height: npt.NDArray[np.int64], width: npt.NDArray[np.int64]) -> Windows:
    """Return the largest center windows [B, 4] whose aspect ratio is allowed. They are used if no try fits."""
    wide = np.minimum(width, np.maximum(1, np.rint(height * _RATIO[1]).astype(np.int64)))
    tall = np.minimum(height, np.maximum(1, np.rint(width / _RATIO[0]).astype(np.int64)))
    return np.stack([(height - tall) // 2, (width - wide) // 2, tall, wide], -1)
