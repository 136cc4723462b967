"""The sweep over the loader's settings measures all combinations, and prints the fastest first."""

import argparse
import json
import sys
from pathlib import Path

import pytest

from bench import sweep
from bench.data_settings import combine, read_combinations
from pipelines.loader import DataRecipe
from shards.__main__ import main as make_shards


def test_every_combination_is_a_recipe_with_a_name_of_what_differs():
    found = dict(combine({"decode": ["torch"], "threads": [1, 4], "prefetch": [2, 3]}))
    assert found == {
        f"threads {threads}, prefetch {prefetch}": DataRecipe(decode="torch", threads=threads, prefetch=prefetch)
        for threads in (1, 4)
        for prefetch in (2, 3)
    }
    assert dict(combine({"threads": [0]})) == {"": DataRecipe()}


def test_torch_is_not_combined_with_a_gpu_that_decodes_or_crops():
    values = {"decode": ["dali", "torch"], "decode_device": ["gpu", "split", "cpu"]}
    assert [name for name, _ in combine(values)] == [
        *(f"decode dali, decode_device {device}" for device in ("gpu", "split", "cpu")),
        "decode torch, decode_device cpu",
    ]


def test_the_fastest_is_the_first():
    rounds = {"slow": [{"images": 1.0}, {"images": 2.0}], "fast": [{"images": 3.0}, {"images": 0.5}]}
    assert list(sweep.sort_fastest_first(rounds)) == ["fast", "slow"]


def test_the_command_measures_them(
    make_class_folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    source, shards, file = make_class_folders(classes=2, per_class=6), tmp_path / "shards", tmp_path / "out.jsonl"
    assert make_shards(["pack", str(source), str(shards), "--workers", "1"]) == 0
    options = ["--decode", "torch", "--threads", "1", "--prefetch", "1", "2", "--batch", "4", "--seconds", "0.1"]
    monkeypatch.setattr(sys, "argv", ["sweep", str(shards), *options, "--json", str(file)])
    sweep.main()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["arm"] for row in rows} == {"prefetch 1", "prefetch 2"}
    assert all(row["median"] > 0 for row in rows)
    assert "batches of 4 on cpu" in capsys.readouterr().out


def test_settings_of_which_no_combination_is_left_are_refused():
    options = argparse.Namespace(
        decode=["torch"], decode_device=["gpu", "split"], threads=[0], prefetch=[2], hw_decoder_load=[-1.0]
    )
    with pytest.raises(SystemExit, match="Pass --decode_device cpu"):
        read_combinations(options)
