"""The sheet of crops: levels and places, from tensors made by hand and from the loader."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_fast.run.crop_sheet import BACKGROUND, GAP, save_crop_sheet
from pipelines.crops import CropRecipe, draw_windows
from pipelines.decode_torch import crop, decode
from pipelines.loader import DataRecipe, Loader
from pipelines.photometric import MEAN, STD, PhotometricRecipe, normalize
from shards.errors import UserError
from shards.index import ShardIndex

BATCH, VIEWS, SIDES = 5, (2, 3), (32, 24)


def _images() -> list[torch.Tensor]:
    """8-bit crops [V·BATCH, S, S, 3], view-major, globals and locals; the first rows go through all levels."""
    r = torch.Generator().manual_seed(0)
    made = []
    for views, side in zip(VIEWS, SIDES, strict=True):
        made.append(torch.randint(0, 256, (views * BATCH, side, side, 3), dtype=torch.uint8, generator=r))
        made[-1].view(views * BATCH, -1)[:, :768] = torch.arange(256, dtype=torch.uint8).repeat_interleave(3)
    return made


def _normalized(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As the loader hands them over: [N, 3, S, S], channels-last."""
    out = torch.empty(images.shape, dtype=dtype).permute(0, 3, 1, 2)
    normalize(images, out)
    return out


def _read(path: Path) -> np.ndarray:
    with Image.open(path) as sheet:
        assert (sheet.format, sheet.mode) == ("PNG", "RGB")
        return np.array(sheet)


def _cut(sheet: np.ndarray, row: int, view: int) -> np.ndarray:
    """The crop of a view of the image in a row; what is cut out is set to the background."""
    globals_, (large, small) = VIEWS[0], SIDES
    before = min(view, globals_) * (large + GAP) + max(0, view - globals_) * (small + GAP)
    side = large if view < globals_ else small
    part = sheet[GAP + row * (large + GAP) :, GAP + before :][:side, :side]
    found = part.copy()
    part[:] = BACKGROUND
    return found


# Levels lie 0.0171 or more apart, and bfloat16 rounds values below 4 by 0.0078 at most: not quite half of that.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [3, 8])
def test_levels_come_back_where_they_belong(tmp_path: Path, dtype: torch.dtype, count: int) -> None:
    images = _images()
    path = tmp_path / "crops.png"
    save_crop_sheet(path, *(_normalized(crops, dtype) for crops in images), batch=BATCH, images=count)
    sheet, rows = _read(path), min(count, BATCH)
    assert sheet.shape == (GAP + rows * (32 + GAP), GAP + 2 * (32 + GAP) + 3 * (24 + GAP), 3)
    by_view = [crops.unflatten(0, (-1, BATCH)) for crops in images]
    for row in range(rows):
        expected = [view[row] for crops in by_view for view in crops]
        for view, levels in enumerate(expected):
            assert np.array_equal(_cut(sheet, row, view), levels.numpy())
    assert (sheet == BACKGROUND).all()  # nothing else is on it
    assert list(tmp_path.iterdir()) == [path]


def test_without_local_crops_a_row_has_two(tmp_path: Path) -> None:
    globals_ = _images()[0]
    save_crop_sheet(tmp_path / "crops.png", _normalized(globals_, torch.float32), None, BATCH)
    sheet = _read(tmp_path / "crops.png")
    assert sheet.shape == (GAP + BATCH * (32 + GAP), GAP + 2 * (32 + GAP), 3)
    assert np.array_equal(_cut(sheet, 4, 1), globals_[BATCH + 4].numpy())


def test_values_out_of_range_are_the_nearest_levels(tmp_path: Path) -> None:
    globals_ = torch.full((2, 3, 24, 24), -9.0)
    globals_[1] = 9
    save_crop_sheet(tmp_path / "crops.png", globals_, None, 1)
    sheet = _read(tmp_path / "crops.png")
    assert (sheet[GAP:-GAP, GAP : GAP + 24] == 0).all()
    assert (sheet[GAP:-GAP, 2 * GAP + 24 : -GAP] == 255).all()


CROPS = CropRecipe(global_size=48, local_size=32, locals=3)
PLAIN = PhotometricRecipe(
    flip=0, jitter=0, grayscale=0, blur_global_1=0, blur_global_2=0, blur_locals=0, solarize_global_2=0
)


@pytest.mark.parametrize("colors", [PLAIN, PhotometricRecipe()])
def test_through_the_loader_it_is_what_the_networks_see(
    labeled_shards: Path, tmp_path: Path, colors: PhotometricRecipe
) -> None:
    with ShardIndex(labeled_shards) as index:
        loader = Loader(
            index, DataRecipe(threads=1), CROPS, colors, batch=6, seed=3, device=torch.device("cpu"),
            dtype=torch.float32,
        )  # fmt: skip
        (batch,) = loader.batches(2, 3)
        save_crop_sheet(tmp_path / "crops.png", batch.globals, batch.locals, len(batch.ids), images=4)
        sheet = _read(tmp_path / "crops.png").astype(float)
        epoch, sizes = loader.order.epoch(2), (index.heights[batch.ids], index.widths[batch.ids])
        places = draw_windows(CROPS, 3, epoch, batch.ids, *sizes)
        for row, id in enumerate(batch.ids[:4]):
            left = GAP
            for view, side in enumerate(CROPS.sizes):
                cut = sheet[GAP + row * (48 + GAP) :, left:][:side, :side]
                left += side + GAP
                views, number = (batch.globals, view) if view < 2 else (batch.locals, view - 2)
                given = views[number * 6 + row].double().permute(1, 2, 0).numpy()
                assert np.abs(cut - (given * STD + MEAN) * 255).max() < 1e-3
                if colors is PLAIN:  # the image itself, cut by nothing of the loader's
                    window = tuple(places[view, row].tolist())
                    levels = crop(decode(index.read([id])[0]), window, side).permute(1, 2, 0)
                    assert np.array_equal(cut, levels.numpy())


def test_a_batch_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    globals_, locals_ = (_normalized(crops, torch.float32) for crops in _images())
    for given in ((globals_, locals_, 10), (globals_, locals_, 1), (globals_, locals_[:-1], 5)):
        with pytest.raises(ValueError, match=r"global crops and .* local ones are not those of"):
            save_crop_sheet(tmp_path / "crops.png", *given)
    assert not list(tmp_path.iterdir())


def test_a_refused_write_leaves_the_sheet_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, globals_ = tmp_path / "crops.png", _normalized(_images()[0], torch.float32)
    save_crop_sheet(path, globals_, None, BATCH)
    before = path.read_bytes()

    def full(self: Image.Image, file: Path, kind: str) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match=r"cannot write .*crops\.png: No space left"):
        save_crop_sheet(path, globals_, None, BATCH)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before
    with pytest.raises(UserError, match=r"cannot write .*no/crops\.png"):
        save_crop_sheet(tmp_path / "no" / "crops.png", globals_, None, BATCH)
