"""The doctor: every stage has its figure, and the verdict names the slowest one and a setting that lifts it."""

import json
from pathlib import Path

import pytest
import torch

from dino_fast.__main__ import main as dino_fast
from dino_fast.advise.doctor import measured
from dino_fast.advise.verdict import (
    AUGMENT,
    COLD,
    DALI_CPU,
    DALI_GPU,
    LOADER,
    STEP,
    TORCH,
    WARM,
    Machine,
    decoding,
    verdict,
)
from pipelines.crops import CropRecipe
from pipelines.loader import DataRecipe
from shards.index import ShardIndex
from tests.dino_fast.conftest import TINY

# Stages in img/s; the loader is never slower than the step unless a case says so.
QUICK = {COLD: 900.0, WARM: 9000.0, TORCH: 800.0, AUGMENT: 5000.0, LOADER: 750.0, STEP: 100.0}
ON_CPU = Machine(on_gpu=False, cores=8, short_side=375, in_memory=False)
ON_GPU = Machine(on_gpu=True, cores=8, short_side=375, in_memory=False)


def said(data: DataRecipe, machine: Machine = ON_GPU, crops: CropRecipe | None = None, **rates: float) -> str:
    """The verdict on QUICK with other figures, by the names of the stages' constants."""
    changed = QUICK | {globals()[name]: rate for name, rate in rates.items()}
    return " ".join(verdict(changed, data, crops or CropRecipe(), machine))


def test_the_whole_command(labelled_shards: Path, tmp_path: Path, capsys):
    before = sorted(path.name for path in labelled_shards.iterdir())
    file = tmp_path / "figures.jsonl"
    calls = [*TINY, "--output", str(tmp_path / "run"), "--seconds", "0.2", "--json", str(file)]
    assert dino_fast(["doctor", "--data", str(labelled_shards), *calls]) == 0
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    stages = {row["stage"]: row for row in rows}
    assert {COLD, WARM, TORCH, AUGMENT, LOADER, STEP} <= stages.keys() <= {*QUICK, DALI_CPU}
    assert all(row["images_per_s"] > 0 and row["seconds"] > 0 and row["stage"] in out for row in rows)
    assert stages[STEP]["times_demand"] == 1
    assert stages[LOADER]["times_demand"] == pytest.approx(
        stages[LOADER]["images_per_s"] / stages[STEP]["images_per_s"]
    )
    with ShardIndex(labelled_shards) as index:
        mean = index.records["size"].mean() / 1e6
    assert stages[WARM]["mb_per_s"] == pytest.approx(stages[WARM]["images_per_s"] * mean)
    assert "times what the step takes" in out or "of what the step takes" in out
    assert "share the CPU's cores" in out
    assert not (tmp_path / "run").exists()
    assert sorted(path.name for path in labelled_shards.iterdir()) == before


def test_shards_one_after_the_other(labelled_shards: Path, capsys):
    data = ["--data.train", str(labelled_shards), "--data.order", "shards", "--data.window", "2"]
    assert (
        dino_fast(["doctor", *TINY, *data, "--seconds", "0.05", "--data.decode", "torch", "--crops.locals", "0"]) == 0
    )
    assert COLD in capsys.readouterr().out


@pytest.mark.gpu
def test_a_gpu_has_its_stages(labelled_shards: Path, capsys):
    data = ["--data", str(labelled_shards), "--device", "cuda", "--precision", "bf16", "--data.decode", "dali"]
    assert dino_fast(["doctor", *TINY, *data, "--seconds", "0.2"]) == 0
    out = capsys.readouterr().out
    assert all(stage in out for stage in (DALI_CPU, DALI_GPU, TORCH, "cuda:0"))
    assert "share the CPU's cores" not in out


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--data", "nowhere"], 1, "nowhere"),
        (["--data", "."], 1, "make-shards pack"),
        (["--seconds", "0"], 2, "expected a number above 0"),
        (["--seconds", "long"], 2, "--seconds"),
        (["--json", "nowhere/x.jsonl"], 2, "no such folder"),
        (["--crops.local", "3"], 2, "did you mean crops.locals?"),
    ],
)
def test_wrong_calls_end_in_a_line(tmp_path: Path, monkeypatch, capsys, arguments, status: int, words: str):
    monkeypatch.chdir(tmp_path)
    assert dino_fast(["doctor", *TINY, *arguments]) == status
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("dino-fast doctor: ")
    assert words in line


def test_help_names_its_arguments(capsys):
    with pytest.raises(SystemExit) as ended:
        dino_fast(["doctor", "--help"])
    assert ended.value.code == 0
    assert {"--data", "--seconds", "--json", "--config"} <= set(capsys.readouterr().out.replace("[", " ").split())


