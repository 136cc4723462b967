"""SIGTERM and SIGUSR1, by which clusters take a machine back: all ranks stop after the same step."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from dino_fast.distributed import Ranks
from shards.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOPPED_BY_SIGNAL = 85  # exit status of a run that was asked to stop: neither an error nor the end of the run


class StoppedBySignal(UserError):
    """The run was asked to stop, and its checkpoint is written."""


@contextlib.contextmanager
def exit_at_signal_during_setup() -> Iterator[None]:
    """Let the two signals end the process at once, with status 85, while a run is set up and has nothing to save.

    Handlers that somebody installs meanwhile are kept. A thread ends the process, and a byte wakes it: Python's own
    handlers wait for the main thread, which may be waiting for other ranks.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = {number: signal.signal(number, _exit_process) for number in SIGNALS}
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            if signal.getsignal(number) is _exit_process:
                signal.signal(number, handler)
        os.close(writer)


def _watch(reader: int) -> None:
    """Read the numbers of signals until the other end of the pipe is closed."""
    with open(reader, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            if number[0] in SIGNALS and signal.getsignal(number[0]) is _exit_process:
                _exit_process(number[0], None)


_ending = threading.Lock()


def _exit_process(_: int, __: FrameType | None) -> None:
    """End the process. An exception could be caught by any library that is at work.

    The main thread and the watching one may both come here; the second returns, and the first ends the process.
    """
    if not _ending.acquire(blocking=False):
        return
    os.write(2, b"dino-fast train: stopped by a signal while no step was running. The same command again resumes.\n")
    os._exit(STOPPED_BY_SIGNAL)


class StopSignal:
    """Takes the two signals for as long as it is entered. The ranks leave it together.

    A signal may come twice, from torchrun and from the one who signaled torchrun. The second one must not end the
    process while its checkpoint is being written.
    """

    def __init__(self, ranks: Ranks, timeout: float = 600) -> None:
        """timeout: seconds that ranks wait for each other at most."""
        self._asked = False
        self._alone = ranks.world == 1
        # A group on CPUs: its messages must neither wait for the GPU's work nor mix with it.
        self._group: Any = None if self._alone else dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self._votes: torch.Tensor | None = None
        self._vote: dist.Work | None = None

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._group is not None:
            dist.barrier(group=self._group)  # nobody leaves, and nobody is hit, before the last checkpoint is written
        if self._asked:
            return  # the process is about to end, and a repeated signal must not change its status
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, _: int, __: FrameType | None) -> None:
        self._asked = True

    def all_ranks_stop(self) -> bool:
        """Return whether to stop after this step, the same on all ranks. Every rank must call it after every step.

        The ranks' votes of one step are counted while the next one runs, so the answer is one step old.
        """
        if self._alone:
            return self._asked
        stop = False
        if self._vote is not None and self._votes is not None:
            self._vote.wait()
            stop = bool(self._votes.item())
            self._asked |= stop
        self._votes = torch.tensor(float(self._asked))
        self._vote = dist.all_reduce(self._votes, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return stop
