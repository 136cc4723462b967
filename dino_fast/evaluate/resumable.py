"""What a long evaluation has done so far, in its output folder, so that the same command goes on from there.

The file has the format of a checkpoint (`checkpoint.py`): it is whole or absent, and verified when it is read. Its
number counts epochs.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from dino_fast import checkpoint
from dino_fast.distributed import Ranks
from dino_fast.evaluate.features import hash_weights
from shards.errors import UserError
from shards.index import ShardIndex
from shards.layout import MANIFEST_FILE
from shards.storage.lock import lock_folder


class Progress:
    """The progress of an evaluation in its folder. The first rank reads and writes it for all.

    `settings` are what the result depends on, as plain data; the keys are the names of flags. A folder that holds the
    progress of other settings is refused.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], ranks: Ranks) -> None:
        self._folder, self._settings, self._ranks = folder, dict(settings), ranks

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Path, settings: Mapping[str, Any], ranks: Ranks) -> Iterator["Progress"]:
        """Lock the folder for this evaluation, on the first rank.

        Raises UserError where another process has locked it, or where it is a folder of shards or of a training run.
        """
        if not ranks.first:
            yield cls(folder, settings, ranks)
            return
        if (folder / MANIFEST_FILE).exists() or (folder / "recipe.yaml").exists():
            kind = "shards" if (folder / MANIFEST_FILE).exists() else "a training run"
            raise UserError(f"--output {folder} holds {kind}. Give a folder for this evaluation alone.")
        new = not folder.exists()
        try:
            with lock_folder(folder, "another evaluation is writing into it. Wait, or choose another --output."):
                yield cls(folder, settings, ranks)
        finally:
            if new:
                with contextlib.suppress(OSError):  # something was written into it
                    folder.rmdir()

    def load(self) -> dict[str, Any] | None:
        """Return the state that was saved last, on every rank, or None at the beginning.

        Raises UserError for the progress of other settings, and for a damaged file.
        """
        found: list[Any] = [self._read() if self._ranks.first else None]
        if self._ranks.world > 1:
            dist.broadcast_object_list(found, device=self._ranks.device)
        state: dict[str, Any] | None = found[0]
        if state is not None and (changes := list_changes(state["settings"], self._settings)):
            raise UserError(
                f"--output {self._folder} holds an evaluation with other settings ({'; '.join(changes)}). Undo that, "
                "or choose another --output."
            )
        return state

    def _read(self) -> dict[str, Any] | None:
        files = checkpoint.list_checkpoints(self._folder)
        if not files:
            return None
        try:
            state = checkpoint.read(files[-1])
        except checkpoint.Damaged as error:
            raise UserError(f"{files[-1]} is damaged. Remove it to start from scratch.") from error
        if not isinstance(state, dict) or not isinstance(state.get("settings"), dict):
            raise UserError(f"--output {self._folder} holds a training run. Give a folder for this evaluation alone.")
        return state

    def save(self, done: int, state: Mapping[str, Any]) -> None:
        """Keep `state` as what `done` epochs led to, on the first rank. Raises UserError where the disk refuses it."""
        if self._ranks.first:
            checkpoint.save(self._folder, done, {"settings": self._settings, **state})
            checkpoint.prune(self._folder, keep=1, keep_every=0)


def list_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return `name: old -> new` for each setting that differs."""
    return [
        f"{name}: {old.get(name)} -> {new.get(name)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def describe_settings(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return, as plain data, the settings in what a result's JSON begins with, without what names files."""
    kept = {name: value for name, value in result.items() if name not in ("checkpoint", "step", "network")}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}


def describe_files(network: nn.Module, train: ShardIndex, val: ShardIndex) -> dict[str, str]:
    """Return what tells the content of --checkpoint, --train and --val, wherever they lie."""
    files = {"checkpoint": f"weights {hash_weights(network.state_dict())[:12]}"}
    return files | {name: f"images {index.fingerprint[:12]}" for name, index in (("train", train), ("val", val))}
