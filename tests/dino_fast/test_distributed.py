"""Processes that were started without torchrun, and GPUs that nobody uses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dino_fast.__main__ import main as dino_fast
from dino_fast.distributed import Ranks, drop_local_rank, join_ranks
from dino_fast.run.build import warn_of_idle_gpus
from dino_fast.train import main as train
from shards.errors import UserError
from tests.dino_fast.conftest import ROOT, TINY

VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS",
    "OMPI_COMM_WORLD_SIZE", "PMI_SIZE",
)  # fmt: skip
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch):
    """A function that sets these variables, and removes all others that launchers set."""

    def use(variables: dict[str, str]) -> None:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return use


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"SLURM_NTASKS": "4"}, "SLURM_NTASKS is 4: srun without torchrun would start that many runs, each alone"),
        ({"SLURM_NTASKS": "2", **ADDRESS}, "env -u SLURM_NTASKS dino-fast train"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun without torchrun"),
        ({"PMI_SIZE": "2"}, "mpiexec with one task a machine, and in it torchrun --nproc_per_node GPUS"),
        ({"WORLD_SIZE": "2"}, "has WORLD_SIZE, but not RANK and MASTER_ADDR and MASTER_PORT, so the ranks cannot"),
        ({"WORLD_SIZE": "2", "SLURM_NTASKS": "2", **ADDRESS}, "but not RANK, so the ranks cannot find each other"),
        ({"RANK": "0"}, "has RANK, but not WORLD_SIZE and MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "but not MASTER_ADDR, so"),
    ],
    ids=str,
)
def test_processes_that_do_not_know_each_other_are_refused(environment, variables: dict[str, str], words: str) -> None:
    environment(variables)
    with pytest.raises(UserError) as caught, join_ranks("cpu"):
        pytest.fail("it would train alone")
    assert words in str(caught.value)
    assert "torchrun --nproc_per_node GPUS -m dino_fast.train" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "variables",
    [{}, {"SLURM_NTASKS": "1"}, {"SLURM_NTASKS": ""}, {"WORLD_SIZE": "1"}, ADDRESS, {"OMPI_COMM_WORLD_SIZE": "1"}],
    ids=str,
)
def test_one_process_is_no_error(environment, variables: dict[str, str]) -> None:
    environment(variables)
    with join_ranks("cpu") as ranks:
        assert (ranks.rank, ranks.world) == (0, 1)


def test_ranks_of_torchrun_in_a_job_with_many_tasks_are_no_error(environment) -> None:
    environment({"SLURM_NTASKS": "2", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
    with join_ranks("cpu") as ranks:
        assert ranks.world == 1


def test_train_and_doctor_under_srun_end_in_one_line_and_write_nothing(
    environment, train_here, labeled_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment({"SLURM_NTASKS": "8"})
    assert train_here(tmp_path / "run") == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("dino-fast train: SLURM_NTASKS is 8")
    assert not (tmp_path / "run").exists()
    assert dino_fast(["doctor", "--data", str(labeled_shards), "--device", "cpu"]) == 1
    assert capsys.readouterr().err.startswith("dino-fast doctor: SLURM_NTASKS is 8")


@pytest.mark.parametrize("flag", [["--local_rank=0"], ["--local-rank=0"], ["--local_rank", "0"]], ids=str)
def test_the_flag_of_the_old_launcher_is_ignored_and_the_first_rank_says_so(
    environment, capsys: pytest.CaptureFixture[str], flag: list[str]
) -> None:
    for rank, lines in (("0", 1), ("1", 0)):
        environment({"RANK": rank})
        assert drop_local_rank([*flag, "--seed", "3"]) == ["--seed", "3"]
        assert drop_local_rank(["--seed", "3", *flag]) == ["--seed", "3"]
        assert capsys.readouterr().err.count("use torchrun --nproc_per_node") == 2 * lines
    environment({})
    for main in (train, dino_fast):
        command = ["train"] if main is dino_fast else []
        assert main([*flag, *command, "--no.such", "3"]) == 2
        ignored, wrong = capsys.readouterr().err.strip().splitlines()
        assert ignored.startswith("--local_rank is ignored")
        assert "unknown setting no.such" in wrong


@pytest.mark.slow
def test_the_old_launcher_starts_two_ranks(labeled_shards: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    where = ["--data.train", str(labeled_shards), "--output", str(tmp_path / "run"), "--max_steps", "1"]
    command += ["-m", "dino_fast.train", *TINY, *where]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("--local_rank is ignored") == 1
    assert "2 ranks on cpu" in result.stdout


@pytest.mark.parametrize(
    ("count", "world", "device", "local", "said"),
    [
        (4, 1, "cuda", None, "This run uses 1 of the 4 GPUs of this machine. To use all: torchrun --nproc_per_node 4"),
        (4, 2, "cuda", "2", "This run uses 2 of the 4 GPUs"),
        (4, 8, "cuda", "4", ""),
        (4, 8, "cuda", None, ""),
        (1, 1, "cuda", None, ""),
        (4, 1, "cpu", None, ""),
    ],
)
def test_gpus_that_a_run_leaves_idle_are_said(
    environment, monkeypatch, count: int, world: int, device: str, local: str | None, said: str
) -> None:
    environment({"LOCAL_WORLD_SIZE": local} if local else {})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    lines = warn_of_idle_gpus(Ranks(0, world, torch.device(device)))
    assert len(lines) == bool(said)
    assert "".join(lines).startswith(said)


def test_a_run_says_what_its_machine_leaves_idle(train_here, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("dino_fast.run.build.warn_of_idle_gpus", lambda ranks: ["This run uses 1 of the 4 GPUs"])
    assert train_here(tmp_path / "run", "--max_steps", "1") == 0
    assert capsys.readouterr().out.count("This run uses 1 of the 4 GPUs") == 1
