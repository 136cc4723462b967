"""Make images for tests of the augmentation."""

import numpy as np
import torch
from torch import Tensor


def make_images(count: int, side: int, seed: int = 0) -> Tensor:
    """Return smooth color fields with noise, and some flat images: uint8 [count, side, side, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    waves = [np.sin(rng.uniform(1, 9, (count, 1, 1, 3)) * axis[None, :, :, None] + rng.uniform(0, 6, (count, 1, 1, 3)))
             for axis in (x, y)]  # fmt: skip
    levels = 127 + 90 * (waves[0] + waves[1]) / 1.5 + rng.normal(0, 12, (count, side, side, 3))
    images = torch.from_numpy(levels.clip(0, 255).astype(np.uint8))
    for place, level in enumerate((0, 255, 77)[: count - 1]):
        images[place] = level
    return images
