from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.__main__ import main as make_shards
from shards.index import ShardIndex


def write_images(folder: Path, classes: int = 3, per_class: int = 14) -> None:
    """Write class folders of JPEG files of 40 to 200 pixels a side, with smooth colors and some noise."""
    for label in range(classes):
        (folder / f"class_{label}").mkdir(parents=True)
        for number in range(per_class):
            rng = np.random.default_rng([label, number])
            height, width = rng.integers(40, 200, 2)
            y, x = np.mgrid[0:height, 0:width][..., None] / 60
            waves = 128 + 90 * np.sin(rng.uniform(0.5, 4, 3) * x + rng.uniform(0.5, 4, 3) * y + rng.uniform(0, 6, 3))
            noisy = (waves + rng.normal(0, 6, waves.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / f"class_{label}" / f"{number:03d}.jpg", quality=92)


@pytest.fixture(scope="session")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """42 images in three classes, packed into several shards. Not to be changed."""
    folder = tmp_path_factory.mktemp("packed")
    write_images(folder / "images")
    arguments = ["pack", str(folder / "images"), str(folder / "shards"), "--shard-size", "100kB", "--workers", "1"]
    assert make_shards(arguments) == 0
    return folder / "shards"


@pytest.fixture
def index(shard_folder: Path) -> ShardIndex:
    with ShardIndex(shard_folder) as index:
        yield index
