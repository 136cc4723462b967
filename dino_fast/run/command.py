"""What surrounds the train command: the lock of its output folder, its exit status, and its last words."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch

from dino_fast.checkpoint import list_checkpoints, step_of
from dino_fast.config import Recipe, UsageError
from dino_fast.distributed import Ranks, is_lost_rank
from dino_fast.run.signals import STOPPED_BY_SIGNAL, StoppedBySignal
from shards.errors import UserError
from shards.layout import MANIFEST_FILE
from shards.storage.lock import lock_folder


@contextlib.contextmanager
def lock_output(recipe: Recipe, ranks: Ranks) -> Iterator[None]:
    """Lock the output folder against another run. The first rank does it for all.

    A new folder in which nothing was written is removed again. Raises UserError for a folder of shards, and where
    another run holds the lock.
    """
    if not ranks.first:
        yield
        return
    output = Path(recipe.output)
    if (output / MANIFEST_FILE).exists():
        raise UserError(f"--output {output} holds shards. Give a folder for the run, such as runs/{output.name}.")
    new = not output.exists()
    try:
        with lock_folder(output, "another run is writing into it. Wait, or choose another --output."):
            yield
    finally:
        if new:
            with contextlib.suppress(OSError):
                output.rmdir()


def print_end(output: Path) -> None:
    """Print the last checkpoint and what can be done with it."""
    with contextlib.suppress(OSError):
        print(f"done: {list_checkpoints(output)[-1]}")
        print(f"next, with labeled shards: dino-fast knn --checkpoint {output} --train SHARDS --val SHARDS")


def explain_error(error: BaseException, recipe: Recipe | None) -> tuple[int, str]:
    """Return the exit status and the message for an error of a run. Raises errors that nobody expects again."""
    if isinstance(error, StoppedBySignal):
        return STOPPED_BY_SIGNAL, f"{error}. The same command again resumes."
    if isinstance(error, (UserError, TimeoutError)):
        return 2 if isinstance(error, UsageError) else 1, str(error)
    if isinstance(error, OSError):
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return 1, f"{what}. Fix that, and the same command again resumes."
    if isinstance(error, torch.OutOfMemoryError):
        return 1, "out of GPU memory. Pass --accumulate 2 or more, or use more GPUs."
    if isinstance(error, RuntimeError) and is_lost_rank(error):
        reason = str(error).splitlines()[0]
        return 1, (
            f"another rank has ended, or was silent for --timeout seconds ({reason}). Its own output says why. "
            "The same command again resumes from the last checkpoint."
        )
    if isinstance(error, KeyboardInterrupt):
        saved = list_checkpoints(Path(recipe.output)) if recipe else []
        where = f"resumes from step {step_of(saved[-1])}" if saved else "starts from scratch: there is no checkpoint"
        return 130, f"stopped. The same command again {where}."
    raise error


def accept_any_encoding() -> None:
    """Have characters that the output's encoding lacks printed as question marks, rather than end the process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def exit_process(status: int) -> NoReturn:
    """End the process with a status.

    After an error it does not wait for the loader's threads, which may be inside DALI. The status stays the run's own
    even where what it printed to is full.
    """
    lost = False
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            lost = True
    if status or lost:
        os._exit(status)
    sys.exit(0)
