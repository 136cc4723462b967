"""Where the rows of the log go: `metrics.jsonl`, TensorBoard events, and a W&B project."""

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

Row = dict[str, Any]  # numbers, or None for a figure that does not exist

NOT_DRAWN = ("step", "time", "seconds", "paused_s")  # figures without a curve


class LogWriter(Protocol):
    """A place where rows are written."""

    def write(self, row: Row) -> None:
        """Write a row. Raises OSError where the disk refuses it; the next call tries again."""

    def restart(self, start: int) -> None:
        """Forget the rows of steps from `start` on."""

    def close(self) -> None:
        """Write what is left."""


def open_log_writers(
    output: Path, start: int, wandb: str = "", settings: Mapping[str, Any] | None = None
) -> list[LogWriter]:
    """Open all log writers of a run that goes on at step `start`.

    wandb: a W&B project, "" for none, which shows `settings`. Raises UserError and OSError.
    """
    remote: list[LogWriter] = [Wandb(wandb, output, settings or {})] if wandb else []  # the one that may refuse
    return [*remote, JsonLines(output / "metrics.jsonl", start), TensorBoard(output / "tensorboard", start)]


class JsonLines:
    """Writes one JSON object a line.

    Rows that an interrupted run wrote about steps after its last checkpoint are removed, since these steps are run
    again. Rows that the disk refuses are kept until it takes them.
    """

    def __init__(self, path: Path, start: int) -> None:
        self._path, self._unwritten = path, b""
        self._file = _open_before(path, start)

    def write(self, row: Row) -> None:
        finite = {name: value if _is_finite(value) else None for name, value in row.items()}  # JSON has no NaN
        self._unwritten += json.dumps(finite, allow_nan=False).encode() + b"\n"
        self._flush()

    def restart(self, start: int) -> None:
        self.close()
        self._unwritten = b""
        self._file = _open_before(self._path, start)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it was reported when they came
            self._flush()
        self._file.close()

    def _flush(self) -> None:
        """Write to a file without a buffer, so that it is known how much of a row a full disk took."""
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]


def _open_before(path: Path, start: int) -> BinaryIO:
    """Open a metrics file to append to. Remove its rows of steps from `start` on, and a half-written last one."""
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
    """Return the step of a row: infinity for one that was cut off, −1 for a line that is not a row."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return math.inf
    return row["step"] if isinstance(row, dict) and isinstance(row.get("step"), int) else -1


class TensorBoard:
    """Writes events for TensorBoard, which hides those of steps from `start` on that are there already."""

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
        except OSError:  # raised in its thread, which has ended with it
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
    """Writes to a run of a W&B project. An id in the output folder makes all processes of a run one W&B run.

    Rows are drawn over their step. W&B cannot remove rows: steps that are run again after a rollback are there twice.
    """

    def __init__(self, project: str, output: Path, settings: Mapping[str, Any]) -> None:
        """settings: those of the run as plain data; W&B shows the last process's.

        Raises UserError where the package is missing, or W&B refuses the run.
        """
        try:
            from wandb import Error, Settings, init
        except ImportError as error:
            raise UserError(
                f"--wandb {project}: the package wandb is not installed. Run pip install -e '.[wandb]', or leave "
                "--wandb out."
            ) from error
        kept = output / "wandb-id.txt"
        known = kept.read_text().strip() if kept.exists() else None
        quiet = Settings(console="off")  # it would record all that the bar draws
        try:
            self._run = init(project=project, dir=str(output), id=known, resume="allow", settings=quiet)
            self._run.config.update(dict(settings), allow_val_change=True)
        except Error as error:
            why = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"--wandb {project}: {why}. Log in, set WANDB_MODE=offline, or leave --wandb out."
            ) from error
        kept.write_text(self._run.id + "\n")
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Row) -> None:
        try:
            self._run.log({name: value for name, value in row.items() if value is not None})
        except Exception as error:  # no error of W&B may end a run
            raise OSError(f"W&B: {error}") from error

    def restart(self, start: int) -> None:
        """Do nothing: W&B cannot forget rows."""

    def close(self) -> None:
        try:
            self._run.finish()
        except Exception as error:
            raise OSError(f"W&B: {error}") from error


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
