"""What tests of several folders share."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

# A busy machine must not decide a test.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# The small tensors of tests lose more to waking threads than they gain.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with the reason, where there is no GPU to run them on."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """torch compiles a function eight times at most, for all tests of a process together, and then runs it eagerly."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Features are kept in a folder of the tests, in commands that they start, too."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images beside the checkout; tests that ask for it are skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real images: {SHARED_DATA} is not there")
    return SHARED_DATA


def class_image(label: int, number: int, size: tuple[int, int]) -> Image.Image:
    """A smooth RGB image of `size` (width, height) pixels, alike within a label and different between numbers."""
    rng = np.random.default_rng([label, number])
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    waves = [np.sin((label + 1) * 5 * (x * rng.uniform(0.5, 1) + y) + rng.uniform(0, 6)) for _ in range(3)]
    return Image.fromarray((np.stack(waves, axis=-1) * 110 + 128).astype(np.uint8))


@pytest.fixture
def make_class_folders(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes `name/class_0/0000.jpg`, …: small JPEG files of various sizes; returns the folder."""

    def make(classes: int = 3, per_class: int = 4, name: str = "images", seed: int = 0) -> Path:
        for label in range(classes):
            folder = tmp_path / name / f"class_{label}"
            folder.mkdir(parents=True)
            for number in range(per_class):
                rng = np.random.default_rng([seed, label, number])
                width, height = (int(side) for side in rng.integers(32, 97, 2))
                class_image(label, number, (width, height)).save(folder / f"{number:04d}.jpg", quality=90)
        return tmp_path / name

    return make
