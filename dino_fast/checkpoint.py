"""Checkpoints: one file a save, complete or absent, and verified when it is read.

A file is named after its step and the start of its own sha256, `step-00001200-9f86d081884c7d65.pt`: it is written under
a temporary name, synced, and renamed, so a file under its final name is whole, and what a disk did to it later shows.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch

from shards.errors import UserError
from shards.layout import file_sha256
from shards.output import sync_folder

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})-([0-9a-f]{16})\.pt")


class Damaged(UserError):
    """A checkpoint whose bytes are not those that were written."""


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` as the checkpoint of `step` (steps done so far); UserError where the disk does not take it."""
    temporary = folder / f".writing-{step:08d}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, "step": step, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        final = folder / f"step-{step:08d}-{_digest(temporary)}.pt"
        os.replace(temporary, final)
        sync_folder(folder)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{folder}: the checkpoint of step {step} could not be written ({error}); free some space or "
            "check permissions, and run the same command again: the checkpoint before is good"
        ) from error
    return final


def load(path: Path) -> dict[str, Any]:
    """Read one checkpoint onto the CPU, tensors and plain data only. Raises Damaged, or UserError for another file."""
    match = _NAME.fullmatch(path.name)
    try:
        if match and _digest(path) != match[2]:
            raise Damaged(f"{path} is damaged: its sha256 is not the one in its name; remove it to use the one before")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint") from error
    except Damaged:
        raise
    except Exception as error:  # torch's reader raises nearly anything on foreign bytes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is not a checkpoint of dino-fast ({reason})") from error
    if not isinstance(state, dict) or "format" not in state or "teacher" not in state.get("model", {}):
        raise UserError(f"{path} is not a checkpoint of dino-fast: it holds no teacher; pass a file that a run wrote")
    if state["format"] > FORMAT:
        raise UserError(f"{path} was written by a newer dino-fast (format {state['format']}): update dino-fast")
    return state


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
    """The checkpoint files of a folder, oldest first."""
    return sorted((path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name)), key=step_of)


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
