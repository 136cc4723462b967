"""The training run: what it writes, that it resumes to the bit, and that two ranks are one."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from dino_fast import checkpoint
from dino_fast.__main__ import main as dino_fast
from shards.__main__ import main as make_shards


def state_of(output: Path) -> dict:
    return checkpoint.load_newest(output)[0]


def rows_of(output: Path) -> list[dict]:
    """What was logged, but for a line that is still being written."""
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines(True) if line[-1] == "\n"] if path.exists() else []


def assert_equal_runs(one: Path, other: Path) -> None:
    """The newest checkpoints agree to the bit, and so does what was logged of every step."""
    first, second = state_of(one), state_of(other)
    assert first["step"] == second["step"]
    torch.testing.assert_close(first["model"], second["model"], rtol=0, atol=0)
    timing = {
        "images_per_s", "images_per_s_per_gpu", "stall", "read_mb_per_s", "requests_ready", "batches_ready", "seconds",
        "paused_s", "time", "step_ms", "data_ms", "forward_ms", "backward_ms", "update_ms", "memory_mb",
    }  # fmt: skip
    logged = [[{k: v for k, v in row.items() if k not in timing} for row in rows_of(run)] for run in (one, other)]
    assert logged[0] == logged[1]


def test_a_run_leaves_its_checkpoints_metrics_and_events(train_here, tmp_path: Path, capsys):
    assert train_here(tmp_path / "run") == 0
    printed = capsys.readouterr().out
    assert "img/s per GPU" in printed
    assert "stall" in printed
    assert "ETA" in printed
    assert "dino-fast knn --checkpoint" in printed
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(12))
    assert [row["epoch"] for row in rows] == [step // 5 for step in range(12)]
    for row in rows:
        assert 0 < row["loss"] < 10
        assert 0 <= row["stall"] <= 1
        assert row["images_per_s"] > 0
        assert row["bad_samples"] == 0
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path / "run")] == [9, 12]
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    state = state_of(tmp_path / "run")
    moved = [
        not torch.equal(state["model"]["student"][name], state["model"]["teacher"][name])
        for name in state["model"]["teacher"]
    ]
    assert any(moved)


@pytest.mark.parametrize(
    ("decode", "precision"), [("dali", "fp32"), pytest.param("torch", "bf16", marks=pytest.mark.slow)]
)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(train_here, tmp_path: Path, decode: str, precision: str):
    options = ("--data.decode", decode, "--precision", precision, "--optim.name", "adamw", "--optim.lr", "1e-3")
    assert train_here(tmp_path / "whole", *options) == 0
    for stop in ("4", "8", "12"):  # 4 and 8 are neither a checkpoint of `whole` nor an epoch's end
        assert train_here(tmp_path / "parts", *options, "--max_steps", stop) == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_finished_run_started_again_changes_nothing(train_here, tmp_path: Path):
    assert train_here(tmp_path / "run", "--max_steps", "3") == 0
    before = [(path.name, path.stat().st_mtime_ns) for path in checkpoint.list_checkpoints(tmp_path / "run")]
    rows = rows_of(tmp_path / "run")
    assert train_here(tmp_path / "run", "--max_steps", "3") == 0
    assert [(path.name, path.stat().st_mtime_ns) for path in checkpoint.list_checkpoints(tmp_path / "run")] == before
    assert rows_of(tmp_path / "run") == rows


@pytest.mark.slow
def test_fp16_trains_with_a_scaler(train_here, tmp_path: Path):
    small = ("--crops.locals", "0", "--crops.global_size", "24", "--batch_size", "4")  # CPUs emulate fp16
    assert train_here(tmp_path / "run", "--precision", "fp16", "--max_steps", "4", *small) == 0
    rows = rows_of(tmp_path / "run")  # the first scales are too large: such steps are skipped, and halve them
    assert all(row["loss"] is None if row["skipped"] else row["loss"] < 10 for row in rows)
    scale = state_of(tmp_path / "run")["model"]["scaler"]["scale"].item()
    assert scale == 65536 * 0.5 ** sum(row["skipped"] for row in rows)


def test_two_ranks_are_one_with_the_same_global_batch(run, tmp_path: Path):
    """Real torchrun, gloo, synchronized batch norm, in float32. The first forward alone rounds to 3e-6 apart, and every
    update multiplies that, so few steps are compared; test_step.py compares in float64, to 1e-7."""
    options = ("--max_steps", "4", "--head.batch_norm", "true", "--optim.lr", "1e-3", "--crops.local_size", "32")
    one, two = run(*options, output="one"), run(*options, output="two", ranks=2)
    for process in (one, two):
        status, _, errors = process.finish()
        assert status == 0, errors
    alone, together = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert len(alone) == len(together) == 4
    for row, other in zip(alone, together, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert other["teacher_entropy"] == pytest.approx(row["teacher_entropy"], rel=1e-4)  # logits over 0.04
    first, second = state_of(tmp_path / "one")["model"], state_of(tmp_path / "two")["model"]
    for network in ("student", "teacher"):
        torch.testing.assert_close(first[network], second[network], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been(run, tmp_path: Path, ranks: int):
    """kill -9 of all processes, in turn while a checkpoint is being written and some steps after one."""
    moments = random.Random(ranks)
    options = ("--max_steps", "100", "--epochs", "20", "--checkpoint.every", "2 steps")
    status, _, errors = run(*options, output="whole", ranks=ranks).finish()
    assert status == 0, errors
    output, kills, during = tmp_path / "killed", 0, 0
    while kills < 12:
        process = run(*options, output="killed", ranks=ranks)
        if kills % 2:
            killed = process.kill_when(lambda: bool(list(output.glob(".writing-*"))))
            during += killed and bool(list(output.glob(".writing-*")))
        else:
            last = len(rows_of(output)) + moments.randrange(1, 6)
            killed = process.kill_when(lambda last=last: len(rows_of(output)) >= last)
        assert killed, f"the run ended after {kills} kills"
        kills += 1
    status, _, errors = run(*options, output="killed", ranks=ranks).finish()
    assert status == 0, errors
    assert during >= 2
    assert_equal_runs(tmp_path / "whole", output)


@pytest.mark.slow  # tests/faults has quick ones
def test_killed_during_training_and_during_a_checkpoint_a_run_ends_the_same(run, tmp_path: Path):
    """The quick form of the slow test: one kill of each kind."""
    options = ("--max_steps", "9")
    whole = run(*options, output="whole")
    output = tmp_path / "killed"
    assert run(*options, output="killed").kill_when(lambda: len(rows_of(output)) >= 4)
    assert run(*options, output="killed").kill_when(lambda: bool(list(output.glob(".writing-*"))))
    for process in (whole, run(*options, output="killed")):
        status, _, errors = process.finish()
        assert status == 0, errors
    assert_equal_runs(tmp_path / "whole", output)
    assert not list(output.glob(".writing-*"))


@pytest.mark.slow  # another number of ranks goes further, below
def test_two_ranks_resume(run, tmp_path: Path):
    options = ("--epochs", "2", "--max_steps")
    whole = run(*options, "4", output="whole", ranks=2)
    for stop in ("2", "4"):
        status, out, errors = run(*options, stop, output="parts", ranks=2).finish()
        assert status == 0, errors
    assert "resumed from step 2" in out
    assert whole.finish()[0] == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(run, tmp_path: Path):
    """1, then 2, then 1 ranks: the same images, and losses within 1e-4 of a run by one alone."""
    options = ("--optim.lr", "1e-3", "--head.batch_norm", "true", "--crops.local_size", "32", "--max_steps")
    whole = run(*options, "6", output="whole")
    for stop, ranks in (("2", 1), ("4", 2), ("6", 1)):
        status, _, errors = run(*options, stop, output="parts", ranks=ranks).finish()
        assert status == 0, errors
    status, _, errors = whole.finish()
    assert status == 0, errors
    losses = [[row["loss"] for row in rows_of(tmp_path / name)] for name in ("parts", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(losses[0]) == 6


def test_a_run_scores_itself_shows_its_crops_and_begins_with_another(
    train_here, labeled_shards: Path, tmp_path: Path, capsys
):
    """The second run's first score is that of the first run's weights after a step at a rate of next to nothing."""
    images = labeled_shards.parent / "images"
    assert make_shards(["pack", str(images), str(tmp_path / "both"), "--split-val", "0.4"]) == 0
    knn = ("--knn.train", str(tmp_path / "both" / "train"), "--knn.val", str(tmp_path / "both" / "val"), "--knn.k", "3")
    common = (*knn, "--knn.every", "4 steps", "--max_steps", "8")
    assert train_here(tmp_path / "first", *common, "--dump_crops", "true") == 0
    scores = [row["knn_top1"] for row in rows_of(tmp_path / "first") if "knn_top1" in row]
    assert len(scores) == 2
    assert all(0 <= score <= 100 for score in scores)
    with Image.open(tmp_path / "first" / "crops.png") as sheet:
        assert sheet.size == (8 + 2 * (32 + 8) + 2 * (24 + 8), 8 + 8 * (32 + 8))
    capsys.readouterr()
    still = ("--init_from", str(tmp_path / "first"), "--optim.lr", "0", "--optim.min_lr", "0", "--max_steps", "1")
    assert train_here(tmp_path / "second", *common, *still) == 0
    first, second = (state_of(tmp_path / name)["model"]["student"] for name in ("first", "second"))
    trained = [name for name in first if "running" not in name and "tracked" not in name]
    assert all(torch.equal(first[name], second[name]) for name in trained)
    assert train_here(tmp_path / "third", *knn[:2]) == 1
    assert "--knn.val is missing" in capsys.readouterr().err


@pytest.mark.slow
def test_milestones_are_saved_and_kept_whatever_else_is(train_here, tmp_path: Path):
    options = ("--checkpoint.every", "4 steps", "--checkpoint.keep", "1", "--checkpoint.keep_every", "1")
    assert train_here(tmp_path / "run", *options) == 0  # five steps an epoch
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path / "run")] == [5, 10, 12]


@pytest.mark.slow  # a quick one is in tests/faults/test_disks.py
def test_a_damaged_checkpoint_is_put_aside_and_the_run_ends_the_same(train_here, tmp_path: Path, capsys):
    assert train_here(tmp_path / "whole") == 0
    assert train_here(tmp_path / "run", "--max_steps", "8") == 0
    last = checkpoint.list_checkpoints(tmp_path / "run")[-1]
    last.write_bytes(last.read_bytes()[:-1])
    capsys.readouterr()
    assert train_here(tmp_path / "run") == 0
    printed = capsys.readouterr().out
    assert f"{last.name} is damaged" in printed
    assert "resumed from step 6" in printed
    assert (tmp_path / "run" / f"damaged-{last.name}").exists()
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def test_metrics_of_somebody_else_stay(train_here, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"note": "mine"}\n{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    assert train_here(tmp_path / "run", "--max_steps", "1") == 0
    assert [row.get("note", row.get("step")) for row in rows_of(tmp_path / "run")] == ["mine", 0]


def test_on_a_terminal_there_is_a_bar_with_the_figures_below(train_here, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich: as on a terminal
    monkeypatch.setenv("COLUMNS", "80")
    assert train_here(tmp_path / "run", "--max_steps", "3") == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out).replace("\r", "\n").splitlines()
    assert any(re.fullmatch(r"epoch 1/1  step 3/3 ━+ \d:\d\d:\d\d ETA .*", line) for line in shown)
    assert any(re.match(r"loss \d\.\d{4}  [\d.]+ img/s per GPU  [\d.]+ total  stall [\d.]+ %", line) for line in shown)
    assert all(len(line.rstrip()) <= 80 for line in shown if "━" in line or "img/s" in line)


def test_knn_scores_a_run(train_here, labeled_shards: Path, tmp_path: Path, capsys):
    assert train_here(tmp_path / "run", "--max_steps", "2") == 0
    capsys.readouterr()
    data = ["--train", str(labeled_shards), "--val", str(labeled_shards)]
    arguments = ["knn", "--checkpoint", str(tmp_path / "run"), *data, "--json", str(tmp_path / "score.json")]
    assert dino_fast([*arguments, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    score = json.loads((tmp_path / "score.json").read_text())
    assert (score["resize"], score["crop"], score["step"], score["network"]) == (37, 32, 2, "teacher")
    assert sorted(map(int, score["knn"])) == [10, 20, 100, 200]
    # Dark and bright images, each of them among its own neighbors: any features tell them apart.
    assert score["knn"]["10"]["top1"] > 90
    assert f"top-1 {score['knn']['10']['top1']:6.2f} %" in printed
