"""The doctor measures every stage, and its advice names the slowest one and a setting that makes it faster."""

import json
from pathlib import Path

import pytest
import torch

from dino_fast.__main__ import main as dino_fast
from dino_fast.advise.advice import (
    AUGMENT,
    BESIDE_STEP,
    DALI_CPU,
    DALI_GPU,
    DALI_SPLIT,
    LOADER,
    MEMORY,
    STEP,
    STORAGE,
    TORCH,
    Machine,
    find_decode_stage,
    give_advice,
)
from dino_fast.advise.doctor import time_work
from pipelines.crops import CropRecipe
from pipelines.loader import DataRecipe, choose_decoder
from shards.index import ShardIndex
from tests.dino_fast.conftest import TINY

# Stages in img/s; the loader is never slower than the step unless a case says so.
QUICK = {STORAGE: 900.0, MEMORY: 9000.0, TORCH: 800.0, AUGMENT: 5000.0, LOADER: 750.0, STEP: 100.0}
ON_CPU = Machine(on_gpu=False, cores=8, short_side=375, fits_in_memory=False)
ON_GPU = Machine(on_gpu=True, cores=8, short_side=375, fits_in_memory=False)


def advise(data: DataRecipe, machine: Machine = ON_GPU, crops: CropRecipe | None = None, **rates: float) -> str:
    """Return the advice on QUICK with other figures, given by the names of the stages' constants."""
    changed = QUICK | {globals()[name]: rate for name, rate in rates.items()}
    return " ".join(give_advice(changed, data, crops or CropRecipe(), machine))


def test_the_command_measures_every_stage(labeled_shards: Path, tmp_path: Path, capsys):
    before = sorted(path.name for path in labeled_shards.iterdir())
    file = tmp_path / "figures.jsonl"
    calls = [*TINY, "--output", str(tmp_path / "run"), "--seconds", "0.2", "--json", str(file)]
    assert dino_fast(["doctor", "--data", str(labeled_shards), *calls]) == 0
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    stages = {row["stage"]: row for row in rows}
    assert {STORAGE, MEMORY, TORCH, AUGMENT, LOADER, STEP} <= stages.keys() <= {*QUICK, DALI_CPU}
    assert all(row["images_per_s"] > 0 and row["seconds"] > 0 and row["stage"] in out for row in rows)
    assert stages[STEP]["times_training_step"] == 1
    assert stages[LOADER]["times_training_step"] == pytest.approx(
        stages[LOADER]["images_per_s"] / stages[STEP]["images_per_s"]
    )
    with ShardIndex(labeled_shards) as index:
        mean = index.records["size"].mean() / 1e6
    assert stages[MEMORY]["mb_per_s"] == pytest.approx(stages[MEMORY]["images_per_s"] * mean)
    assert "times as fast" in out
    assert "share the CPU cores" in out
    assert not (tmp_path / "run").exists()
    assert sorted(path.name for path in labeled_shards.iterdir()) == before


def test_whole_shards_are_read_where_the_recipe_does_so(labeled_shards: Path, capsys):
    data = ["--data.train", str(labeled_shards), "--data.order", "shards", "--data.shuffle_window", "2"]
    assert (
        dino_fast(["doctor", *TINY, *data, "--seconds", "0.05", "--data.decode", "torch", "--crops.locals", "0"]) == 0
    )
    assert STORAGE in capsys.readouterr().out


@pytest.mark.gpu
def test_a_gpu_has_its_stages(labeled_shards: Path, capsys):
    data = ["--data", str(labeled_shards), "--device", "cuda", "--precision", "bf16", "--data.decode", "dali"]
    assert dino_fast(["doctor", *TINY, *data, "--seconds", "0.2"]) == 0
    out = capsys.readouterr().out
    assert all(stage in out for stage in (DALI_CPU, DALI_SPLIT, DALI_GPU, TORCH, "cuda:0"))
    assert "share the CPU cores" not in out


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--data", "nowhere"], 1, "nowhere"),
        (["--data", "."], 1, "make-shards pack"),
        (["--seconds", "0"], 2, "--seconds expects a number above 0, not '0'"),
        (["--seconds", "long"], 2, "--seconds"),
        (["--json", "nowhere/x.jsonl"], 2, "does not exist. Create it first."),
        (["--crops.local", "3"], 2, "did you mean crops.locals?"),
    ],
)
def test_wrong_calls_are_one_line(tmp_path: Path, monkeypatch, capsys, arguments, status: int, words: str):
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


def test_warm_up_items_are_not_counted():
    images, seconds = time_work(iter([100, 3, 4]), 60, torch.device("cpu"))
    assert images == 7
    assert 0 < seconds < 1


def test_a_loader_faster_than_the_step_needs_no_setting():
    advice = advise(DataRecipe(decode="torch"))
    assert "The training step is the bottleneck: the loader is 7.50 times as fast." in advice
    assert "--data" not in advice


def test_the_step_waits_for_a_slow_loader():
    torch_decodes = DataRecipe(decode="torch")
    line = "0.75 times as fast as the training step, which will wait for data 25 %"
    assert line in advise(torch_decodes, STEP=1000)
    assert "only just fast enough: it is 1.05 times as fast" in advise(torch_decodes, LOADER=105)
    assert "wait for data" not in advise(torch_decodes, LOADER=105)
    # Loader and step take turns on the same cores: 1 / (1/100 + 1/100).
    assert "Expect about 50.0 img/s" in advise(torch_decodes, ON_CPU, LOADER=100)


