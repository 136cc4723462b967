"""Pictures for tests of colours."""

import numpy as np
import torch
from torch import Tensor


def some_pictures(count: int, side: int, seed: int = 0) -> Tensor:
    """Smooth colour fields with noise on them, and flat ones: uint8 [count, side, side, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    waves = [np.sin(rng.uniform(1, 9, (count, 1, 1, 3)) * axis[None, :, :, None] + rng.uniform(0, 6, (count, 1, 1, 3)))
             for axis in (x, y)]  # fmt: skip
    levels = 127 + 90 * (waves[0] + waves[1]) / 1.5 + rng.normal(0, 12, (count, side, side, 3))
    pictures = torch.from_numpy(levels.clip(0, 255).astype(np.uint8))
    for place, level in enumerate((0, 255, 77)[: count - 1]):
        pictures[place] = level
    return pictures
