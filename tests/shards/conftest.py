"""Images, packed folders and the real command, for the tests of shards/."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.packing.plan import Options
from tests.shards.packing_helpers import pack_tree

ROOT = Path(__file__).resolve().parents[2]


def noise(seed: int, width: int, height: int) -> Image.Image:
    """An image that compresses badly, so that a few of them fill a shard."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def tree_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two class folders with JPEG, PNG and WebP files, three that do not decode, a GIF, and a text file."""
    root = tmp_path_factory.mktemp("tree") / "src"
    for label, name in enumerate(("cat", "dog")):
        folder = root / name / "deep"
        folder.mkdir(parents=True)
        for number in range(10):
            image = noise(100 * label + number, 20 + number, 30 - number)
            image.save(folder / f"{number}.{('jpg', 'png', 'webp')[number % 3]}")
    noise(1, 9, 9).save(root / "cat" / "is png.v2.JPEG", "PNG")
    whole = (root / "cat" / "deep" / "0.jpg").read_bytes()
    (root / "cat" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "dog" / "empty.png").write_bytes(b"")
    (root / "dog" / "text.JPEG").write_text("<html>")
    noise(2, 8, 8).save(root / "dog" / "moving.gif")
    (root / "LICENSE").write_text("as you like")
    (root / ".hidden.jpg").write_bytes(whole)
    return root


@pytest.fixture(scope="session")
def packed_once(tree_once: Path) -> Path:
    """`tree_once` packed into several shards."""
    out = tree_once.parent / "packed"
    pack_tree(tree_once, out, Options(seed=5, shard_size=12_000))
    return out


@pytest.fixture
def tree(tree_once: Path, tmp_path: Path) -> Path:
    """A copy of `tree_once` that a test may spoil."""
    return Path(shutil.copytree(tree_once, tmp_path / "src"))


@pytest.fixture
def packed(packed_once: Path, tmp_path: Path) -> Path:
    """A copy of `packed_once` that a test may spoil."""
    return Path(shutil.copytree(packed_once, tmp_path / "packed"))


@pytest.fixture
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the real make-shards with the given arguments, through another command where one is given."""

    def run(*arguments: str | Path, through: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        call = [*through, sys.executable, "-m", "shards", *map(str, arguments)]
        return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=120)

    return run


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Everything in a folder, hidden files included, by relative path."""

    def read(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    return read


@pytest.fixture
def ordinary() -> list[str]:
    """What to run a command through so that file permissions count, which root passes over."""
    if os.geteuid() != 0:
        return []
    through = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    if not shutil.which("setpriv") or subprocess.run([*through, "true"], capture_output=True).returncode:
        pytest.skip("root passes over permissions, and setpriv cannot take that away here")
    return through
