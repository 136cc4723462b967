"""The writer of checkpoints, step by step: `hold` stops its thread where it is about to write."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dino_fast import checkpoint
from dino_fast.model.head import HeadRecipe
from dino_fast.model.student_teacher import build_student_teacher
from dino_fast.run import checkpoint_writer
from dino_fast.run.checkpoint_writer import CheckpointWriter
from dino_fast.step.hyper import Hyper
from dino_fast.step.loss import LossRecipe
from dino_fast.step.optimizers import OptimRecipe, build_optimizer
from dino_fast.step.train_step import TrainStep
from shards.errors import UserError
from tests.faults.runs import half_written, steps_saved

PROMPT = 60  # seconds in which what is not to wait has surely happened


def state(value: float) -> dict:
    return {"model": {"teacher": {"weight": torch.full((1000,), value)}}, "recipe": {}}


class Disk:
    """Stands between the writer and the disk: what is to be written waits at the gate, or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._save, self.gate, self.arrived = checkpoint.save, threading.Event(), threading.Semaphore(0)
        self.gate.set()
        self.fails = False
        monkeypatch.setattr(checkpoint, "save", self._write)

    def _write(self, folder: Path, step: int, state: dict[str, Any]) -> Path:
        self.arrived.release()
        assert self.gate.wait(PROMPT)
        if self.fails:
            raise UserError(f"no space for step {step}")
        return self._save(folder, step, state)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture
def said() -> list[str]:
    """What the writer had to say."""
    return []


@pytest.fixture
def writer(tmp_path: Path, said: list[str]) -> CheckpointWriter:
    return CheckpointWriter(tmp_path, keep=2, keep_every=0, say=said.append)


def soon(condition: Callable[[], bool]) -> bool:
    """Whether it comes to hold."""
    waiting = threading.Event()
    return any(condition() or waiting.wait(0.01) for _ in range(100 * PROMPT))


def weight(step: int, folder: Path) -> Tensor:
    [path] = [path for path in checkpoint.list_checkpoints(folder) if checkpoint.step_of(path) == step]
    return checkpoint.load(path)["model"]["teacher"]["weight"]


def test_what_is_written_is_the_state_of_the_moment_of_saving(disk: Disk, writer: CheckpointWriter, tmp_path: Path):
    disk.gate.clear()
    moving = state(1.0)
    writer.save(1, moving)  # returns although nothing can be written
    assert disk.arrived.acquire(timeout=PROMPT)
    moving["model"]["teacher"]["weight"].fill_(2.0)
    moving["model"]["teacher"]["more"] = torch.zeros(1)
    assert steps_saved(tmp_path) == []
    disk.gate.set()
    writer.close()
    assert torch.equal(weight(1, tmp_path), torch.full((1000,), 1.0))


def test_one_is_written_at_a_time(disk: Disk, writer: CheckpointWriter, tmp_path: Path):
    """Two copies of the state beside the networks would be one too many."""
    disk.gate.clear()
    writer.save(1, state(1.0))
    assert disk.arrived.acquire(timeout=PROMPT)
    second = threading.Thread(target=writer.save, args=(2, state(2.0)))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert not disk.arrived.acquire(blocking=False)
    disk.gate.set()
    second.join(PROMPT)
    writer.close()
    assert steps_saved(tmp_path) == [1, 2]


def test_checkpoints_in_quick_succession_are_all_written(tmp_path: Path):
    writer = CheckpointWriter(tmp_path, keep=100, keep_every=0, say=print)
    for step in range(1, 51):
        writer.save(step, state(step))
    writer.close()
    assert steps_saved(tmp_path) == list(range(1, 51))


