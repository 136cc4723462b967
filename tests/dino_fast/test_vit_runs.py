"""Runs of vision transformers with drop path: resumed, on several ranks, compiled, scored and started from others."""

import json
from pathlib import Path

import pytest
import torch

from dino_fast.__main__ import main as dino_fast
from dino_fast.checkpoint import load_newest

VIT = ("--backbone", "vit_tiny_patch16", "--drop_path", "0.5", "--crops.global_size", "48", "--crops.local_size", "32")


def read_student(output: Path) -> dict[str, torch.Tensor]:
    found = load_newest(output)
    assert found is not None
    return found[0]["model"]["student"]


def read_losses(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_a_resumed_run_is_the_same_to_the_bit(train_here, tmp_path: Path):
    assert train_here(tmp_path / "whole", *VIT, "--max_steps", "4") == 0
    for stop in ("2", "4"):
        assert train_here(tmp_path / "parts", *VIT, "--max_steps", stop) == 0
    whole, parts = read_student(tmp_path / "whole"), read_student(tmp_path / "parts")
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert read_losses(tmp_path / "whole") == read_losses(tmp_path / "parts")
    # Drop path is on: without it the run is another.
    assert train_here(tmp_path / "without", *VIT, "--drop_path", "0", "--max_steps", "1") == 0
    assert read_losses(tmp_path / "without")[0] != pytest.approx(read_losses(tmp_path / "whole")[0], rel=1e-4)


def test_parts_of_a_batch_have_the_draws_of_the_whole(train_here, tmp_path: Path):
    """Without batch norm a batch in parts is the same step."""
    assert train_here(tmp_path / "whole", *VIT, "--max_steps", "2") == 0
    assert train_here(tmp_path / "parts", *VIT, "--max_steps", "2", "--accumulate", "4") == 0
    assert read_losses(tmp_path / "parts") == pytest.approx(read_losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.slow
def test_two_ranks_are_one(run, tmp_path: Path):
    one, two = run(*VIT, "--max_steps", "3", output="one"), run(*VIT, "--max_steps", "3", output="two", ranks=2)
    for process in (one, two):
        status, _, errors = process.finish()
        assert status == 0, errors
    assert read_losses(tmp_path / "two") == pytest.approx(read_losses(tmp_path / "one"), rel=1e-5)
    ones, twos = read_student(tmp_path / "one"), read_student(tmp_path / "two")
    assert max((value - twos[name]).abs().max() for name, value in ones.items()) < 1e-5


def test_blocks_computed_again_change_nothing(train_here, tmp_path: Path, capsys):
    """Nor need a run that is resumed go on as it began."""
    assert train_here(tmp_path / "kept", *VIT, "--max_steps", "2") == 0
    assert train_here(tmp_path / "again", *VIT, "--max_steps", "1") == 0
    assert train_here(tmp_path / "again", *VIT, "--max_steps", "2", "--activation_checkpointing") == 0
    kept, again = read_student(tmp_path / "kept"), read_student(tmp_path / "again")
    assert all(torch.equal(value, again[name]) for name, value in kept.items())
    capsys.readouterr()
    assert train_here(tmp_path / "resnet", "--activation_checkpointing") == 1
    assert "is for the vision transformers vit_tiny_patch16, " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("also", [(), ("--activation_checkpointing",)], ids=["kept", "computed-again"])
def test_a_compiled_run_is_the_plain_one(train_here, tmp_path: Path, also: tuple[str, ...]):
    assert train_here(tmp_path / "plain", *VIT, "--max_steps", "3") == 0
    assert train_here(tmp_path / "compiled", *VIT, *also, "--max_steps", "3", "--compile", "always") == 0
    assert read_losses(tmp_path / "compiled") == pytest.approx(read_losses(tmp_path / "plain"), rel=1e-3)


def test_a_run_is_scored_planned_and_passed_on(train_here, labeled_shards: Path, tmp_path: Path, capsys):
    shards = str(labeled_shards)
    assert train_here(tmp_path / "run", *VIT, "--max_steps", "2") == 0
    scores = ["--train", shards, "--val", shards, "--device", "cpu", "--json", str(tmp_path / "knn.json")]
    assert dino_fast(["knn", "--checkpoint", str(tmp_path / "run"), *scores]) == 0
    assert json.loads((tmp_path / "knn.json").read_text())["knn"]["10"]["top1"] > 80  # dark and bright images
    capsys.readouterr()
    assert dino_fast(["plan", *VIT, "--data.train", shards, "--batch_size", "8"]) == 0
    assert "vit_tiny_patch16 has 5.5 M in the backbone" in capsys.readouterr().out
    start = ("--init_from", str(tmp_path / "run"), "--max_steps", "1", "--optim.lr", "0", "--optim.min_lr", "0")
    assert train_here(tmp_path / "next", *VIT, *start) == 0
    before, after = read_student(tmp_path / "run"), read_student(tmp_path / "next")
    assert all(torch.equal(value, after[name]) for name, value in before.items())
