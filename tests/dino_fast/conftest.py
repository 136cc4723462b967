import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino_fast.train import main
from shards.__main__ import main as make_shards

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def labeled_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 small labeled images: class 0 dark with bright bars, class 1 the reverse. Not to be changed."""
    folder = tmp_path_factory.mktemp("labeled")
    for label in range(2):
        (folder / "images" / f"class_{label}").mkdir(parents=True)
        for number in range(20):
            rng = np.random.default_rng([label, number])
            height, width = rng.integers(48, 96, 2)
            levels = np.full((height, width, 3), 40 + 170 * label) + rng.normal(0, 15, (height, width, 3))
            levels[:: int(rng.integers(6, 12))] = 220 - 170 * label
            image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
            image.save(folder / "images" / f"class_{label}" / f"{number:02d}.jpg", quality=92)
    out = folder / "shards"
    assert make_shards(["pack", str(folder / "images"), str(out), "--shard-size", "50kB", "--workers", "1"]) == 0
    return out


TINY = (
    "--config", str(ROOT / "configs" / "debug.yaml"), "--batch_size", "8", "--epochs", "4", "--max_steps", "12",
    "--crops.global_size", "32", "--crops.local_size", "24", "--log_every", "1", "--checkpoint.every", "3 steps",
    "--head.hidden_dim", "32", "--head.bottleneck_dim", "16", "--head.out_dim", "32", "--device", "cpu",
    "--data.threads", "1",
)  # fmt: skip


@pytest.fixture
def train_here(labeled_shards: Path) -> Callable[..., int]:
    """A function that runs a tiny training in this process; returns its exit status."""

    def train(output: Path, *arguments: str) -> int:
        return main([*TINY, "--data.train", str(labeled_shards), "--output", str(output), *arguments])

    return train


@pytest.fixture
def run(labeled_shards: Path, tmp_path: Path) -> Callable[..., "Run"]:
    """A function that starts a tiny training command in a process group of its own; all are killed at the end."""
    started: list[Run] = []

    def start(*arguments: str, output: str = "run", ranks: int = 1, tiny: bool = True) -> Run:
        data = ["--data.train", str(labeled_shards), "--output", str(tmp_path / output)] if tiny else []
        started.append(Run([*(TINY if tiny else ()), *data, *arguments], ranks))
        return started[-1]

    yield start
    for process in started:
        process.kill()


class Run:
    """A training command under way."""

    def __init__(self, arguments: Sequence[str], ranks: int) -> None:
        command = [sys.executable, "-W", "error::UserWarning", "-m"]
        if ranks > 1:
            # A free port each, so that tests may run side by side.
            command += ["torch.distributed.run", "--nproc_per_node", str(ranks), "--rdzv-backend", "c10d"]
            command += ["--rdzv-endpoint", "localhost:0", "-m"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [*command, "dino_fast.train", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
        )  # fmt: skip

    def finish(self, timeout: float = 240) -> tuple[int, str, str]:
        """Wait; exit status, standard output and standard error."""
        out, err = self._process.communicate(timeout=timeout)
        return self._process.returncode, out, err

    def wait_until(self, condition: Callable[[], bool], timeout: float = 120) -> bool:
        """Wait until `condition` holds. False if the run ended before."""
        deadline = time.monotonic() + timeout
        while not condition():
            if self._process.poll() is not None:
                return False
            assert time.monotonic() < deadline, "the moment never came"
            time.sleep(0.001)
        return True

    def kill_when(self, condition: Callable[[], bool]) -> bool:
        """kill -9 all of it as soon as `condition` holds. False if the run ended before."""
        waited = self.wait_until(condition)
        self.kill()
        return waited

    def kill(self) -> None:
        """kill -9 the command and all that it started. torchrun's ranks are in process groups of their own."""
        for pid in [*descendants(self._process.pid), self._process.pid] if self._process.poll() is None else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.communicate()


def descendants(pid: int) -> list[int]:
    """The processes below `pid`, from /proc."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [other for child in children for other in (child, *descendants(child))]
