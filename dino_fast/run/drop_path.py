"""The drop path of a step, as its student takes it."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dino_fast.config import Recipe
from dino_fast.model.backbones import count_blocks
from dino_fast.model.drop_path import draw_branch_scales
from pipelines.decoder import move_to_device


def draw_scales(recipe: Recipe, step: int, ids: npt.NDArray[np.int64], device: torch.device) -> Tensor | None:
    """Return what the student's branches are multiplied by, [branches, views·B] on the device, view-major.

    `ids` [B] are the samples of this rank. Returns None for a run without drop path.
    """
    blocks = count_blocks(recipe.backbone)
    if not blocks or not recipe.drop_path:
        return None
    scales = draw_branch_scales(recipe.drop_path, blocks, recipe.seed, step, ids, recipe.crops.views)
    return move_to_device(torch.from_numpy(scales), device)
