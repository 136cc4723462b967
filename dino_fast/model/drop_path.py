"""Drop path (Huang et al. 2016): in training, a branch of a block is left out for some of the student's crops.

Its draws are pure functions of (seed, step, sample, view, branch). So a resumed run draws the same, on any number of
ranks.
"""

import numpy as np
import numpy.typing as npt

from pipelines.random_numbers import DROP_PATH_STREAM, draw_uniform

BRANCHES = 2  # of a block: attention and MLP


def draw_branch_scales(
    rate: float, depth: int, seed: int, step: int, ids: npt.NDArray[np.int64], views: int
) -> npt.NDArray[np.float32]:
    """Return what each branch of each crop is multiplied by, float32 [2·depth, views·B], view-major.

    Branch 2·b is the attention of block b, and 2·b + 1 its MLP. A branch is left out (0) with a probability that rises
    evenly from 0 in the first block to `rate` in the last one, and else divided by the probability that it is kept.
    `ids` [B] are the sample ids.
    """
    draws = draw_uniform(seed, DROP_PATH_STREAM, step, ids[None, :], np.arange(views)[:, None], BRANCHES * depth)
    return scale_branches(draws.reshape(-1, BRANCHES * depth).T, rate)


def scale_branches(draws: npt.NDArray[np.float64], rate: float) -> npt.NDArray[np.float32]:
    """Turn uniform numbers [2·depth, N] into what the branches are multiplied by, float32 [2·depth, N]."""
    depth = len(draws) // BRANCHES
    kept = 1 - np.repeat(np.linspace(0, rate, depth), BRANCHES)[:, None]
    return (np.floor(kept + draws) / kept).astype(np.float32)
