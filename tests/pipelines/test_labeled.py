import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines.labeled import CenterCrop, load_labeled_batches, resize_and_crop
from pipelines.photometric import MEAN, STD, Normalization
from shards.errors import UserError
from shards.index import ShardIndex

CPU = torch.device("cpu")


def resize_and_crop_by_pillow(image: Image.Image, resize: int, crop: int) -> np.ndarray:
    """Resize the short side and cut out the center square, as torchvision's transforms do with a Pillow image."""
    from torchvision import transforms

    chain = transforms.Compose([
        transforms.Resize(resize, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(crop)
    ])  # fmt: skip
    return np.asarray(chain(image))


def test_batches_are_every_sample_once_in_order(index: ShardIndex):
    batches = list(load_labeled_batches(index, 16, CenterCrop(36, 32), threads=2))
    assert [len(labels) for _, labels in batches] == [16, 16, 10]
    assert torch.equal(torch.cat([labels for _, labels in batches]), torch.from_numpy(index.labels.astype(np.int64)))
    images = torch.cat([images for images, _ in batches])
    assert images.is_contiguous(memory_format=torch.channels_last)
    for place, sample in enumerate(index.read(range(len(index)))):
        expected = resize_and_crop_by_pillow(Image.open(io.BytesIO(sample)), 36, 32)
        levels = (images[place].permute(1, 2, 0) * torch.tensor(STD) + torch.tensor(MEAN)) * 255
        assert np.abs(levels.numpy() - expected).mean() < 0.3


def test_batches_are_normalized_as_told(index: ShardIndex):
    [(plain, _)] = list(load_labeled_batches(index, 100, CenterCrop(36, 32), 2))
    [(told, _)] = list(load_labeled_batches(index, 100, CenterCrop(36, 32, Normalization((0, 0, 0), (1, 1, 1))), 2))
    levels = told.permute(0, 2, 3, 1) * 255
    assert (levels - levels.round()).abs().max() < 1e-3
    assert (levels - (plain.permute(0, 2, 3, 1) * torch.tensor(STD) + torch.tensor(MEAN)) * 255).abs().max() < 1e-3


def test_strips_do_not_become_huge():
    rng = np.random.default_rng(0)
    strip = rng.integers(0, 255, (6, 3000, 3), np.uint8)
    ours = resize_and_crop(torch.from_numpy(strip).permute(2, 0, 1), 64, 56).numpy().astype(int)
    theirs = resize_and_crop_by_pillow(Image.fromarray(strip), 64, 56)
    assert ours.shape == (56, 56, 3)
    assert np.abs(ours - theirs).mean() < 3  # the long side's scale is rounded from another length


def test_an_image_smaller_than_the_crop_is_scaled_up():
    tiny = torch.randint(0, 255, (3, 3, 7), dtype=torch.uint8)
    assert resize_and_crop(tiny, 36, 32).shape == (32, 32, 3)


def test_dali_makes_the_images_of_torch(index: ShardIndex):
    """By a third of a level on average. Two batches of 16, and one of those that are left."""
    dali = pytest.importorskip("pipelines.labeled_dali")
    ids = np.arange(len(index))[::-1].copy()
    for center in CenterCrop(36, 32), CenterCrop(90, 64, Normalization((0, 0, 0), (1, 1, 1))):
        theirs = [images for images, _ in load_labeled_batches(index, 16, center, 2, ids)]
        ours = [images.clone() for images in dali.load_dali_batches(index, 16, center, 2, ids, CPU)]
        assert [len(images) for images in ours] == [len(images) for images in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one.is_contiguous(memory_format=torch.channels_last)
            std = torch.tensor(center.normalization.std)[:, None, None]
            levels = ((one - other) * std * 255).abs()
            assert levels.mean() < 0.35
            assert levels.mean((1, 2, 3)).max() < 1


@given(height=st.integers(1, 4000), width=st.integers(1, 4000), resize=st.integers(16, 300), share=st.floats(0.3, 1))
def test_dali_is_told_the_sizes_of_torch(height: int, width: int, resize: int, share: float):
    dali = pytest.importorskip("pipelines.labeled_dali")
    crop = max(1, int(resize * share))
    rows = torch.arange(height, dtype=torch.float32)[None, :, None].expand(1, height, width)
    box, size, start = (
        part[0].tolist() for part in dali.compute_geometry(np.array([[height, width]]), CenterCrop(resize, crop))
    )
    from torchvision.transforms.v2 import functional as F

    kept = [box[2] - box[0], box[3] - box[1]]
    assert max(kept) <= 8 * min(kept)
    assert kept == [min(height, 8 * min(height, width)), min(width, 8 * min(height, width))]
    assert F.center_crop(rows, kept)[0, 0, 0] == box[0]
    resized = F.resize(torch.empty(1, *kept, device="meta"), [resize]).shape[1:]
    assert size == list(resized)
    numbers = torch.arange(size[0] * size[1]).view(1, *size)
    corner = int(F.center_crop(numbers, [crop, crop])[0, 0, 0])
    assert start == [corner // size[1], corner % size[1]]


def test_an_image_that_dali_cannot_decode_is_named(index: ShardIndex, tmp_path: Path):
    dali = pytest.importorskip("pipelines.labeled_dali")
    shutil.copytree(index.folder, tmp_path / "shards")
    with ShardIndex(tmp_path / "shards") as broken:
        record = broken.records[5]
        shard = tmp_path / "shards" / broken.manifest.shards[int(record["shard"])].file
        data = bytearray(shard.read_bytes())
        data[int(record["offset"]) + 40 : int(record["offset"]) + 80] = bytes(40)
        shard.write_bytes(data)
        with pytest.raises((UserError, RuntimeError), match="sample 5"):
            list(dali.load_dali_batches(broken, 16, CenterCrop(36, 32), 2, np.arange(len(broken)), CPU))
