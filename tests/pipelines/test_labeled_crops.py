"""Labeled training batches against their definition, one image at a time, and RandAugment against torchvision's."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms import functional as published

from pipelines import rand_augment as ra
from pipelines.labeled_crops import LabeledCropLoader, LabeledCrops, draw_views
from pipelines.order import SampleOrder, WholeOrder
from pipelines.photometric import MEAN, STD
from shards.errors import UserError
from shards.index import ShardIndex
from tests.pipelines.test_crops import measure_ks_distance

CPU = torch.device("cpu")


SMALL = LabeledCrops(32)


def load(index: ShardIndex, order, steps=range(1), recipe=SMALL, rank=0, world=1, threads=2):
    loader = LabeledCropLoader(index, "shards", order, recipe, CPU, torch.float32, threads, rank, world)
    return list(loader.load_batches(steps))


def levels_of(images: torch.Tensor) -> np.ndarray:
    return ((images.permute(0, 2, 3, 1) * torch.tensor(STD) + torch.tensor(MEAN)) * 255).numpy()


def test_a_batch_is_what_pillow_makes_of_the_windows(index: ShardIndex):
    order = WholeOrder(len(index), 16, seed=3)
    [batch] = load(index, order, [4])
    assert batch.ids.tolist() == order.ids(4).tolist()
    assert batch.labels.tolist() == index.labels[batch.ids].tolist()
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    views = draw_views(LabeledCrops(32), 3, 1, batch.ids, index.heights[batch.ids], index.widths[batch.ids])
    assert 0 < views.flips.sum() < len(batch.ids)
    for place, (levels, sample) in enumerate(zip(levels_of(batch.images), index.read(batch.ids), strict=True)):
        image = Image.open(io.BytesIO(sample)).convert("RGB")
        expected = published.resized_crop(image, *views.windows[place].tolist(), [32, 32])  # Pillow's bilinear
        expected = published.hflip(expected) if views.flips[place] else expected
        assert np.abs(levels - np.asarray(expected)).mean() < 0.3


def test_windows_and_flips_have_torchvisions_distribution():
    count, height, width = 4000, 333, 500
    views = draw_views(LabeledCrops(), 3, 5, np.arange(count), np.full(count, height), np.full(count, width))
    torch.manual_seed(0)
    blank = torch.empty(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(blank, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(count)])
    for column in range(4):
        assert measure_ks_distance(views.windows[:, column], theirs[:, column]) < 1.95 * (2 / count) ** 0.5
    assert views.flips.mean() == pytest.approx(0.5, abs=0.03)


def test_batches_do_not_depend_on_where_a_run_starts_on_threads_or_on_the_number_of_ranks(index: ShardIndex):
    order = WholeOrder(len(index), 12, seed=1)
    recipe = LabeledCrops(24, rand_augment=9.0)
    whole = load(index, order, range(8), recipe, threads=1)
    for batch in load(index, order, range(5, 8), recipe, threads=3):
        assert torch.equal(batch.images, whole[batch.step].images)
    shares = [load(index, order, range(8), recipe, rank, world=5) for rank in range(5)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([share[step].images for share in shares]), batch.images)
        assert torch.equal(torch.cat([share[step].labels for share in shares]), batch.labels)


def test_each_epoch_has_other_crops_and_a_sample_the_same_in_any_batch(index: ShardIndex):
    def load_epoch(batch: int, epoch: int) -> dict[int, torch.Tensor]:
        order = WholeOrder(len(index), batch, 2)
        steps = order.steps_per_epoch
        loaded = load(index, order, range(epoch * steps, (epoch + 1) * steps))
        return {id: image for made in loaded for id, image in zip(made.ids.tolist(), made.images, strict=True)}

    small, large, later = load_epoch(5, 0), load_epoch(42, 0), load_epoch(42, 1)
    assert small.keys() == large.keys() == set(range(42))
    assert all(torch.equal(small[id], large[id]) for id in small)
    assert not any(torch.equal(later[id], small[id]) for id in small)


@settings(max_examples=30)
@given(samples=st.integers(1, 50), batch=st.integers(1, 60), world=st.integers(1, 5), epoch=st.integers(0, 9))
def test_a_whole_order_visits_every_sample_once_an_epoch(samples, batch, world, epoch):
    order = WholeOrder(samples, batch, seed=7)
    first = epoch * order.steps_per_epoch
    steps = range(first, first + order.steps_per_epoch)
    shares = [order.ids(step, rank, world) for step in steps for rank in range(world)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(samples))
    assert {order.epoch(step) for step in steps} == {epoch}
    if samples % batch == 0:
        assert np.array_equal(np.concatenate([SampleOrder(samples, batch, 7).ids(step) for step in steps]),
                              np.concatenate(shares))  # fmt: skip


def test_an_unreadable_sample_is_named(index: ShardIndex, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ShardIndex, "read", lambda self, ids: [b"no image" for _ in ids])
    with pytest.raises(UserError, match=r"shards: cannot read sample \d+ .*make-shards check shards"):
        load(index, WholeOrder(len(index), 8, 0))


@pytest.fixture
def photo() -> Image.Image:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:40, 0:40] / 40
    waves = [np.sin(rng.uniform(2, 7) * x + rng.uniform(2, 7) * y + phase) for phase in range(3)]
    return Image.fromarray((120 + 90 * np.stack(waves, -1)).astype(np.uint8))


@pytest.mark.parametrize("magnitude", [0, 3, 9, 10])
def test_operations_are_torchvisions(photo: Image.Image, magnitude: int):
    """Every image that torchvision draws is one of ours of the same strength, and all of ours are drawn."""
    theirs = v2.RandAugment(1, magnitude, 11, interpolation=v2.InterpolationMode.BILINEAR, fill=ra.FILL)
    ours = {
        (name, sign): np.asarray(operation(photo, sign * magnitude / 10))
        for name, operation in ra.OPERATIONS.items()
        for sign in ((1,) if name in ra.ONE_DIRECTION else (1, -1))
    }
    torch.manual_seed(0)
    found = set()
    for _ in range(200):
        drawn = np.asarray(theirs(photo))
        same = {key for key, image in ours.items() if np.abs(image.astype(int) - drawn).max() <= 1}
        assert same
        found |= same
    assert found == ours.keys()


def test_rand_augment_follows_its_draws(photo: Image.Image):
    place = list(ra.OPERATIONS).index("Brightness") + 0.5
    other = list(ra.OPERATIONS).index("Solarize") + 0.5
    count = len(ra.OPERATIONS)
    first, second = [0.1, place / count, 0.5, 0.9], [0.1, other / count, 0.5, 0.1]
    idle = [0.9, place / count, 0.5, 0.9]
    plain = np.asarray(photo)
    assert np.array_equal(ra.rand_augment(photo, 9, np.array(idle + idle)), plain)
    bright = ra.rand_augment(photo, 9, np.array(first + idle))
    assert np.array_equal(bright, ra.OPERATIONS["Brightness"](photo, 0.9))
    darker = ra.rand_augment(photo, 9, np.array([*first[:3], 0.1, *idle]))
    assert np.array_equal(darker, ra.OPERATIONS["Brightness"](photo, -0.9))
    both = ra.rand_augment(photo, 9, np.array(first + second))  # the second has one direction only
    assert np.array_equal(both, ra.OPERATIONS["Solarize"](bright, 0.9))
    spread = ra.rand_augment(photo, 9, np.array([0.1, place / count, 0.8413447460685429, 0.9, *idle]))  # one deviation
    assert np.array_equal(spread, ra.OPERATIONS["Brightness"](photo, 0.95))