def test_slow_storage_is_named():
    slow = {"STORAGE": 50, "LOADER": 49}
    line = "Its slowest stage is reading from storage, with 50.0 img/s. Pass --data.order shards"
    assert line in advise(DataRecipe(decode="torch"), **slow)
    by_shards = DataRecipe(decode="torch", order="shards")
    assert "--data.order" not in advise(by_shards, **slow)
    assert "--data.cache" in advise(by_shards, **slow)
    # The loader was only measured on the shards that it had read at the start.
    assert "0.50 times as fast as the training step" in advise(by_shards, STORAGE=50)
    in_memory = Machine(on_gpu=True, cores=8, short_side=375, fits_in_memory=True)
    first = advise(DataRecipe(decode="torch"), in_memory, **slow)
    assert "The first epoch is slower, because reading from storage gives 50.0 img/s" in first
    assert "Its slowest stage is reading from storage" not in first
    assert "The loader needs no change" in advise(by_shards, in_memory, STORAGE=50)


@pytest.mark.parametrize(
    ("data", "machine", "rates", "flags"),
    [
        (DataRecipe(decode="dali"), ON_CPU, {"DALI_CPU": 60, "TORCH": 90}, "Pass --data.decode torch, since"),
        (DataRecipe(decode="torch"), ON_CPU, {"DALI_CPU": 90, "TORCH": 60}, "Pass --data.decode dali, since"),
        (
            DataRecipe(decode="dali"), ON_GPU, {"DALI_GPU": 60, "DALI_SPLIT": 60, "DALI_CPU": 90, "TORCH": 70},
            "Pass --data.decode_device cpu, since",
        ),
        (
            DataRecipe(decode="dali", decode_device="cpu"), ON_GPU,
            {"DALI_GPU": 90 / BESIDE_STEP, "DALI_SPLIT": 80, "DALI_CPU": 60, "TORCH": 70},
            "Pass --data.decode_device gpu, since",
        ),
        (
            DataRecipe(decode="dali", decode_device="gpu"), ON_GPU,
            {"DALI_GPU": 150, "DALI_SPLIT": 90, "DALI_CPU": 60, "TORCH": 70},
            "Pass --data.decode_device split, since decoding by DALI (CPU, crops on the GPU) gives 90.0 img/s",
        ),
        (
            DataRecipe(decode="dali", decode_device="gpu"), ON_GPU, {"DALI_GPU": 60, "DALI_CPU": 60, "TORCH": 90},
            "Pass --data.decode torch --data.decode_device cpu, since",
        ),
    ],
)  # fmt: skip
def test_a_faster_decoder_is_named(data: DataRecipe, machine: Machine, rates: dict[str, float], flags: str):
    assert flags in advise(data, machine, LOADER=55, **rates)


def test_without_a_faster_decoder_cores_or_less_work_are_named():
    slow = {"TORCH": 60, "DALI_CPU": 61, "LOADER": 55}
    assert "Pass --data.threads 8, since there are 8 CPU cores" in advise(DataRecipe(decode="torch", threads=4), **slow)
    line = advise(DataRecipe(decode="torch", threads=8), **slow)
    assert "It needs more CPU cores, or fewer local views than --crops.locals 8" in line
    assert "--max-short-side" not in line
    large = Machine(on_gpu=True, cores=8, short_side=1200, fits_in_memory=False)
    line = advise(DataRecipe(decode="torch"), large, CropRecipe(locals=0), **slow)
    assert "It needs more CPU cores, or smaller images (`make-shards pack --max-short-side 512`)" in line


def test_slow_augmentation():
    slow = {"AUGMENT": 60, "LOADER": 55}
    assert "--data.threads 8" in advise(DataRecipe(decode="torch", threads=4), ON_CPU, **slow)
    assert "augmentation, with 60.0 img/s. Pass fewer local views" in advise(
        DataRecipe(decode="torch", threads=4), ON_GPU, **slow
    )


def test_decoding_on_the_gpu_counts_what_is_left_of_it_beside_the_step():
    on_gpu = DataRecipe(decode_device="gpu")
    advice = advise(on_gpu, STEP=1000, DALI_GPU=2000, LOADER=1900)
    assert "it is 0.80 times as fast as the training step" in advice
    assert "counts 40 % of the speed that it has alone" in advice
    assert "0.70 times" in advise(on_gpu, STEP=1000, DALI_GPU=2000, LOADER=700)  # something else is slower
    assert "counts" not in advise(DataRecipe(decode_device="split"), STEP=1000, DALI_SPLIT=2000, LOADER=1900)


@pytest.mark.parametrize(
    ("data", "device", "threads", "stage"),
    [
        (DataRecipe(), "cpu", 16, TORCH),
        (DataRecipe(decode="dali"), "cpu", 16, DALI_CPU),
        (DataRecipe(), "cuda", 16, DALI_SPLIT),
        (DataRecipe(), "cuda", 8, DALI_SPLIT),
        (DataRecipe(), "cuda", 7, DALI_GPU),
        (DataRecipe(decode_device="gpu"), "cuda", 16, DALI_GPU),
        (DataRecipe(decode_device="split"), "cuda", 2, DALI_SPLIT),
        (DataRecipe(decode_device="cpu"), "cuda", 16, TORCH),
        (DataRecipe(decode="dali", decode_device="cpu"), "cuda", 16, DALI_CPU),
        (DataRecipe(decode="torch"), "cuda", 16, TORCH),
    ],
)
def test_the_decoder_of_a_run(data: DataRecipe, device: str, threads: int, stage: str):
    assert find_decode_stage(choose_decoder(data, torch.device(device), threads)) == stage
