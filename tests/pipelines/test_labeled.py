import io

import numpy as np
import torch
from PIL import Image

from pipelines.labeled import CenterCrop, load_labeled_batches, resize_and_crop
from pipelines.photometric import MEAN, STD, Normalization
from shards.index import ShardIndex


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
