"""The thread that writes a run's checkpoints beside its steps."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_fast import checkpoint
from dino_fast.config import Recipe
from dino_fast.distributed import Ranks
from dino_fast.run.schedules import Schedules

RETRY_PAUSES = (10.0, 60.0, 300.0)  # seconds before a write that failed is tried again


@contextlib.contextmanager
def open_checkpoint_writer(
    recipe: Recipe, ranks: Ranks, schedules: Schedules, say: Callable[[str], None]
) -> Iterator["CheckpointWriter | None"]:
    """Give the first rank the writer of the run's checkpoints, the others None.

    At the end, all that it was given is on the disk. `say` prints a line.
    """
    if not ranks.first:
        yield None
        return
    writer = CheckpointWriter(
        Path(recipe.output), recipe.checkpoint.keep, schedules.steps(recipe.checkpoint.keep_every), say
    )
    try:
        yield writer
    except BaseException:
        writer.abandon()
        raise
    writer.close()


class CheckpointWriter:
    """Copies the state of a run at once, and writes the copy in a thread.

    It writes one checkpoint at a time, and prunes those before. A write that fails leaves the ones before as they are.
    It is tried again after a while, unless a newer checkpoint is to be written instead.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int, say: Callable[[str], None]) -> None:
        """keep and keep_every (steps): as in `checkpoint.prune`; say: prints a line, from any thread."""
        self._folder, self._keep, self._keep_every, self._say = folder, keep, keep_every, say
        self._changed = threading.Condition()
        self._next: tuple[int, Any] | None = None
        self._busy = self._writing = self._hurried = self._closed = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
        self._thread.start()

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Have the checkpoint of `step` written. Waits while the one before is being written."""
        copied = _HostCopy(state)
        with self._changed:
            self._changed.wait_for(lambda: self._next is None and not self._writing)
            self._next = step, copied
            self._changed.notify_all()

    def wait_until_idle(self) -> None:
        """Wait until nothing is being written, without trying again what has failed."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._busy and self._next is None)
            self._hurried = False

    def close(self) -> None:
        """Write what is left. Raises the error that kept the newest checkpoint from being written."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy and self._next is None)
        self._stop()
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """Write what is left after another error, without trying again, and raise nothing."""
        self._stop()

    def _stop(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next is not None or self._closed)
                if self._next is None:
                    return
                (step, state), self._next = self._next, None
                self._busy = True
            self._write_with_retries(step, state)
            del state  # as large as the networks
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _write_with_retries(self, step: int, state: "_HostCopy") -> None:
        for pause in (*RETRY_PAUSES, None):
            self._error = self._write(step, state)
            if self._error is None:
                return
            last = pause is None or self._closed or self._hurried
            retry = "" if last else f" It is tried again in {pause:.0f} s, and the run goes on."
            message = str(self._error).rstrip(".") + "."
            with contextlib.suppress(Exception):  # the full disk may be the one that is printed to
                self._say(f"{message}{retry}")
            with self._changed:
                if self._changed.wait_for(lambda: self._next is not None or self._closed or self._hurried, pause or 0):
                    return

    def _write(self, step: int, state: "_HostCopy") -> Exception | None:
        """Write and prune once. Returns the error, if there was one."""
        with self._changed:
            self._writing = True
        try:
            checkpoint.save(self._folder, step, state.get())
            checkpoint.prune(self._folder, self._keep, self._keep_every)
        except Exception as error:  # whatever it is, it must not end with the thread unseen
            return error
        finally:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
        return None


class _HostCopy:
    """A copy of a state in the host's memory. From a GPU, the copies are under way in the order of its stream."""

    def __init__(self, state: Any) -> None:
        self._state = _copy_tensors(state)
        self._done = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if self._done is not None:
            self._done.record()

    def get(self) -> Any:
        """Return the copied state, when it is there."""
        if self._done is not None:
            self._done.synchronize()
        return self._state


def _copy_tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone() if value.device.type == "cpu" else _copy_to_host(value)
    if isinstance(value, dict):
        return {name: _copy_tensors(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy_tensors(item) for item in value)
    return value


def _copy_to_host(value: Tensor) -> Tensor:
    pinned = torch.empty_like(value, device="cpu", pin_memory=True)
    return pinned.copy_(value.detach(), non_blocking=True)
