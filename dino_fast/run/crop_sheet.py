"""An image of the crops that a step gets: the augmentation as the networks see it."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from dino_fast.run.training_run import TrainingRun
from pipelines.batch import Batch
from pipelines.photometric import IMAGENET, Normalization
from shards.errors import UserError, suggest_fix
from shards.inspect.sheet_cells import write_png

GAP = 8  # pixels around every crop
BACKGROUND = 128  # 8-bit level


def save_first_crops(run: TrainingRun, batch: Batch) -> None:
    """Write a batch's crops to crops.png, if the recipe asks for it and the file is not there yet."""
    path = Path(run.recipe.output) / "crops.png"
    if run.recipe.dump_crops and run.ranks.first and not path.exists():
        normalization = run.recipe.data.normalization
        save_crop_sheet(path, batch.globals, batch.locals, len(batch.ids), normalization=normalization)


def save_crop_sheet(
    path: Path,
    globals_: Tensor,
    locals_: Tensor | None,
    batch: int,
    images: int = 8,
    normalization: Normalization = IMAGENET,
) -> None:
    """Write `draw_crop_sheet` as a PNG file, whole or not at all. Raises UserError where that is refused."""
    sheet = Image.fromarray(draw_crop_sheet(globals_, locals_, batch, images, normalization))
    try:
        write_png(sheet, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}. {suggest_fix(error)}") from error


def draw_crop_sheet(
    globals_: Tensor, locals_: Tensor | None, batch: int, images: int = 8, normalization: Normalization = IMAGENET
) -> npt.NDArray[np.uint8]:
    """Draw a row for each of the first `images` of a batch: its two global crops, then its local ones.

    globals_: [2·batch, 3, G, G], locals_: [n·batch, 3, L, L] or None, normalized, view-major, of any floating type and
    device. Returns uint8 [H, W, 3], with every crop in its own size. A row starts every G + GAP pixels, after a first
    GAP, and each crop starts GAP pixels after the one before it. Raises ValueError where the crops are not those of
    `batch` images.
    """
    if len(globals_) != 2 * batch or (locals_ is not None and len(locals_) % batch):
        found = f"{len(globals_)} global crops and {0 if locals_ is None else len(locals_)} local ones"
        raise ValueError(f"{found} are not those of {batch} images")
    given = [crops for crops in (globals_, locals_) if crops is not None]
    views = [view for crops in given for view in to_levels(crops, batch, images, normalization)]
    rows, row = len(views[0]), max(view.shape[1] for view in views)
    height, width = GAP + rows * (row + GAP), GAP + sum(view.shape[2] + GAP for view in views)
    sheet = np.full((height, width, 3), BACKGROUND, np.uint8)
    left = GAP
    for view in views:
        side = view.shape[2]
        for number, image in enumerate(view):
            top = GAP + number * (row + GAP)
            sheet[top : top + side, left : left + side] = image
        left += side + GAP
    return sheet


def to_levels(crops: Tensor, batch: int, images: int, normalization: Normalization) -> npt.NDArray[np.uint8]:
    """Turn normalized crops [V·batch, 3, S, S] into the 8-bit levels of the first images, [V, images, S, S, 3]."""
    few = crops.detach().unflatten(0, (-1, batch))[:, :images].permute(0, 1, 3, 4, 2).to("cpu", torch.float32)
    scaled = (few * torch.tensor(normalization.std) + torch.tensor(normalization.mean)) * 255
    return scaled.round_().clamp_(0, 255).to(torch.uint8).numpy()
