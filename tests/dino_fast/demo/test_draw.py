"""The drawn image set is a pure function of its arguments, and color tells nothing about the class."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_fast.demo import draw
from shards.errors import UserError

CLASSES = list(draw.PATTERNS)


def hash_images(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.jpg")}


def draw_one(label: int, number: int) -> Image.Image:
    return draw.draw_image(CLASSES[label], np.random.default_rng([7, label, number]))


def score_nearest_neighbors(train: np.ndarray, val: np.ndarray, k: int = 15) -> float:
    """Return the share of val [C, M, F] whose class gets most votes of the k nearest of train [C, N, F]."""
    classes, count, width = train.shape
    mean, spread = train.mean((0, 1)), train.std((0, 1))
    base, asked = ((x.reshape(-1, width) - mean) / spread for x in (train, val))
    distance = ((asked[:, None] - base[None]) ** 2).sum(-1)
    votes = np.argsort(distance, axis=1)[:, :k] // count
    chosen = np.array([np.bincount(row, minlength=classes).argmax() for row in votes])
    return float((chosen == np.arange(classes).repeat(val.shape[1])).mean())


def test_the_same_arguments_give_the_same_files_and_counts_change_no_image(tmp_path: Path) -> None:
    few = hash_images(draw.draw_dataset(tmp_path / "few", 2, 1, seed=3))
    again = hash_images(draw.draw_dataset(tmp_path / "again", 2, 1, seed=3))
    more = hash_images(draw.draw_dataset(tmp_path / "more", 3, 2, seed=3))
    other = hash_images(draw.draw_dataset(tmp_path / "other", 2, 1, seed=4))
    assert few == again
    assert few.items() <= more.items()
    assert not set(few.values()) & set(other.values())
    assert len(set(more.values())) == len(more) == len(CLASSES) * 5


def test_folders_counts_and_sizes(tmp_path: Path) -> None:
    folder = draw.draw_dataset(tmp_path / "set", 4, 2, seed=0)
    assert len(CLASSES) >= 10
    for split, count in (("train", 4), ("val", 2)):
        assert sorted(p.name for p in (folder / split).iterdir()) == CLASSES
        assert all(len(list((folder / split / name).glob("*.jpg"))) == count for name in CLASSES)
    sizes = []
    for path in folder.rglob("*.jpg"):
        with Image.open(path) as image:
            image.load()
            assert (image.format, image.mode) == ("JPEG", "RGB")
            sizes.append(image.size)
    sides = np.array(sizes)
    assert sides.min() >= 80
    assert sides.max() <= 180
    assert len(set(sizes)) > len(sizes) // 2
    assert (sides[:, 0] > sides[:, 1]).any()
    assert (sides[:, 0] < sides[:, 1]).any()


def test_a_finished_drawing_is_kept_and_another_replaces_it(tmp_path: Path) -> None:
    calls: list[int] = []
    draw.draw_dataset(tmp_path / "set", 1, 1, seed=0, progress=lambda: calls.append(1))
    assert len(calls) == 2 * len(CLASSES)
    draw.draw_dataset(tmp_path / "set", 1, 1, seed=0, progress=lambda: calls.append(1))
    assert len(calls) == 2 * len(CLASSES)
    draw.draw_dataset(tmp_path / "set", 2, 1, seed=0)
    assert len(hash_images(tmp_path / "set")) == 3 * len(CLASSES)


def test_an_interrupted_drawing_does_not_count_as_finished(tmp_path: Path) -> None:
    left = iter(range(5))

    def stop() -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw.draw_dataset(tmp_path / "set", 1, 1, seed=0, progress=stop)
    assert not (tmp_path / "set").exists()
    whole = draw.draw_dataset(tmp_path / "set", 1, 1, seed=0)
    assert len(hash_images(whole)) == 2 * len(CLASSES)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_folders_of_somebody_else_and_wrong_counts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_bytes(b"precious")
    (tmp_path / "file").write_text("not a folder")
    for name in ("mine", "file", "file/below"):
        with pytest.raises(UserError, match=name):
            draw.draw_dataset(tmp_path / name, 1, 1, seed=0)
    assert (tmp_path / "mine" / "photo.jpg").read_bytes() == b"precious"
    with pytest.raises(ValueError, match="counts must be 1 or more"):
        draw.draw_dataset(tmp_path / "set", 0, 1, seed=0)


def test_color_tells_nothing_about_the_class() -> None:
    """Mean and spread of red, green and blue classify at most twice as many images as chance does."""
    images = [[np.asarray(draw_one(label, n), np.float64) for n in range(40)] for label in range(len(CLASSES))]
    features = np.array([[np.concatenate([p.mean((0, 1)), p.std((0, 1))]) for p in row] for row in images])
    chance = 1 / len(CLASSES)
    assert score_nearest_neighbors(features[:, :28, :3], features[:, 28:, :3]) < 2 * chance
    assert score_nearest_neighbors(features[:, :28], features[:, 28:]) < 2 * chance


@pytest.mark.parametrize("name", CLASSES)
def test_a_pattern_has_shape_and_ground_in_every_image(name: str) -> None:
    """Neither the shape nor its ground may vanish: a class nobody can see would be noise in the labels."""
    for number in range(20):
        rng = np.random.default_rng(number)
        u, v, _ = draw._make_coordinates(160, 140, rng)
        inside = draw.PATTERNS[name](u, v, rng)
        assert inside.shape == (140, 160)
        assert inside.dtype == np.float32
        assert 0.08 < (inside > 0).mean() < 0.92
