"""`dino-fast evaluate`: what the data allow is run once, and the table says what was not."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dino_fast.__main__ import main as dino_fast
from dino_fast.evaluate import knn
from dino_fast.evaluate.published_scores import PUBLISHED
from dino_fast.evaluate.score_table import ScoreRow, format_table, list_rows
from dino_fast.model.backbones import BACKBONES


@pytest.fixture
def run(train_here: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A run of one step."""
    assert train_here(tmp_path / "run", "--max_steps", "1") == 0
    capsys.readouterr()
    return tmp_path / "run"


def read_scores(folder: Path) -> dict[str, dict[str, object]]:
    rows = json.loads((folder / "scores.json").read_text())["scores"]
    return {row["evaluation"]: row for row in rows}


def test_the_quick_suite_runs_what_the_data_allow_and_keeps_it(
    run: Path, labeled_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    data = ["--train", str(labeled_shards), "--val", str(labeled_shards), "--limit", "20", "--device", "cpu"]
    call = ["evaluate", str(run), *data, "--cache", str(tmp_path / "cache")]
    assert dino_fast(call) == 0
    out = run / "evaluate-quick"
    scores = read_scores(out)
    assert set(scores) == {"knn", "linear", "retrieval", "copies"}  # neighbors have no score
    assert scores["knn"]["score"] == json.loads((out / "knn.json").read_text())["knn"]["20"]["top1"]
    assert scores["linear"]["score"] == json.loads((out / "linear.json").read_text())["best"]["top1"]
    assert scores["copies"]["note"] == "skipped: it needs --copies"
    assert (out / "neighbors.png").exists()
    assert "| retrieval |  |  |  | skipped: it needs --retrieval |" in (out / "scores.md").read_text()

    monkeypatch.setattr(knn, "main", lambda _: pytest.fail("it was run again"))
    capsys.readouterr()
    assert dino_fast(call) == 0
    assert capsys.readouterr().out.count("its result is in") == 3
    assert read_scores(out) == scores

    computed = []
    monkeypatch.setattr(knn, "main", computed.append)
    assert dino_fast([*call, "--network", "student"]) == 0
    assert len(computed) == 1
    newer = next(run.glob("step-*.pt"))
    os.utime(newer)  # another file of the same name
    assert dino_fast([*call, "--network", "student"]) == 0
    assert len(computed) == 2


def test_one_that_fails_does_not_stop_the_others(run: Path, labeled_shards: Path, tmp_path: Path, capsys) -> None:
    void = tmp_path / "gnd_void.json"
    data = ["--train", str(labeled_shards), "--val", str(labeled_shards), "--device", "cpu", "--limit", "20"]
    assert dino_fast(["evaluate", str(run), *data, "--retrieval", str(void)]) == 1
    scores = read_scores(run / "evaluate-quick")
    assert str(scores["retrieval-void"]["note"]).startswith("failed: ")
    assert scores["linear"]["score"] is not None
    assert "retrieval-void failed: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        ([], 2, "expected either RUN or --pretrained"),
        (["nowhere"], 1, "--output is missing"),
        (["nowhere", "--output", "out"], 1, "nowhere: no such file. Pass a run's folder"),
        (["."], 1, "has no step-….pt. Pass the output folder of a run"),
        (["run", "--suite", "all"], 2, "--suite expects one of"),
    ],
)
def test_wrong_calls_are_one_line(
    arguments: list[str], status: int, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        found = dino_fast(["evaluate", *arguments])
    except SystemExit as error:
        found = error.code
    assert found == status
    [printed] = capsys.readouterr().err.splitlines()
    assert line in printed
    assert not list(tmp_path.iterdir())


def test_published_figures_are_of_backbones_that_exist() -> None:
    assert {name for of_figure in PUBLISHED.values() for name in of_figure} <= set(BACKBONES)
    rows = list_rows("retrieval-roxford5k", {
        "backbone": "vit_small_patch16",
        "retrieval": {"easy": {"map": None, "queries": 0}, "medium": {"map": 40.0, "queries": 70}},
    })  # fmt: skip
    assert rows == [ScoreRow("retrieval-roxford5k", "roxford5k medium, mAP", 40.0, 41.8, "70 queries")]
    assert "| retrieval-roxford5k | roxford5k medium, mAP | 40.0 | 41.8 | 70 queries |" in format_table("x", rows)


@pytest.mark.slow  # two processes of torch
def test_two_processes_share_each_evaluation(run: Path, labeled_shards: Path) -> None:
    data = ["--train", str(labeled_shards), "--val", str(labeled_shards), "--device", "cpu", "--limit", "20"]
    assert dino_fast(["evaluate", str(run), *data, "--gpus", "2", "--output", str(run / "two")]) == 0
    assert dino_fast(["evaluate", str(run), *data, "--output", str(run / "one")]) == 0
    assert read_scores(run / "one") == read_scores(run / "two")
