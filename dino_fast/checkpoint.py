"""Checkpoints: one file a save, complete or absent, and verified when it is read.

A file is named after its step and the start of its own sha256, `step-00001200-9f86d081884c7d65.pt`: it is written under
a temporary name, synced, and renamed, so a file under its final name is whole, and what a disk did to it later shows.
"""

import contextlib
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shards.errors import UserError
from shards.layout import file_sha256
from shards.storage.output import sync_folder

FORMAT = 1
PAUSES = (10.0, 60.0, 300.0)  # seconds before a write that failed is tried again
_NAME = re.compile(r"step-(\d{8,})-([0-9a-f]{16})\.pt")


class Damaged(UserError):
    """A checkpoint whose bytes are not those that were written."""


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` as the checkpoint of `step` (steps done so far); UserError where the disk does not take it."""
    temporary = folder / f".writing-{step:08d}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".writing-*.pt"):  # by a kill; they may be the space that a full disk lacks
            left.unlink(missing_ok=True)
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, "step": step, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        final = folder / f"step-{step:08d}-{_digest(temporary)}.pt"
        os.replace(temporary, final)
        sync_folder(folder)
        for path in checkpoints(folder):
            if step_of(path) == step and path != final:  # from before the run went back to this step
                path.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{folder}: the checkpoint of step {step} could not be written ({error}); free some space or "
            "check permissions, and run the same command again: the checkpoint before is good"
        ) from error
    return final


class Writer:
    """Writes a run's checkpoints beside its steps: the state is copied at once, a thread writes the copy.

    One at a time, each pruning those before. A write that fails leaves the ones before as they are; it is tried again
    after a while, or the next checkpoint instead of it.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int, say: Callable[[str], None]) -> None:
        """keep and keep_every (steps): as in `prune`; say: prints a line, from any thread."""
        self._folder, self._keep, self._keep_every, self._say = folder, keep, keep_every, say
        self._changed = threading.Condition()
        self._next: tuple[int, Any] | None = None
        self._busy = self._writing = self._hurried = self._closed = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
        self._thread.start()

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Have the checkpoint of `step` written. Waits while the one before is being written."""
        copied = _Copy(state)
        with self._changed:
            self._changed.wait_for(lambda: self._next is None and not self._writing)
            self._next = step, copied
            self._changed.notify_all()

    def settle(self) -> None:
        """Wait until nothing is being written, without trying again what has failed."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._busy and self._next is None)
            self._hurried = False

    def close(self) -> None:
        """Write what is left. Raises what kept the newest checkpoint from being written."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy and self._next is None)
        self._stop()
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """Write what is left, without trying again, and raise nothing: after another error."""
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
            self._write(step, state)
            del state  # as large as the networks
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _write(self, step: int, state: "_Copy") -> None:
        for pause in (*PAUSES, None):
            self._error = self._written(step, state)
            if self._error is None:
                return
            over = pause is None or self._closed or self._hurried
            with contextlib.suppress(Exception):  # the full disk may be the one that is printed to
                self._say(
                    f"{self._error}"
                    if over
                    else f"{self._error}; it is tried again in {pause:.0f} s, and the run goes on"
                )
            with self._changed:
                if self._changed.wait_for(lambda: self._next is not None or self._closed or self._hurried, pause or 0):
                    return

    def _written(self, step: int, state: "_Copy") -> Exception | None:
        with self._changed:
            self._writing = True
        try:
            save(self._folder, step, state.get())
            prune(self._folder, self._keep, self._keep_every)
        except Exception as error:  # whatever it is, it must not end with the thread unseen
            return error
        finally:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
        return None


class _Copy:
    """A state as it is now, copied to the host; from a GPU the copies are under way, in the stream's order."""

    def __init__(self, state: Any) -> None:
        self._state = _mapped(state)
        self._done = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if self._done is not None:
            self._done.record()

    def get(self) -> Any:
        if self._done is not None:
            self._done.synchronize()
        return self._state


def _mapped(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone() if value.device.type == "cpu" else _to_host(value)
    if isinstance(value, dict):
        return {name: _mapped(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(item) for item in value)
    return value


def _to_host(value: Tensor) -> Tensor:
    pinned = torch.empty_like(value, device="cpu", pin_memory=True)
    return pinned.copy_(value.detach(), non_blocking=True)


def load(path: Path) -> dict[str, Any]:
    """Read one checkpoint onto the CPU, tensors and plain data only. Raises Damaged, or UserError for another file."""
    match = _NAME.fullmatch(path.name)
    try:
        if match and _digest(path) != match[2]:
            raise Damaged(f"{path} is damaged: its sha256 is not the one in its name; remove it to use the one before")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): mend that, and try again") from error
    except Damaged:
        raise
    except Exception as error:  # torch's reader raises nearly anything on foreign bytes
        # torch's own words go on to advise loading it without safeguards.
        raise UserError(
            f"{path} is not a checkpoint of dino-fast: torch does not read it as tensors and plain data"
        ) from error
    if not _is_ours(state):
        raise UserError(f"{path} is not a checkpoint of dino-fast: it holds no teacher; pass a file that a run wrote")
    if state["format"] > FORMAT:
        raise UserError(f"{path} was written by a newer dino-fast (format {state['format']}): update dino-fast")
    return state


def _is_ours(state: Any) -> bool:
    kinds = {"format": int, "step": int, "recipe": dict, "model": dict}
    if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
        return False
    return isinstance(state["model"].get("teacher"), dict)


def load_newest(folder: Path) -> tuple[dict[str, Any], list[Path]] | None:
    """The newest good checkpoint of a folder, and the damaged ones that were passed over; None if there is none.

    Raises UserError if there are checkpoints, but no good one.
    """
    damaged: list[Path] = []
    paths = checkpoints(folder)
    for path in reversed(paths):
        try:
            return load(path), damaged
        except Damaged:
            damaged.append(path)
    if paths:
        raise UserError(f"{folder}: all {len(paths)} checkpoints are damaged; choose another --output to start anew")
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint files of a folder, oldest first; of two of one step, the one that was written first."""
    found = (path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name))
    return sorted(found, key=lambda path: (step_of(path), _written_at(path)))


def _written_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # pruned by its run meanwhile
        return 0


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is not a checkpoint's name")
    return int(match[1])


def prune(folder: Path, keep: int, keep_every: int) -> None:
    """Remove all but the newest `keep` checkpoints and those of every `keep_every`-th step (0: none), and what an
    interrupted save left."""
    for path in folder.glob(".writing-*.pt"):
        path.unlink(missing_ok=True)
    for path in checkpoints(folder)[:-keep]:
        if not keep_every or step_of(path) % keep_every:
            path.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    return file_sha256(path)[:16]