def test_what_warms_up_is_not_counted():
    images, seconds = measured(iter([100, 3, 4]), 60, torch.device("cpu"))
    assert images == 7
    assert 0 < seconds < 1


def test_a_step_slower_than_the_loader():
    assert "The step is the bottleneck: the loader keeps up, with 7.50 times" in said(DataRecipe(decode="torch"))
    assert "--data" not in said(DataRecipe(decode="torch"))


def test_the_stall_is_what_the_loader_lacks():
    assert "gives 0.75 of what the step takes, which will stand still 25 %" in said(
        DataRecipe(decode="torch"), STEP=1000
    )
    assert "only just keeps up, with 1.05" in said(DataRecipe(decode="torch"), LOADER=105)
    assert "stand still" not in said(DataRecipe(decode="torch"), LOADER=105)
    # Loader and step take turns on one and the same cores: 1 / (1/100 + 1/100).
    assert "expect some 50.0 img/s" in said(DataRecipe(decode="torch"), ON_CPU, LOADER=100)


def test_slow_storage():
    slow = {"COLD": 50, "LOADER": 49}
    assert "Its slowest stage is storage, cold, 50.0 img/s: --data.order shards" in said(
        DataRecipe(decode="torch"), **slow
    )
    by_shards = DataRecipe(decode="torch", order="shards")
    assert "--data.order" not in said(by_shards, **slow)
    assert "--data.cache" in said(by_shards, **slow)
    assert "0.50 of what the step takes" in said(by_shards, COLD=50)  # the loader had not used up its first shards
    in_memory = Machine(on_gpu=True, cores=8, short_side=375, in_memory=True)
    first = said(DataRecipe(decode="torch"), in_memory, **slow)
    assert "The first epoch waits for storage, cold, 50.0 img/s" in first
    assert "Its slowest stage is storage, cold" not in first
    assert "the loader keeps up" in said(by_shards, in_memory, COLD=50)


@pytest.mark.parametrize(
    ("data", "machine", "rates", "flags"),
    [
        (DataRecipe(decode="dali"), ON_CPU, {"DALI_CPU": 60, "TORCH": 90}, "so try --data.decode torch."),
        (DataRecipe(decode="torch"), ON_CPU, {"DALI_CPU": 90, "TORCH": 60}, "so try --data.decode dali."),
        (
            DataRecipe(decode="dali"), ON_GPU, {"DALI_GPU": 60, "DALI_CPU": 90, "TORCH": 70},
            "so try --data.decode_device cpu.",
        ),
        (
            DataRecipe(decode="dali", decode_device="cpu"), ON_GPU, {"DALI_GPU": 90, "DALI_CPU": 60, "TORCH": 70},
            "so try --data.decode_device gpu.",
        ),
        (
            DataRecipe(decode="dali", decode_device="gpu"), ON_GPU, {"DALI_GPU": 60, "DALI_CPU": 60, "TORCH": 90},
            "so try --data.decode torch --data.decode_device cpu.",
        ),
    ],
)  # fmt: skip
def test_another_decoder_is_faster(data: DataRecipe, machine: Machine, rates: dict[str, float], flags: str):
    assert flags in said(data, machine, LOADER=55, **rates)


def test_no_decoder_is_faster():
    slow = {"TORCH": 60, "DALI_CPU": 61, "LOADER": 55}
    assert "there are 8 cores, so pass --data.threads 8" in said(DataRecipe(decode="torch", threads=4), **slow)
    line = said(DataRecipe(decode="torch", threads=8), **slow)
    assert "more cores, or fewer local views than --crops.locals 8" in line
    assert "--max-short-side" not in line
    large = Machine(on_gpu=True, cores=8, short_side=1200, in_memory=False)
    line = said(DataRecipe(decode="torch"), large, CropRecipe(locals=0), **slow)
    assert "it takes more cores, or pictures packed with `make-shards pack --max-short-side 512`" in line


def test_slow_colours():
    slow = {"AUGMENT": 60, "LOADER": 55}
    assert "--data.threads 8" in said(DataRecipe(decode="torch", threads=4), ON_CPU, **slow)
    assert "augment, 60.0 img/s: fewer local views" in said(DataRecipe(decode="torch", threads=4), ON_GPU, **slow)


def test_the_decoder_of_a_recipe():
    assert decoding(DataRecipe(decode="auto"), on_gpu=False) == TORCH
    assert decoding(DataRecipe(decode="dali"), on_gpu=False) == DALI_CPU
    assert decoding(DataRecipe(decode="auto"), on_gpu=True) == DALI_GPU
    assert decoding(DataRecipe(decode="dali", decode_device="cpu"), on_gpu=True) == DALI_CPU