def test_a_write_that_failed_is_tried_again_until_it_succeeds(
    disk: Disk, writer: CheckpointWriter, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(checkpoint_writer, "RETRY_PAUSES", (0.01,) * 100_000)
    writer.save(1, state(1.0))
    writer.wait_until_idle()
    disk.fails = True
    writer.save(2, state(2.0))
    assert soon(lambda: len(said) >= 2)
    disk.fails = False
    writer.close()
    assert said == ["no space for step 2. It is tried again in 0 s, and the run goes on."] * len(said)
    assert steps_saved(tmp_path) == [1, 2]


@pytest.fixture
def waiting(disk: Disk, writer: CheckpointWriter, said: list[str], monkeypatch: pytest.MonkeyPatch) -> CheckpointWriter:
    """A writer to which the disk refuses the checkpoint of step 1, and which would try again in an hour."""
    monkeypatch.setattr(checkpoint_writer, "RETRY_PAUSES", (3600.0,))
    disk.fails = True
    writer.save(1, state(1.0))
    assert soon(lambda: bool(said))
    return writer


def test_a_newer_checkpoint_takes_the_place_of_one_that_waits(
    disk: Disk, waiting: CheckpointWriter, said: list[str], tmp_path: Path
):
    disk.fails = False
    waiting.save(2, state(2.0))
    waiting.close()  # nothing to raise: the newest is written
    assert steps_saved(tmp_path) == [2]
    assert said == ["no space for step 1. It is tried again in 3600 s, and the run goes on."]


def test_close_raises_what_kept_the_last_from_being_written(
    disk: Disk, writer: CheckpointWriter, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(checkpoint_writer, "RETRY_PAUSES", (0.0, 0.0))
    writer.save(1, state(1.0))
    writer.wait_until_idle()
    disk.fails = True
    writer.save(2, state(2.0))
    with pytest.raises(UserError, match="no space for step 2"):
        writer.close()
    assert [line.count("tried again") for line in said] == [1, 1, 0]
    assert steps_saved(tmp_path) == [1]
    assert not half_written(tmp_path)


def test_a_state_that_cannot_be_written_is_an_error_too(
    writer: CheckpointWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whatever goes wrong in the thread, the run comes to know it."""
    monkeypatch.setattr(checkpoint_writer, "RETRY_PAUSES", ())
    writer.save(1, {"model": lambda: None})
    with pytest.raises(Exception, match=r"pickle|lambda"):
        writer.close()
    assert steps_saved(tmp_path) == []


def test_abandoning_waits_for_what_is_being_written_but_not_for_another_try(
    disk: Disk, waiting: CheckpointWriter, said: list[str], tmp_path: Path
):
    waiting.abandon()  # raises nothing
    assert steps_saved(tmp_path) == []
    other = CheckpointWriter(tmp_path, keep=2, keep_every=0, say=said.append)
    disk.fails = False
    disk.gate.clear()
    other.save(2, state(2.0))
    ending = threading.Thread(target=other.abandon)
    ending.start()
    disk.gate.set()
    ending.join(PROMPT)
    assert not ending.is_alive()
    assert steps_saved(tmp_path) == [2]


def test_a_line_that_cannot_be_printed_does_not_end_the_thread(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(line: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_writer, "RETRY_PAUSES", (3600.0,))
    writer = CheckpointWriter(tmp_path, keep=2, keep_every=0, say=full)
    disk.fails = True
    writer.save(1, state(1.0))
    writer.wait_until_idle()  # without the hour
    disk.fails = False
    writer.save(2, state(2.0))
    writer.close()
    assert steps_saved(tmp_path) == [2]


def test_of_two_checkpoints_of_a_step_the_later_one_is_left(tmp_path: Path):
    for value in (1.0, 2.0):
        checkpoint.save(tmp_path, 3, state(value))
    assert len(checkpoint.list_checkpoints(tmp_path)) == 1
    loaded = checkpoint.load_newest(tmp_path)[0]["model"]
    torch.testing.assert_close(loaded, state(2.0)["model"], rtol=0, atol=0)


def test_the_newest_and_the_milestones_are_kept_as_they_come(tmp_path: Path):
    writer = CheckpointWriter(tmp_path, keep=2, keep_every=4, say=print)
    kept = []
    for step in range(1, 11):
        writer.save(step, state(step))
        writer.wait_until_idle()
        kept.append(steps_saved(tmp_path))
    writer.close()
    expected = [[s for s in range(1, n + 1) if s > n - 2 or s % 4 == 0] for n in range(1, 11)]
    assert kept == expected


def train_step(name: Any, precision: Any) -> TrainStep:
    torch.manual_seed(0)
    student, teacher = build_student_teacher("resnet18", HeadRecipe(out_dim=32, hidden_dim=16, bottleneck_dim=8))
    optimizer = build_optimizer(OptimRecipe(name=name), student)
    return TrainStep(student, teacher, optimizer, LossRecipe(), 3.0, precision)


def run(step: TrainStep, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hyper = Hyper(lr=0.01, weight_decay=1e-2, momentum=0.9, teacher_temp=0.05, freeze_last_layer=False)
    step(torch.randn(8, 3, 32, 32, generator=generator), None, hyper)


@pytest.mark.parametrize(("name", "precision"), [("sgd", "fp32"), ("adamw", "bf16"), ("lars", "fp16")])
def test_a_step_goes_on_from_its_checkpoint_as_if_it_had_not_been_written(
    disk: Disk, writer: CheckpointWriter, tmp_path: Path, name: str, precision: str
):
    """Optimizer and loss scale, too, though the step ran on before a byte was written."""
    one, other = train_step(name, precision), train_step(name, precision)
    if one.loss_scale is not None:
        one.loss_scale.scale.fill_(1.0)  # so that no step is skipped
    for seed in range(2):
        run(one, seed)
    disk.gate.clear()
    writer.save(2, {"model": one.state_dict(), "recipe": {}})
    run(one, 2)
    disk.gate.set()
    writer.close()
    other.load_state_dict(checkpoint.load_newest(tmp_path)[0]["model"])
    if other.loss_scale is not None:
        assert {name: value.item() for name, value in other.loss_scale.state_dict().items()} == {
            "scale": 1.0, "_growth_tracker": 2,
        }  # fmt: skip
    run(other, 2)
    torch.testing.assert_close(other.state_dict(), one.state_dict(), rtol=0, atol=0)
