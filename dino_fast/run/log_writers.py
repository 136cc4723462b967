"""Where the logged rows go: `metrics.jsonl`, TensorBoard events, and a W&B project.

Each writer takes rows by `write`, forgets those of steps from some one on by `restart`, and ends by `close`. `write`
raises OSError where the disk does not take a row; the next call tries again.
"""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from shards.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Row = dict[str, Any]  # numbers, or None for a figure that there is not

NOT_DRAWN = ("step", "time", "seconds", "paused_s")  # no curves of their own


class Writer(Protocol):
    def write(self, row: Row) -> None: ...
    def restart(self, start: int) -> None: ...
    def close(self) -> None: ...


def writers(output: Path, start: int, wandb: str = "", settings: Mapping[str, Any] | None = None) -> list[Writer]:
    """All of a run that goes on at step `start`; `wandb` is a W&B project, "" for none, to which `settings` are told.
    Raises UserError, OSError."""
    remote: list[Writer] = [Wandb(wandb, output, settings or {})] if wandb else []  # the one that may refuse
    return [*remote, JsonLines(output / "metrics.jsonl", start), TensorBoard(output / "tensorboard", start)]


class JsonLines:
    """A JSON object a line.

    What an interrupted run wrote about steps after its last checkpoint is taken out, since they are run again. Rows
    that the disk does not take are kept until it does.
    """

    def __init__(self, path: Path, start: int) -> None:
        self._path, self._unwritten = path, b""
        self._file = _rewound(path, start)

    def write(self, row: Row) -> None:
        finite = {name: value if _is_finite(value) else None for name, value in row.items()}  # JSON has no NaN
        self._unwritten += json.dumps(finite, allow_nan=False).encode() + b"\n"
        self._flush()

    def restart(self, start: int) -> None:
        self.close()
        self._unwritten = b""
        self._file = _rewound(self._path, start)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # which was told when they came
            self._flush()
        self._file.close()

    def _flush(self) -> None:
        """By a file without a buffer, so that what a full disk took of a row is known."""
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]


def _rewound(path: Path, start: int) -> BinaryIO:
    """Open a metrics file for appending, without its rows of steps from `start` on and a half-written last one."""
    if path.exists():
        kept = [
            line + "\n"
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
            if _step_in(line) < start
        ]
        temporary = path.with_suffix(".writing")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)
    return open(path, "ab", buffering=0)


def _step_in(line: str) -> float:
    """The step of a row; after everything for one that was cut off, before everything for a line of somebody else's."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return math.inf
    return row["step"] if isinstance(row, dict) and isinstance(row.get("step"), int) else -1


class TensorBoard:
    """Events that TensorBoard draws; those of steps from `start` on that are there already, it hides."""

    def __init__(self, folder: Path, start: int) -> None:
        self._folder = folder
        self._board: SummaryWriter | None = self._open(start)

    def _open(self, start: int | None = None) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only the first rank needs it

        return SummaryWriter(str(self._folder), purge_step=start)

    def write(self, row: Row) -> None:
        self._board = self._board or self._open()
        try:
            for name, value in row.items():
                if value is not None and name not in NOT_DRAWN:
                    self._board.add_scalar(name, value, row["step"])
        except OSError:  # of its thread, which ended with it
            self.close()
            raise

    def restart(self, start: int) -> None:
        self.close()
        self._board = self._open(start)

    def close(self) -> None:
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()
        self._board = None


class Wandb:
    """A run of a W&B project; all sittings of a run are one there, by an id kept in the output folder.

    Rows are drawn over their step. What W&B has, it keeps: the steps that are run again after a rollback are there
    twice.
    """

    def __init__(self, project: str, output: Path, settings: Mapping[str, Any]) -> None:
        """settings: of the run, plain data; W&B shows those of its last sitting.

        Raises UserError where the package is missing, or W&B does not take the run.
        """
        try:
            from wandb import Error, Settings, init
        except ImportError as error:
            raise UserError(
                f"--wandb {project}: the package is not installed: pip install -e '.[wandb]', or leave --wandb out"
            ) from error
        kept = output / "wandb-id.txt"
        known = kept.read_text().strip() if kept.exists() else None
        quiet = Settings(console="off")  # it would read along all that the bar draws
        try:
            self._run = init(project=project, dir=str(output), id=known, resume="allow", settings=quiet)
            self._run.config.update(dict(settings), allow_val_change=True)
        except Error as error:
            why = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"--wandb {project}: {why}; log in, set WANDB_MODE=offline, or leave --wandb out"
            ) from error
        kept.write_text(self._run.id + "\n")
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Row) -> None:
        try:
            self._run.log({name: value for name, value in row.items() if value is not None})
        except Exception as error:  # whatever W&B raises, it must not end a run
            raise OSError(f"W&B: {error}") from error

    def restart(self, start: int) -> None:
        """Nothing that W&B could do."""

    def close(self) -> None:
        try:
            self._run.finish()
        except Exception as error:
            raise OSError(f"W&B: {error}") from error


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
