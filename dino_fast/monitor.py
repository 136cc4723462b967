"""What a run says of itself: a progress display, `metrics.jsonl` and TensorBoard.

The device is read only when something is logged; between logs the step runs without waiting for the host.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from dino_fast.distributed import Ranks
from dino_fast.schedules import Hyper
from dino_fast.step import StepOutput
from pipelines.loader import Loader


class Clock:
    """Seconds of training since the last reading, without the pauses (checkpoints, evaluations)."""

    def __init__(self) -> None:
        self._start, self._paused = time.monotonic(), 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what is done inside out of the count."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - start

    def read(self) -> float:
        """Seconds since the last reading; starts the next count."""
        now = time.monotonic()
        seconds = now - self._start - self._paused
        self._start, self._paused = now, 0.0
        return seconds


class Monitor:
    """Counts every step; every `log_every` steps it reads the device and writes what it found.

    All ranks tick: the figures are means over the ranks, and their bad samples together. The first one displays and
    writes.
    """

    def __init__(
        self, output: Path, ranks: Ranks, *, batch: int, steps_per_epoch: int, start: int, stop: int, log_every: int
    ) -> None:
        self._ranks, self._batch, self._log_every = ranks, batch, log_every
        self._steps_per_epoch, self._epochs, self._stop = steps_per_epoch, -(-stop // steps_per_epoch), stop
        self._sums: Tensor | None = None  # of loss, teacher entropy and gradient norm since the last log
        self._steps, self._reported = 0, 0
        self._clock = Clock()
        self._writers = Writers(output, start) if ranks.first else None
        self._display = Display(start, stop) if ranks.first else None

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: object) -> None:
        if self._display is not None:
            self._display.close()
        if self._writers is not None:
            self._writers.close()

    def tick(self, step: int, at: Hyper, out: StepOutput, loader: Loader) -> None:
        """Count a finished step, and report the samples that the loader had to replace."""
        figures = torch.stack([figure.detach().to(torch.float32) for figure in out])
        self._sums = figures if self._sums is None else self._sums + figures
        self._steps += 1
        if (step + 1) % self._log_every == 0 or step + 1 == self._stop:
            self._log(step, at, loader)
        elif self._display is not None:
            self._display.advance(step + 1)
        for report in list(loader.bad.values())[self._reported :]:
            self._report(f"replaced: {report}")
            self._reported += 1

    def _report(self, line: str) -> None:
        """Every rank has samples of its own to report."""
        if self._display is not None:
            self.say(line)
        else:
            print(f"rank {self._ranks.rank}: {line}", file=sys.stderr, flush=True)

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Leave what is done inside (a checkpoint) out of the images per second."""
        return self._clock.paused()

    def say(self, line: str) -> None:
        """Print a line above the display, once."""
        if self._display is not None:
            self._display.say(line)

    def _log(self, step: int, at: Hyper, loader: Loader) -> None:
        assert self._sums is not None
        world = self._ranks.world
        data = loader.figures()
        own = [data.stall, data.read_bytes / 1e6, data.requests_ready, data.batches_ready, len(loader.bad)]
        totals = torch.cat([self._sums / self._steps, self._sums.new_tensor(own)])
        if world > 1:
            dist.all_reduce(totals)
        loss, entropy, norm, stall, read, requests, batches, bad = totals.tolist()  # waits for the device
        seconds = max(self._clock.read(), 1e-9)
        rate = self._steps * self._batch / seconds
        row = {
            "step": step, "epoch": step // self._steps_per_epoch, "loss": loss / world,
            "teacher_entropy": entropy / world, "grad_norm": norm / world, "lr": at.lr, "weight_decay": at.weight_decay,
            "ema_momentum": at.momentum, "teacher_temp": at.teacher_temp, "images_per_s": rate,
            "images_per_s_per_gpu": rate / world, "stall": min(1.0, stall / world / seconds),
            "read_mb_per_s": read / seconds, "requests_ready": requests / world, "batches_ready": batches / world,
            "bad_samples": int(bad), "seconds": seconds, "time": time.time(),
        }  # fmt: skip
        self._sums, self._steps = None, 0
        if self._display is not None and self._writers is not None:
            self._display.show(step + 1, f"{row['epoch'] + 1}/{self._epochs}", row)
            self._writers.write(row)


class _TwoLines(Progress):
    """The bar above, the figures below: together they are wider than a terminal."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield from (Text(task.fields["figures"]) for task in self.tasks)


class Display:
    """A rich progress bar on a terminal; elsewhere one plain line a log."""

    def __init__(self, start: int, stop: int) -> None:
        self._console, self._stop = Console(), stop
        self._progress = _TwoLines(
            TextColumn("epoch {task.fields[epoch]}  step"), MofNCompleteColumn(), BarColumn(None), TimeElapsedColumn(),
            TextColumn("ETA"), TimeRemainingColumn(),
            console=self._console, disable=not self._console.is_terminal, speed_estimate_period=300,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=stop, completed=start, epoch="–", figures="")
        self._progress.start()
        self._started, self._first = time.monotonic(), start

    def advance(self, done: int) -> None:
        self._progress.update(self._task, completed=done)

    def show(self, done: int, epoch: str, row: dict[str, Any]) -> None:
        figures = (
            f"loss {row['loss']:.4f}  {row['images_per_s_per_gpu']:.1f} img/s per GPU  "
            f"{row['images_per_s']:.1f} total  stall {100 * row['stall']:.1f} %"
        )
        self._progress.update(self._task, completed=done, epoch=epoch, figures=figures)
        if self._progress.disable:
            left = (time.monotonic() - self._started) / (done - self._first) * (self._stop - done)
            self.say(f"epoch {epoch}  step {done}/{self._stop}  {figures}  ETA {left / 60:.1f} min")

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


class Writers:
    """`metrics.jsonl` and TensorBoard events in the output folder.

    What an interrupted run wrote about steps after its last checkpoint is taken out, since they are run again.
    """

    def __init__(self, output: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only the first rank needs it

        self._file = _rewound(output / "metrics.jsonl", start)
        self._board = SummaryWriter(str(output / "tensorboard"), purge_step=start)

    def write(self, row: dict[str, Any]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}  # JSON has no NaN
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name not in ("step", "time", "seconds"):
                self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._file.close()
        self._board.close()


def _rewound(path: Path, start: int) -> TextIO:
    """Open a metrics file for appending, without its rows of steps from `start` on and a half-written last one."""
    if path.exists():
        kept = [line + "\n" for line in path.read_text(encoding="utf-8").splitlines() if _step_in(line) < start]
        temporary = path.with_suffix(".writing")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)
    return open(path, "a", encoding="utf-8")


def _step_in(line: str) -> float:
    """The step of a row; after everything for one that was cut off, before everything for a line of somebody else's."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return math.inf
    return row["step"] if isinstance(row, dict) and isinstance(row.get("step"), int) else -1
