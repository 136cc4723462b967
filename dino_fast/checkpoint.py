"""The file format of a checkpoint: one file a save, whole or absent, and verified when it is read.

A file is named after its step and the first digits of its own SHA-256, `step-00001200-9f86d081884c7d65.pt`. It is
written under a temporary name, synced, and renamed. So a file under its final name is whole, and damage that a disk did
to it later is noticed.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch

from shards.errors import UserError
from shards.storage.atomic_write import sync_folder
from shards.storage.hashing import hash_file

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})-([0-9a-f]{16})\.pt")


class Damaged(UserError):
    """A checkpoint whose bytes are not those that were written."""


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` as the checkpoint of `step` (steps done so far). Raises UserError where the disk refuses it."""
    temporary = folder / f".writing-{step:08d}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".writing-*.pt"):  # from a killed run; it may take the space that a full disk lacks
            left.unlink(missing_ok=True)
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, "step": step, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        final = folder / f"step-{step:08d}-{_digest(temporary)}.pt"
        os.replace(temporary, final)
        sync_folder(folder)
        for path in list_checkpoints(folder):
            if step_of(path) == step and path != final:  # from before the run went back to this step
                path.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{folder}: the checkpoint of step {step} could not be written ({error}). Free some space or check "
            "permissions, and run the same command again: the checkpoint before is good."
        ) from error
    return final


def load(path: Path) -> dict[str, Any]:
    """Read one checkpoint onto the CPU: tensors and plain data only. Raises Damaged, or UserError for another file."""
    state = read(path)
    if not _is_ours(state):
        raise UserError(f"{path} is not a checkpoint of dino-fast: it holds no teacher. Pass a file that a run wrote.")
    if state["format"] > FORMAT:
        raise UserError(f"{path} was written by a newer dino-fast (format {state['format']}). Update dino-fast.")
    return state


def read(path: Path) -> Any:
    """Return what `save` has put into a file, on the CPU, whatever it is. Raises what `load` does."""
    match = _NAME.fullmatch(path.name)
    try:
        if match and _digest(path) != match[2]:
            raise Damaged(
                f"{path} is damaged: its SHA-256 is not the one in its name. Remove it to use the checkpoint before."
            )
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint. Pass a run's folder or one of its step-….pt files.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}). Fix that, and try again.") from error
    except Damaged:
        raise
    except Exception as error:  # torch's reader raises nearly anything on foreign bytes
        # torch's own words go on to advise loading it without safeguards.
        raise UserError(
            f"{path} is not a checkpoint of dino-fast: torch does not read it as tensors and plain data. Pass a file "
            "that a run wrote."
        ) from error


def _is_ours(state: Any) -> bool:
    kinds = {"format": int, "step": int, "recipe": dict, "model": dict}
    if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
        return False
    return isinstance(state["model"].get("teacher"), dict)


def load_newest(folder: Path) -> tuple[dict[str, Any], list[Path]] | None:
    """Return the newest valid checkpoint of a folder and the damaged ones that are newer, or None if there is none.

    Raises UserError if there are checkpoints, but no valid one.
    """
    damaged: list[Path] = []
    paths = list_checkpoints(folder)
    for path in reversed(paths):
        try:
            return load(path), damaged
        except Damaged:
            damaged.append(path)
    if paths:
        raise UserError(f"{folder}: all {len(paths)} checkpoints are damaged. Choose another --output to start again.")
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint files of a folder, oldest first; of two of one step, the one that was written first."""
    found = (path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name))
    return sorted(found, key=lambda path: (step_of(path), _modification_time(path)))


def _modification_time(path: Path) -> int:
    """Return nanoseconds."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # pruned by its run meanwhile
        return 0


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is not a checkpoint's name")
    return int(match[1])


def prune(folder: Path, keep: int, keep_every: int) -> None:
    """Remove all but the newest `keep` checkpoints and those of every `keep_every`-th step (0: none).

    Remove also what an interrupted save left.
    """
    for path in folder.glob(".writing-*.pt"):
        path.unlink(missing_ok=True)
    for path in list_checkpoints(folder)[:-keep]:
        if not keep_every or step_of(path) % keep_every:
            path.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    return hash_file(path)[:16]
