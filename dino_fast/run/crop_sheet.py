"""A picture of the crops that a step was given: the augmentation as the networks see it."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from pipelines.photometric import MEAN, STD
from shards.errors import UserError, mend_of
from shards.inspect.show import write_png

GAP = 8  # pixels around every crop
BACKGROUND = 128  # grey level


def write_crop_sheet(path: Path, globals_: Tensor, locals_: Tensor | None, batch: int, pictures: int = 8) -> None:
    """Write `crop_sheet` as a PNG file, whole or not at all. UserError where that is refused."""
    sheet = Image.fromarray(crop_sheet(globals_, locals_, batch, pictures))
    try:
        write_png(sheet, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; {mend_of(error)}") from error


def crop_sheet(globals_: Tensor, locals_: Tensor | None, batch: int, pictures: int = 8) -> npt.NDArray[np.uint8]:
    """A row for each of the first `pictures` of a batch (all, where there are fewer): its two global crops, then its
    local ones, each in its own size: uint8 [H, W, 3].

    globals_: [2·batch, 3, G, G], locals_: [n·batch, 3, L, L] or None, normalised, view-major, of any floating type and
    device. A row starts every G + GAP pixels, after a first GAP, and so does a crop after the one before it. Raises
    ValueError where the crops are not those of `batch` pictures.
    """
    if len(globals_) != 2 * batch or (locals_ is not None and len(locals_) % batch):
        found = f"{len(globals_)} global crops and {0 if locals_ is None else len(locals_)} local ones"
        raise ValueError(f"{found} are not those of {batch} pictures")
    views = [view for crops in (globals_, locals_) if crops is not None for view in levels(crops, batch, pictures)]
    rows, row = len(views[0]), max(view.shape[1] for view in views)
    height, width = GAP + rows * (row + GAP), GAP + sum(view.shape[2] + GAP for view in views)
    sheet = np.full((height, width, 3), BACKGROUND, np.uint8)
    left = GAP
    for view in views:
        side = view.shape[2]
        for number, picture in enumerate(view):
            top = GAP + number * (row + GAP)
            sheet[top : top + side, left : left + side] = picture
        left += side + GAP
    return sheet


def levels(crops: Tensor, batch: int, pictures: int) -> npt.NDArray[np.uint8]:
    """The 8-bit levels of the first `pictures`: normalised crops [V·batch, 3, S, S] to [V, pictures, S, S, 3]."""
    few = crops.detach().unflatten(0, (-1, batch))[:, :pictures].permute(0, 1, 3, 4, 2).to("cpu", torch.float32)
    scaled = (few * torch.tensor(STD) + torch.tensor(MEAN)) * 255
    return scaled.round_().clamp_(0, 255).to(torch.uint8).numpy()
