"""The mean and deviation of color channels are those of all pixels, and every image counts the same."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from shards.__main__ import main as make_shards
from shards.errors import UserError
from shards.index import ShardIndex
from shards.inspect.channels import measure_channels
from shards.inspect.rgb import decode_rgb


@pytest.fixture
def images(tmp_path: Path) -> list[np.ndarray]:
    """Write PNG files of several sizes, two of them gray (8 and 16 bits), and pack them. Return their levels in RGB."""
    folder, levels = tmp_path / "images", []
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(9):
        image = rng.integers(0, 40 + 25 * number, (20 + number, 30, 3), np.uint8)
        image[..., 2] //= 2
        Image.fromarray(image).save(folder / f"{number}.png")
        levels.append(image)
    gray = rng.integers(0, 256, (25, 25), np.uint8)
    Image.fromarray(gray).save(folder / "gray.png")
    deep = rng.integers(0, 65536, (25, 25), np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    for one in (gray, (deep >> 8).astype(np.uint8)):
        levels.append(np.repeat(one[..., None], 3, -1))
    assert make_shards(["pack", str(folder), str(tmp_path / "shards"), "--workers", "1"]) == 0
    return levels


def compute_directly(images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    shares = [image.astype(np.float64) / 255 for image in images]
    mean = np.mean([image.mean((0, 1)) for image in shares], 0)
    squares = np.mean([((image - mean) ** 2).mean((0, 1)) for image in shares], 0)
    return mean, np.sqrt(squares)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_figures_are_those_of_all_pixels(images: list[np.ndarray], tmp_path: Path, workers: int):
    with ShardIndex(tmp_path / "shards") as index:
        found = measure_channels(index, None, workers)
    mean, std = compute_directly(images)
    assert (found.images, found.unreadable) == (11, 0)
    assert np.abs(np.array(found.mean) - mean).max() <= 0.5001e-4
    assert np.abs(np.array(found.std) - std).max() <= 0.5001e-4


def test_the_command_prints_lines_of_a_recipe(images: list[np.ndarray], tmp_path: Path, capsys):
    report = tmp_path / "stats.json"
    capsys.readouterr()
    assert make_shards(["stats", str(tmp_path / "shards"), "--workers", "1", "--report", str(report)]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "11 images; put these lines into the recipe:"
    data, written = yaml.safe_load("\n".join(lines))["data"], json.loads(report.read_text())
    assert data == {"mean": written["mean"], "std": written["std"]}
    assert np.abs(np.array(data["mean"]) - compute_directly(images)[0]).max() <= 0.5001e-4


def test_some_images_are_spread_over_the_set(images: list[np.ndarray], tmp_path: Path):
    with ShardIndex(tmp_path / "shards") as index:
        assert measure_channels(index, 3, 1).images == 3
        assert measure_channels(index, 3, 1) != measure_channels(index, 4, 1)
        assert measure_channels(index, 100, 1) == measure_channels(index, None, 1)


def test_damaged_images_are_left_out_and_said(images: list[np.ndarray], tmp_path: Path, capsys):
    with ShardIndex(tmp_path / "shards") as index:
        offset = int(index.records["offset"][0])
    tar = tmp_path / "shards" / "train-000000.tar"
    damaged = bytearray(tar.read_bytes())
    damaged[offset : offset + 8] = b"notapng!"
    tar.write_bytes(damaged)
    capsys.readouterr()
    assert make_shards(["stats", str(tmp_path / "shards"), "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("10 images; ")
    assert "1 image could not be decoded. Run `make-shards check`" in out


def test_storage_that_does_not_answer_is_no_damaged_image(images: list[np.ndarray], tmp_path: Path):
    with ShardIndex(tmp_path / "shards") as index:
        (tmp_path / "shards" / "train-000000.tar").unlink()
        with pytest.raises(UserError, match=r"No such file or directory\. Check the storage"):
            decode_rgb(index, 0)


def test_a_channel_without_change_is_said(tmp_path: Path, capsys):
    (tmp_path / "images").mkdir()
    for number in range(2):
        Image.new("RGB", (20, 20), (100 * number, 10, 0)).save(tmp_path / "images" / f"{number}.png")
    assert make_shards(["pack", str(tmp_path / "images"), str(tmp_path / "shards"), "--workers", "1"]) == 0
    capsys.readouterr()
    assert make_shards(["stats", str(tmp_path / "shards"), "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "mean: [0.1961, 0.0392, 0.0]" in out
    assert "std: [0.1961, 0.0, 0.0]" in out
    assert "All pixels have the same green." in out
    assert "the same red" not in out
