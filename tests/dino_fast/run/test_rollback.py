"""Steps and states that are no numbers: skipped, counted, gone back from, and in the end given up, in real runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_fast.evaluate.trained_backbone import load_backbone
from dino_fast.step.train_step import TrainStep
from dino_fast.step.update import LossScale
from pipelines.batch import Batch
from pipelines.loader import Loader
from tests.dino_fast.test_train import rows_of, state_of


class Poison:
    """Puts a NaN into the batches of some steps, in the first `times` sittings that come by them."""

    def __init__(self, steps: set[int], times: int) -> None:
        self.steps, self.times = steps, times
        self._whole = Loader.batches

    def batches(self, loader: Loader, start: int, stop: int) -> Iterator[Batch]:
        wanted, came = self.steps if self.times else set(), False
        try:
            for batch in self._whole(loader, start, stop):
                if batch.step in wanted:
                    batch.globals[0, 0, 0, 0] = torch.nan
                    came = True
                yield batch
        finally:
            self.times -= came

    def __get__(self, loader: Loader, _: Any) -> Any:
        return lambda start, stop: self.batches(loader, start, stop)


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], times: int = 1) -> None:
    monkeypatch.setattr(Loader, "batches", Poison(steps, times))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(train_here, tmp_path: Path, monkeypatch, precision: str):
    """Gradients alone are broken here, as by an overflow in the backward pass."""
    break_gradients(monkeypatch, 4, 4)
    assert train_here(tmp_path / "run", "--precision", precision, "--max_steps", "8", "--health.rollbacks", "0") == 0
    rows = rows_of(tmp_path / "run")
    assert [row["skipped"] for row in rows] == [0, 0, 0, 0, 1, 0, 0, 0]
    assert rows[4]["loss"] is None
    assert rows[4]["skipped_in_a_row"] == 1
    assert rows[5]["skipped_in_a_row"] == 0
    assert all(row["loss"] > 0 and row["skipped_total"] == (row["step"] >= 4) for row in rows if row["step"] != 4)


def test_statistics_that_are_no_numbers_are_not_saved_but_gone_back_from(
    train_here, tmp_path: Path, monkeypatch, capsys
):
    """One bad batch leaves the weights alone; batch norm's running statistics would keep it for good."""
    poison(monkeypatch, {4})
    assert train_here(tmp_path / "run") == 0
    printed = capsys.readouterr().out
    line = (
        "batch norm's statistics after step 5 are not finite: back to step 3, and on with 0.5 of the recipe's learning"
    )
    assert line in printed.replace("\n", " ")
    assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(12))  # what was run twice is there once
    state = state_of(tmp_path / "run")
    assert (state["step"], state["rollbacks"]) == (12, 1)
    load_backbone(tmp_path / "run", "teacher")
    for network in ("student", "teacher"):
        assert all(tensor.isfinite().all() for tensor in state["model"][network].values())


def break_gradients(monkeypatch: pytest.MonkeyPatch, first: int, last: int) -> None:
    """Of the passes `first` to `last`, from 0, of all that follow."""
    passes, scale = [0], TrainStep._scale

    def broken(step: TrainStep, loss: torch.Tensor) -> torch.Tensor:
        passes[0] += 1
        return scale(step, loss * torch.inf if first <= passes[0] - 1 <= last else loss)

    monkeypatch.setattr(TrainStep, "_scale", broken)


@pytest.mark.slow
def test_many_skipped_steps_in_a_row_take_the_run_back(train_here, tmp_path: Path, monkeypatch, capsys):
    options = ("--checkpoint.every", "3 steps", "--health.max_skipped", "2")
    assert train_here(tmp_path / "other", *options) == 0  # a healthy run
    break_gradients(monkeypatch, 4, 5)
    assert train_here(tmp_path / "run", *options) == 0
    printed = capsys.readouterr().out.replace("\n", " ")
    assert "the gradients of 2 steps in a row were not finite: back to step 3" in printed
    assert "(1 of --health.rollbacks 3)" in printed
    rates = [[row["lr"] for row in rows_of(tmp_path / name)] for name in ("run", "other")]
    assert rates[0][:3] == rates[1][:3]
    assert rates[0][3:] == [0.5 * rate for rate in rates[1][3:]]


@pytest.mark.slow
def test_a_run_that_went_back_resumes_as_it_would_have_gone_on(train_here, tmp_path: Path, monkeypatch):
    poison(monkeypatch, {4})
    assert train_here(tmp_path / "whole") == 0
    monkeypatch.undo()
    poison(monkeypatch, {4})
    assert train_here(tmp_path / "parts", "--max_steps", "9") == 0
    monkeypatch.undo()
    assert train_here(tmp_path / "parts") == 0
    whole, parts = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    assert whole["rollbacks"] == parts["rollbacks"] == 1
    torch.testing.assert_close(parts["model"], whole["model"], rtol=0, atol=0)


@pytest.mark.slow
def test_it_goes_back_only_so_often_and_says_what_to_do(train_here, tmp_path: Path, monkeypatch, capsys):
    break_gradients(monkeypatch, 4, 100)
    options = ("--health.max_skipped", "2", "--health.rollbacks", "2")
    assert train_here(tmp_path / "run", *options) == 1
    out, errors = capsys.readouterr()
    assert "on with 0.25 of the recipe's learning rate" in out.replace("\n", " ")
    (line,) = errors.strip().splitlines()
    assert "2 steps in a row were not finite. Lower --optim.lr" in line
    assert state_of(tmp_path / "run")["step"] == 3


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(train_here, tmp_path: Path, monkeypatch, capsys):
    break_gradients(monkeypatch, 0, 100)
    assert train_here(tmp_path / "run", "--health.max_skipped", "1") == 1
    assert "There was no checkpoint yet to go back to" in capsys.readouterr().err


@pytest.mark.slow
def test_fp16_goes_back_with_the_loss_scale_of_the_checkpoint(train_here, tmp_path: Path, monkeypatch):
    # From 65536, the search for the scale may end where one version of torch still overflows at times. The first bad
    # step halves 64, so that the checkpoint's scale is not the first one.
    monkeypatch.setattr(LossScale.__init__, "__defaults__", (64.0,))
    break_gradients(monkeypatch, 4, 4)
    poison(monkeypatch, {10})
    # CPUs emulate fp16, so the batch is small.
    small = ("--crops.locals", "0", "--crops.global_size", "24", "--batch_size", "4")
    options = ("--precision", "fp16", "--max_steps", "12", "--checkpoint.every", "9 steps", *small)
    assert train_here(tmp_path / "run", *options) == 0
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(12))
    assert state_of(tmp_path / "run")["rollbacks"] == 1
    assert all(row["loss_scale"] == row["loss_scale"] for row in rows)
    assert [row["step"] for row in rows if row["skipped"]] == [4]
    assert (
        rows[9]["loss_scale"] == rows[8]["loss_scale"] == 32
    )  # it was halved after the bad step, and that is forgotten
    assert state_of(tmp_path / "run")["model"]["scaler"]["scale"] == rows[11]["loss_scale"]
