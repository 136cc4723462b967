"""Linear evaluation and fine-tuning as processes: killed at any moment, and on two ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.dino_fast.conftest import ROOT

pytestmark = pytest.mark.slow

FINETUNE = ["finetune", "--epochs", "3", "--batch", "10", "--lrs", "0.001,0.002"]
LINEAR = ["linear", "--protocol", "published", "--epochs", "3", "--batch", "12", "--lrs", "0.03,0.3"]


@pytest.fixture
def start(train_here, labeled_shards: Path, tmp_path: Path, capsys):
    """A function that starts a command on a ViT-Ti for 32 pixels in a folder of its own, on so many ranks."""
    vit = ("--backbone", "vit_tiny_patch16", "--crops.global_size", "32", "--crops.local_size", "32")
    assert train_here(tmp_path / "run", *vit, "--max_steps", "1") == 0
    started = []

    def run(command: list[str], name: str, ranks: int = 1) -> subprocess.Popen:
        launch = ["torch.distributed.run", "--nproc_per_node", str(ranks), "--rdzv-backend", "c10d"]
        launch = [*launch, "--rdzv-endpoint", "localhost:0", "-m", "dino_fast"] if ranks > 1 else ["dino_fast"]
        shards = str(labeled_shards)
        flags = ["--checkpoint", str(tmp_path / "run"), "--train", shards, "--val", shards, "--device", "cpu"]
        flags += ["--output", str(tmp_path / name), "--json", str(tmp_path / f"{name}.json")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-m", *launch, *command, *flags]
        started.append(subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, start_new_session=True))
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read_scores(tmp_path: Path, name: str) -> dict:
    return json.loads((tmp_path / f"{name}.json").read_text().replace(str(tmp_path / name), ""))


def read_weights(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "classifier-lr-0.002.pt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("command", [FINETUNE, LINEAR], ids=["finetune", "linear"])
def test_a_killed_process_goes_on_to_the_same_bits(command: list[str], start, tmp_path: Path):
    assert start(command, "whole").wait(timeout=500) == 0
    kills = 0
    for _ in range(20):
        seen = set((tmp_path / "killed").glob("step-*.pt"))
        process = start(command, "killed")
        while process.poll() is None and set((tmp_path / "killed").glob("step-*.pt")) <= seen:
            time.sleep(0.01)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
    assert (process.returncode, kills >= 2) == (0, True)
    assert read_scores(tmp_path, "whole") == read_scores(tmp_path, "killed")
    if command is FINETUNE:
        whole, killed = (read_weights(tmp_path / name) for name in ("whole", "killed"))
        assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_two_ranks_fine_tune_as_one(start, tmp_path: Path):
    """A rank's share of 5 images leaves one image without a neighbor, so the batch is 8 here."""
    command = [*FINETUNE[:3], "--batch", "8", "--lrs", "0.002"]
    assert start(command, "one").wait(timeout=500) == 0
    assert start(command, "two", ranks=2).wait(timeout=500) == 0
    one, two = (read_weights(tmp_path / name) for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)
    first, second = (read_scores(tmp_path, name)["finetune"][0] for name in ("one", "two"))
    assert first["history"][-1]["loss"] == pytest.approx(second["history"][-1]["loss"], rel=1e-3)
    assert first["top1"] == pytest.approx(second["top1"], abs=2.6)  # one image of 40


def test_two_ranks_train_the_same_heads_as_one(start, tmp_path: Path):
    for name, ranks in (("one", 1), ("two", 2)):
        assert start(LINEAR, name, ranks).wait(timeout=500) == 0
    one, two = (read_scores(tmp_path, name) for name in ("one", "two"))
    assert one["losses"][-1] == pytest.approx(two["losses"][-1], rel=1e-4)
    assert [score["top1"] for score in one["linear"]] == pytest.approx([score["top1"] for score in two["linear"]])
