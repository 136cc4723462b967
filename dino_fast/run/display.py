"""How a run looks while it is watched: a progress bar with figures on a terminal, elsewhere a plain line a log."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from shards.text import escape_unprintable

REFRESHES = 2  # a second; each takes the interpreter from the thread that runs the steps


class Display:
    """A rich progress bar on a terminal; elsewhere one plain line for each row of the log."""

    def __init__(self, start: int, stop: int) -> None:
        self._console, self._stop = Console(), stop
        self._progress = _BarAndLines(
            TextColumn("epoch {task.fields[epoch]}  step"), MofNCompleteColumn(), BarColumn(None), TimeElapsedColumn(),
            TextColumn("ETA"), TimeRemainingColumn(), console=self._console, refresh_per_second=REFRESHES,
            disable=not self._console.is_terminal, speed_estimate_period=300,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=stop, completed=start, epoch="–", figures="")
        self._progress.start()
        self.restart(start)

    def restart(self, start: int) -> None:
        """Go on from step `start`."""
        self._started, self._first = time.monotonic(), start
        self.advance(start)

    def advance(self, done: int) -> None:
        """Show that `done` steps are done."""
        self._progress.update(self._task, completed=done)

    def show(self, done: int, epoch: str, row: dict[str, Any]) -> None:
        """Show the figures of a row; `epoch` is written as in "3/100"."""
        lines = format_pace(row), format_state(row)
        self._progress.update(self._task, completed=done, epoch=epoch, figures="\n".join(lines))
        if self._progress.disable:
            left = (time.monotonic() - self._started) / (done - self._first) * (self._stop - done)
            self.say(f"epoch {epoch}  step {done}/{self._stop}  {'  '.join(lines)}  ETA {left / 60:.1f} min")

    def say(self, line: str) -> None:
        """Print a line above the bar. Characters that could harm a terminal are escaped.

        A line that cannot be printed, to a full disk for example, is lost.
        """
        with contextlib.suppress(OSError):
            self._console.print(escape_unprintable(line), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


class _BarAndLines(Progress):
    """Draws the bar, and the figures below it: side by side they would be wider than a terminal."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield from (Text(task.fields["figures"]) for task in self.tasks)


def format_pace(row: dict[str, Any]) -> str:
    """Return the loss, and how fast the run goes."""
    return (
        f"loss {_number(row['loss'], '.4f')}  {row['images_per_s_per_gpu']:.1f} img/s per GPU  "
        f"{row['images_per_s']:.1f} total  stall {100 * row['stall']:.1f} %"
    )


def format_state(row: dict[str, Any]) -> str:
    """Return learning rate, entropy, gradient norm, and what else is known."""
    parts = [f"lr {row['lr']:.2e}", f"entropy {_number(row['teacher_entropy'], '.3f')}"]
    parts += [f"grad norm {_number(row['grad_norm'], '.3g')}"]
    parts += [f"MFU {100 * row['mfu']:.1f} %"] if row["mfu"] is not None else []
    parts += [f"skipped {row['skipped_total']}"] if row["skipped_total"] else []
    return "  ".join(parts)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
