"""Machines and containers that give a process little: each command is a process of its own."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.__main__ import main as make_shards
from tests.dino_fast.conftest import ROOT, TINY

SHARDS = 80
LIMIT = 64  # files that a process may have open


def write_images(folder: Path) -> None:
    folder.mkdir()
    for number in range(SHARDS):
        levels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(levels).save(folder / f"{number}.jpg")


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder that every user may read, with `images`, and `shards` of one image each."""
    folder = Path(tempfile.mkdtemp(prefix="dino-fast-reports-"))
    write_images(folder / "images")
    arguments = ["pack", str(folder / "images"), str(folder / "shards"), "--shard-size", "1", "--workers", "1"]
    assert make_shards(arguments) == 0
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield folder
    shutil.rmtree(folder)


def run(through: Sequence[str], module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of ours through another one, with nothing but this in its environment."""
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [*through, sys.executable, "-W", "error::UserWarning", "-m", module, *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)


def can_run(*command: str) -> bool:
    return bool(shutil.which(command[0])) and subprocess.run(command, capture_output=True).returncode == 0


FEW_FILES = ("sh", "-c", f'ulimit -n {LIMIT}; exec "$@"', "sh")
TINY_SHM = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "sh")
# Another user, who may read all files: Python itself may lie in a folder of the user of the tests.
READ_ALL = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
STRANGER = ("setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups", *READ_ALL)


@pytest.fixture(scope="module")
def stranger() -> tuple[str, ...]:
    """What starts a command as a user without a name, whose home is not there."""
    if not can_run(*STRANGER, "true"):
        pytest.skip("processes of another user cannot be started here")
    return STRANGER


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """An empty folder into which every user may write."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


@pytest.fixture(scope="module")
def hindered_run(place: Path) -> subprocess.CompletedProcess[str]:
    """A run with all hindrances that can be made here: one process, because it takes long to start."""
    hindrances = (*(way for way in (TINY_SHM, STRANGER) if can_run(*way, "true")), FEW_FILES)
    through = [word for way in hindrances for word in way]
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        where = ("--data.train", str(place / "shards"), "--output", f"{folder}/run", "--max_steps", "1")
        return run(through, "dino_fast.train", *TINY, *where, "--batch_size", str(SHARDS))


def assert_trained(result: subprocess.CompletedProcess[str]) -> None:
    assert (result.returncode, result.stderr) == (0, "")
    assert "step 1/1" in result.stdout


def test_a_run_needs_few_open_files(hindered_run: subprocess.CompletedProcess[str]):
    """pytorch #973: "received 0 items of ancdata", "Too many open files". Here a batch comes from 80 shards."""
    assert_trained(hindered_run)


def test_a_run_needs_no_shared_memory(hindered_run: subprocess.CompletedProcess[str]):
    """pytorch #5040: "Bus error", where a container gives workers little shared memory. Here threads load."""
    if not can_run(*TINY_SHM, "true"):
        pytest.skip("a small /dev/shm cannot be mounted here")
    assert_trained(hindered_run)


def test_a_user_without_a_name_or_home_trains_from_read_only_shards(
    hindered_run: subprocess.CompletedProcess[str], stranger: tuple[str, ...]
):
    """pytorch #140765: "getpwuid(): uid not found" in containers. Others write caches beside the data."""
    assert_trained(hindered_run)


def test_a_user_without_a_name_or_home_packs_read_only_images(
    place: Path, open_folder: Path, stranger: tuple[str, ...]
):
    """The same for packing."""
    packed = run(stranger, "shards", "pack", str(place / "images"), f"{open_folder}/shards", "--workers", "1")
    assert (packed.returncode, packed.stderr) == (0, "")
    assert f"{SHARDS} images, no labels, 1 shard" in packed.stdout


@pytest.mark.parametrize("command", ["check", "stats"])
def test_other_commands_need_few_open_files(place: Path, command: str):
    """An image that could not be opened was counted as one that cannot be decoded."""
    result = run(FEW_FILES, "shards", command, str(place / "shards"), "--workers", "1")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"{SHARDS} images" in result.stdout
    assert "could not be decoded" not in result.stdout
