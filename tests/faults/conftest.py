"""Tiny training runs as processes of their own, to be told to stop, stopped, and killed."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from signal import SIGKILL, Signals

import pytest

from tests.dino_fast.conftest import ROOT, TINY, descendants, labeled_shards, train_here

__all__ = ["Process", "labeled_shards", "train_here"]  # the fixtures among them serve here, too

TRAIN = ("-m", "dino_fast.train")


class Process:
    """A command under way. What it prints goes to two files, so that it can be read at any time."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], prints: Path) -> None:
        self._out, self._err = prints.with_suffix(".out"), prints.with_suffix(".err")
        with open(self._out, "wb") as out, open(self._err, "wb") as err:
            self._process = subprocess.Popen(
                command, stdout=out, stderr=err, env={**os.environ, **environment}, start_new_session=True
            )
        self.pid = self._process.pid

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    @property
    def steps(self) -> int:
        """Steps that it has told of."""
        return self.out.count("  step ")

    def ranks(self) -> list[int]:
        """torchrun's ranks under way, by process id, rank 0 first."""
        with_rank = []
        for pid in descendants(self.pid):
            with contextlib.suppress(OSError):  # ended meanwhile
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                with_rank += [(int(word[5:]), pid) for word in words if word.startswith(b"RANK=")]
        return [pid for _, pid in sorted(with_rank)]

    def catches(self, number: Signals) -> bool:
        """Whether it has a handler for a signal yet."""
        [mask] = [line.split()[1] for line in Path(f"/proc/{self.pid}/status").read_text().splitlines()
                  if line.startswith("SigCgt")]  # fmt: skip
        return bool(int(mask, 16) >> (number - 1) & 1)

    def tell(self, number: Signals) -> None:
        """Send it a signal; nothing happens where it has ended."""
        self._process.send_signal(number)

    def tell_until_it_ends(self, number: Signals) -> None:
        """Again and again, to the last moment."""
        while self._process.poll() is None:
            self.tell(number)
            time.sleep(0.0005)

    def wait_until(self, condition: Callable[[], bool], timeout: float = 240) -> bool:
        """Wait until `condition` holds. False if the command ended before."""
        deadline = time.monotonic() + timeout
        while not condition():
            if self._process.poll() is not None:
                return condition()
            assert time.monotonic() < deadline, f"the moment never came:\n{self.out}\n{self.err}"
            time.sleep(0.005)
        return True

    def wait(self, timeout: float = 240) -> int:
        """Its exit status."""
        return self._process.wait(timeout)

    def kill(self) -> None:
        """kill -9 the command and all that it started. torchrun's ranks are in process groups of their own."""
        for pid in [*descendants(self.pid), self.pid] if self._process.poll() is None else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, SIGKILL)
        self._process.wait()


@pytest.fixture
def start(labeled_shards: Path, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """A function that starts the tiny training command; what is left of it is killed at the end.

    output: a name below the test's folder, or a path; before: between python and the command's own arguments.
    """
    started: list[Process] = []

    def start(
        *arguments: str, output: str | Path = "run", before: Sequence[str] = TRAIN, **environment: str
    ) -> Process:
        command = [sys.executable, "-W", "error::UserWarning", *before, *TINY]
        command += ["--data.train", str(labeled_shards), "--output", str(tmp_path / output), *arguments]
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        started.append(Process(command, environment, tmp_path / f"process-{len(started)}"))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def start_ranks(start: Callable[..., Process]) -> Callable[..., list[Process]]:
    """A function that starts two ranks without torchrun, so that nobody else reacts to what happens to one."""

    def start_ranks(*arguments: str, output: str = "run", before: Sequence[str] = TRAIN) -> list[Process]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return [
            start(*arguments, output=output, before=before, RANK=str(rank), LOCAL_RANK=str(rank), **meeting)
            for rank in range(2)
        ]

    return start_ranks


@pytest.fixture
def torchrun(start: Callable[..., Process]) -> Callable[..., Process]:
    """A function that starts two ranks by torchrun; options: torchrun's own."""

    def torchrun(*arguments: str, output: str = "run", options: Sequence[str] = (), **environment: str) -> Process:
        port = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")  # a free one, for tests side by side
        before = ("-m", "torch.distributed.run", "--nproc_per_node", "2", *port, *options, *TRAIN)
        return start(*arguments, output=output, before=before, **environment)

    return torchrun
