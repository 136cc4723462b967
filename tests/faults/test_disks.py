"""Disks that are full or refuse, and that forget what they were given: a good checkpoint is always left."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dino_fast import checkpoint
from dino_fast.run.checkpoint_writer import CheckpointWriter
from shards.errors import UserError
from tests.dino_fast.conftest import ROOT, TINY
from tests.faults.conftest import Process
from tests.faults.runs import assert_as_if_nothing_had_happened, assert_nothing_lost, half_written, steps_saved

STEPS = ("--max_steps", "12", "--checkpoint.every", "2 steps", "--checkpoint.keep", "1")


def state(value: float) -> dict:
    return {"model": {"teacher": {"weight": torch.full((1000,), value)}}, "recipe": {}}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 MB, for four tiny checkpoints."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def whole(train_here: Callable[..., int], tmp_path: Path) -> Path:
    """The run without faults."""
    assert train_here(tmp_path / "whole", *STEPS) == 0
    return tmp_path / "whole"


def assert_survives(run: Process, output: Path, full: Callable[[], None], free: Callable[[], None]) -> None:
    """The run goes on while its disk is full, saying so, and saves when there is space again."""
    assert run.wait_until(lambda: bool(steps_saved(output)))

    def has_told() -> bool:
        full()  # again: checkpoints that are pruned give space back
        return "could not be written" in run.out

    assert run.wait_until(has_told), run.out + run.err
    told = run.steps
    assert len(steps_saved(output)) == 1
    assert_nothing_lost(output, steps_saved(output))
    assert run.wait_until(lambda: run.steps > told or run.steps == 12)
    free()
    assert run.wait() == 0, run.err
    assert ". It is tried again in 10 s, and the run goes on." in run.out
    assert "dino-fast" not in run.err  # TensorBoard's thread may have its say


def test_a_run_outlives_a_full_disk(small_disk: Path, start, whole: Path):
    output, ballast = small_disk / "run", small_disk / "ballast"
    run = start(*STEPS, output=output)

    def fill() -> None:
        with open(ballast, "ab", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(1 << 20))
                except OSError:
                    return

    assert_survives(run, output, fill, ballast.unlink)
    assert_as_if_nothing_had_happened(output, whole)


def limit_files(run: Process, most: int = resource.RLIM_INFINITY) -> None:
    """Let the process write files of so many bytes at most; needs no rights."""
    _, hard = resource.prlimit(run.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (most, hard))


@pytest.mark.slow
def test_a_run_outlives_writes_that_are_refused(start, whole: Path, tmp_path: Path):
    run = start(*STEPS)
    assert_survives(run, tmp_path / "run", lambda: limit_files(run, 50_000_000), lambda: limit_files(run))
    assert_as_if_nothing_had_happened(tmp_path / "run", whole)


@pytest.mark.slow
def test_the_last_checkpoint_is_tried_again_until_the_disk_takes_it(start, whole: Path, tmp_path: Path):
    """Ten seconds after it failed."""
    output = tmp_path / "run"
    run = start(*STEPS, "--checkpoint.every", "5 steps")
    assert run.wait_until(lambda: steps_saved(output) == [10])
    limit_files(run, 50_000_000)
    assert run.wait_until(lambda: "checkpoint of step 12 could not be written" in run.out)
    limit_files(run)
    assert run.wait() == 0, run.err
    assert_as_if_nothing_had_happened(output, whole)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_call_leaves_the_checkpoint_before_and_nothing_half_written(tmp_path: Path, monkeypatch, call: str):
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    good = checkpoint.save(tmp_path, 1, state(1.0))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, call, fail)
        with pytest.raises(UserError, match=r"step 2 could not be written .*Input/output error.* before is good"):
            checkpoint.save(tmp_path, 2, state(2.0))
    assert list(tmp_path.iterdir()) == [good]
    assert checkpoint.load_newest(tmp_path)[0]["step"] == 1
    later = checkpoint.save(tmp_path, 2, state(2.0))
    assert sorted(tmp_path.iterdir()) == sorted([good, later])


def test_what_a_kill_left_half_written_does_not_stand_in_the_way(tmp_path: Path, monkeypatch):
    """On a disk that is just large enough, it goes before the next is written, not after."""
    (tmp_path / ".writing-00000005.pt").write_bytes(bytes(1000))
    seen = []
    saved = torch.save

    def watch(*arguments: object) -> None:
        seen.append(len(half_written(tmp_path)))
        saved(*arguments)

    monkeypatch.setattr(checkpoint.torch, "save", watch)
    writer = CheckpointWriter(tmp_path, keep=2, keep_every=0, say=print)
    writer.save(4, state(4.0))
    writer.close()
    assert seen == [1]
    assert steps_saved(tmp_path) == [4]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def test_damaged_checkpoints_are_passed_over_and_the_run_ends_the_same(train_here, tmp_path: Path, capsys):
    """One bit, one byte, all of it: each stands for a disk's way to lose what it had."""
    output, every = tmp_path / "run", ("--checkpoint.every", "1 step", "--checkpoint.keep", "4")
    assert train_here(output, *every, "--max_steps", "5") == 0
    good, *damaged = checkpoint.list_checkpoints(output)
    for damage, path in zip((flip, truncate, empty), damaged, strict=True):
        damage(path)
    capsys.readouterr()
    assert train_here(output, *every, "--max_steps", "7") == 0
    printed = capsys.readouterr().out
    for path in damaged:
        assert f"{path} is damaged and was renamed to damaged-{path.name}. An older checkpoint is used" in printed
        assert (output / f"damaged-{path.name}").exists()
    assert checkpoint.step_of(good) == 2
    assert "resumed from step 2 of" in printed
    assert steps_saved(output) == [4, 5, 6, 7]
    assert train_here(tmp_path / "whole", "--max_steps", "7") == 0
    assert_as_if_nothing_had_happened(output, tmp_path / "whole")


def test_where_all_are_damaged_the_run_says_so_and_touches_nothing(train_here, tmp_path: Path, capsys):
    assert train_here(tmp_path / "run", "--max_steps", "1") == 0
    [path] = checkpoint.list_checkpoints(tmp_path / "run")
    flip(path)
    before = path.read_bytes()
    capsys.readouterr()
    assert train_here(tmp_path / "run", "--max_steps", "2") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "all 1 checkpoints are damaged" in line
    assert path.read_bytes() == before


def test_a_disk_too_full_to_print_to_does_not_end_a_run(labeled_shards: Path, tmp_path: Path):
    """As with `nohup … > run.log` on the disk that is full."""
    command = [sys.executable, "-m", "dino_fast.train", *TINY, "--data.train", str(labeled_shards)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*command, "--output", str(tmp_path / "run"), "--max_steps", "4"],
            stdout=full, stderr=subprocess.PIPE, text=True, env=environment, timeout=240,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert steps_saved(tmp_path / "run") == [3, 4]
