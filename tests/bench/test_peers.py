"""Other people's loaders do what their descriptions say, so that a comparison with ours is fair."""

import io
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bench.loader import NO_AUGMENT, to_levels
from bench.peer_views import Levels, crop_pillow
from bench.peers import Peer, find_peers, unpack
from pipelines.crops import CropRecipe
from pipelines.photometric import PhotometricRecipe
from shards.__main__ import main as make_shards
from shards.index import ShardIndex

CROPS = CropRecipe(global_size=48, global_scale=(0.4, 1.0), local_size=32, local_scale=(0.1, 0.4), locals=2)
BATCH = 4
PEERS = find_peers()

# DataLoader forks by default, and newer Pythons warn of that where other tests have left threads.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(params=PEERS.values(), ids=PEERS.keys())
def peer(request: pytest.FixtureRequest) -> Peer:
    return request.param


@pytest.fixture(autouse=True)
def fix_seeds() -> None:
    """They draw by torch's and Python's random numbers."""
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture(scope="module")
def ramps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose red rises from left to right with noise on it, whose green is 200 and whose blue is 30."""
    folder = tmp_path_factory.mktemp("ramps")
    for number in range(2 * BATCH):
        noise = np.random.default_rng(number).integers(-9, 10, (80, 100))
        red = np.linspace(10, 110, 100) + noise
        place = folder / f"class_{number % 2}"
        place.mkdir(exist_ok=True)
        image = np.stack([red, np.full_like(red, 200), np.full_like(red, 30)], -1).astype(np.uint8)
        Image.fromarray(image).save(place / f"{number}.png")
    return folder


def load_batches(peer: Peer, folder: Path, augment: PhotometricRecipe, count: int = 1) -> Iterator[list[Tensor]]:
    batches = peer.batches(folder, CROPS, augment, BATCH, 1)
    for _ in range(count):
        yield [view.cpu().clone() for view in next(batches)]
    batches.close()


def load_levels(peer: Peer, folder: Path, augment: PhotometricRecipe) -> list[Levels]:
    """One batch, 8-bit levels [B, S, S, 3] a view."""
    [views] = load_batches(peer, folder, augment)
    return [np.stack([to_levels(image) for image in view]).astype(int) for view in views]


def measure_slope(view: Levels) -> np.ndarray:
    """How much brighter each image's red is at its right than at its left, [B]."""
    half = view.shape[2] // 2
    return view[:, :, half:, 0].mean((1, 2)) - view[:, :, :half, 0].mean((1, 2))


def measure_roughness(view: Levels) -> float:
    """Mean difference of neighboring pixels' red, levels."""
    return float(np.abs(np.diff(view[..., 0], axis=1)).mean())


def test_batches_are_normalized_views_that_all_differ(peer: Peer, make_class_folders):
    folder = make_class_folders(classes=2, per_class=4)
    one, other = load_batches(peer, folder, PhotometricRecipe(), 2)
    for views in (one, other):
        assert [tuple(view.shape) for view in views] == [(BATCH, 3, size, size) for size in CROPS.sizes]
        for view in views:
            assert view.dtype == torch.float32
            assert view.isfinite().all()
            assert abs(view.mean()) < 1
            assert 0.4 < view.std() < 2
    for size in (CROPS.global_size, CROPS.local_size):
        images = torch.cat([view for view in (*one, *other) if view.shape[-1] == size]).flatten(1)
        assert len(torch.unique(images, dim=0)) == len(images)


def test_crops_alone_leave_the_levels_as_they_are(peer: Peer, ramps: Path):
    for view in load_levels(peer, ramps, NO_AUGMENT):
        assert np.abs(view[..., 1] - 200).max() <= 1
        assert np.abs(view[..., 2] - 30).max() <= 1
        assert (measure_slope(view) > 0).all()


def test_flip_in_all_views_and_solarize_in_the_second(peer: Peer, ramps: Path):
    chances = dict.fromkeys(("jitter", "grayscale", "blur_global_1", "blur_global_2", "blur_locals"), 0)
    views = load_levels(peer, ramps, PhotometricRecipe(flip=1, solarize_global_2=1, **chances))
    for number, view in enumerate(views):
        assert (measure_slope(view) < 0).all()
        assert np.abs(view[..., 1] - (55 if number == 1 else 200)).max() <= 1
        assert np.abs(view[..., 2] - 30).max() <= 1


def test_grayscale_in_all_views_and_blur_where_it_is_asked_for(peer: Peer, ramps: Path):
    chances = {"flip": 0, "jitter": 0, "grayscale": 1, "blur_global_1": 1, "blur_global_2": 0, "blur_locals": 0}
    augment = PhotometricRecipe(solarize_global_2=0, blur_sigma=(1.9, 2.0), **chances)
    views = load_levels(peer, ramps, augment)
    for view in views:
        assert (view.max(-1) - view.min(-1)).max() <= 1
    assert measure_roughness(views[0]) < 0.5 * measure_roughness(views[1])


def test_jitter_draws_for_every_view_and_keeps_to_its_strength(peer: Peer, ramps: Path):
    chances = dict.fromkeys(
        ("flip", "grayscale", "blur_global_1", "blur_global_2", "blur_locals", "solarize_global_2"), 0
    )
    augment = PhotometricRecipe(jitter=1, brightness=0.2, contrast=0, saturation=0, hue=0, **chances)
    factors = np.array([view[..., 1].mean((1, 2)) / 200 for view in load_levels(peer, ramps, augment)])
    assert (np.abs(factors - 1) < 0.21).all()
    assert len(np.unique(factors)) > factors.size / 2  # of 80 levels, two may well be one
    assert (factors.std(0) > 0.02).all()  # from view to view of an image
    assert (factors.std(1) > 0.02).all()  # from image to image


@pytest.mark.parametrize("window", [(0, 0, 70, 90), (11, 23, 40, 30), (5, 60, 24, 30)])
def test_a_given_window_is_nearly_pillows(peer: Peer, ramps: Path, window: tuple[int, int, int, int]):
    buffer = io.BytesIO()
    Image.open(next(ramps.rglob("*.png"))).save(buffer, "JPEG", quality=90)
    for size in (48, 32):
        exact = crop_pillow(buffer.getvalue(), window, size).astype(int)
        assert exact.shape == (size, size, 3)
        assert np.abs(peer.crop(buffer.getvalue(), window, size) - exact).mean() < 0.6


def test_unpacked_files_are_the_samples_in_their_classes(make_class_folders, tmp_path: Path):
    source = make_class_folders(classes=2, per_class=3)
    assert make_shards(["pack", str(source), str(tmp_path / "shards"), "--workers", "1"]) == 0
    with ShardIndex(tmp_path / "shards") as index:
        unpack(index, tmp_path / "files")
        for number, label in enumerate(index.labels):
            file = tmp_path / "files" / index.classes[label] / f"{number:08d}.jpeg"
            assert file.read_bytes() == index.read([number])[0]
    originals = sorted(path.read_bytes() for path in source.rglob("*.jpg"))
    assert sorted(path.read_bytes() for path in (tmp_path / "files").rglob("*.*")) == originals
