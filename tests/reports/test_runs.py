"""What happens to a run between its start and its end, and between two processes of it."""

import itertools
import json
import multiprocessing.process
import os
import shutil
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_fast import checkpoint
from dino_fast.config import read_recipe
from dino_fast.train import main
from shards.__main__ import main as make_shards
from tests.dino_fast.conftest import labeled_shards, train_here

__all__ = ["labeled_shards", "train_here"]  # the fixtures, which serve here, too

ODD_NAME = "my data, Größe 2 $HOME 'x' 🙂"


def read_rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_another_length_or_batch_is_refused_with_both_values(train_here, tmp_path: Path, capsys):
    """mlfoundations/open_clip #413: more epochs on resume, and the learning rate jumps without a word."""
    assert train_here(tmp_path / "run", "--max_steps", "1") == 0
    capsys.readouterr()
    assert train_here(tmp_path / "run", "--max_steps", "2", "--epochs", "8", "--batch_size", "10") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "batch_size: 8 -> 10" in line
    assert "epochs: 4 -> 8" in line
    assert [row["step"] for row in read_rows(tmp_path / "run")] == [0]


def test_a_run_and_its_data_may_be_moved(
    train_here, labeled_shards: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    """Paths with blanks, quotes and letters of other alphabets; links; and relative paths from another folder.

    Lightning and others: absolute paths in checkpoints, of which the old ones are looked for.
    """
    assert train_here(tmp_path / "run", "--max_steps", "1") == 0
    (tmp_path / "disk" / ODD_NAME).mkdir(parents=True)
    shutil.move(tmp_path / "run", tmp_path / "disk" / ODD_NAME / "run")
    shutil.copytree(labeled_shards, tmp_path / "disk" / ODD_NAME / "shards")
    (tmp_path / "link").symlink_to(Path("disk", ODD_NAME))
    monkeypatch.chdir(tmp_path / "disk")
    capsys.readouterr()
    assert train_here(Path("../link/run"), "--max_steps", "2", "--data.train", "../link/shards") == 0
    assert "resumed from step 1" in capsys.readouterr().out
    assert [row["step"] for row in read_rows(tmp_path / "link" / "run")] == [0, 1]


def test_weights_to_start_from_are_for_new_runs(train_here, tmp_path: Path, capsys):
    """A resumed run goes on from its checkpoint, and says so where it began with other weights than the flag names."""
    for output, flags in [("first", []), ("second", ["--init_from", str(tmp_path / "first")])]:
        assert train_here(tmp_path / output, "--max_steps", "1", *flags) == 0
    capsys.readouterr()
    for name, is_told in [("first", False), ("elsewhere", True)]:
        flags = ["--max_steps", "1", "--init_from", str(tmp_path / name)]
        assert train_here(tmp_path / "second", *flags) == 0
        assert (f"--init_from {tmp_path / name} was not read" in capsys.readouterr().out) == is_told


def test_the_newest_checkpoint_is_that_of_the_latest_step(tmp_path: Path):
    """Copying and clocks that jump change the times of files, by which others choose a checkpoint."""
    for step in (90, 100, 1000):
        checkpoint.save(tmp_path, step, {"model": {"teacher": {"weight": torch.zeros(1)}}, "recipe": {}})
    for age, path in enumerate(checkpoint.list_checkpoints(tmp_path)):
        os.utime(path, (10**9 - age * 10**6,) * 2)
    state, damaged = checkpoint.load_newest(tmp_path)
    assert (state["step"], damaged) == (1000, [])


@pytest.fixture
def jumping_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of day, which goes back a day at each look, as no clock that is set right does."""
    days = itertools.count()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 86_400 * next(days))


def test_a_clock_that_is_set_back_changes_no_figure(train_here, tmp_path: Path, capsys, jumping_clock: None):
    """tensorpack #741: a negative time ends the training; open-mmlab/mmaction2 #700: "ETA -1 day"."""
    assert train_here(tmp_path / "run", "--max_steps", "2") == 0
    for row in read_rows(tmp_path / "run"):
        assert 0 < row["images_per_s"] < 10_000
        assert 0 < row["seconds"] < 600
        assert 0 <= row["stall"] <= 1
    assert "ETA -" not in capsys.readouterr().out


@pytest.fixture
def no_network_and_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a connection is opened or a process is started."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError(f"refused: {arguments} {options}")

    for place, name in (
        (socket.socket, "connect"), (socket, "getaddrinfo"), (subprocess, "Popen"), (os, "fork"), (os, "posix_spawn"),
        (multiprocessing.process.BaseProcess, "start"),
    ):  # fmt: skip
        monkeypatch.setattr(place, name, refuse)


def test_a_run_needs_no_network_and_leaves_no_process_behind(
    train_here, tmp_path: Path, no_network_and_no_processes: None
):
    """Nodes without a network: others download weights at the start.

    pytorch #8805, Lightning #9894: workers outlive a run that was killed, and hold its memory. Here there are none.
    """
    assert train_here(tmp_path / "run", "--max_steps", "1") == 0


THEIRS = {
    "checkpoint.pth": b"not ours",
    "step-00000007.pt": b"not ours either",
    "log.txt": b'{"train_loss": 11.0}\n',
    "tensorboard/events.out.tfevents.1.theirs": b"",
}


def test_other_files_in_the_output_are_neither_read_nor_changed(train_here, tmp_path: Path):
    """facebookresearch/dino: `checkpoint.pth` of an output folder is loaded, whatever it is (see #65)."""
    for name, data in THEIRS.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(data)
    assert train_here(tmp_path / "run", "--max_steps", "1") == 0
    assert {name: (tmp_path / "run" / name).read_bytes() for name in THEIRS} == THEIRS


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_what_is_written_has_the_permissions_that_the_umask_leaves(
    umask: Callable[[int], int], make_class_folders: Callable[..., Path], tmp_path: Path, mask: int, mode: int
):
    """huggingface/datasets #2157 (#2065): files that only their owner can read, because they were temporary first."""
    source = make_class_folders(classes=2, per_class=2)
    umask(mask)
    assert make_shards(["pack", str(source), str(tmp_path / "shards"), "--workers", "1"]) == 0
    checkpoint.save(tmp_path / "shards", 1, {"model": {}, "recipe": {}})
    files = list((tmp_path / "shards").iterdir())
    assert len(files) == 6
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == dict.fromkeys((p.name for p in files), mode)


class UnreachableRun:
    """A run of W&B's whose server does not answer."""

    id = "made"
    config = types.SimpleNamespace(update=lambda *_, **__: None)

    def define_metric(self, *_: object, **__: object) -> None: ...

    def log(self, row: dict[str, Any]) -> None:
        raise ConnectionError("Network error (ConnectTimeout), entering retry loop")

    finish = log


def test_a_server_of_figures_that_does_not_answer_does_not_end_a_run(
    train_here, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    """wandb #4217: offline, and a run is held after four hours; here also where W&B raises something."""
    stub: Any = types.ModuleType("wandb")
    stub.init, stub.Error, stub.Settings = lambda **_: UnreachableRun(), RuntimeError, lambda **_: None
    monkeypatch.setitem(sys.modules, "wandb", stub)
    assert train_here(tmp_path / "run", "--wandb", "photos", "--max_steps", "2") == 0
    assert [row["step"] for row in read_rows(tmp_path / "run")] == [0, 1]
    assert "W&B: Network error (ConnectTimeout)" in capsys.readouterr().out


def test_a_run_keeps_its_recipe_and_the_recipe_gives_the_same_run(train_here, tmp_path: Path):
    """Written by hand elsewhere, settings of old runs are lost; here they lie beside the figures."""
    assert train_here(tmp_path / "run", "--max_steps", "1", "--seed", "5") == 0
    recipe = tmp_path / "run" / "recipe.yaml"
    assert main(["--config", str(recipe), "--output", str(tmp_path / "again")]) == 0
    assert read_rows(tmp_path / "again")[0]["loss"] == read_rows(tmp_path / "run")[0]["loss"]
    again = read_recipe(["--config", str(tmp_path / "again" / "recipe.yaml")])
    assert replace(again, output=str(tmp_path / "run")) == read_recipe(["--config", str(recipe)])
