"""The log of a run: every `log_every` steps a row of figures for the display, the log writers and the alarms.

The device is read only when something is logged; between logs the step runs without waiting for the host. The keys of
the rows stand in `metrics.py`.
"""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dino_fast.config import Recipe
from dino_fast.distributed import Ranks
from dino_fast.model.flops import flops_an_image, peak_flops
from dino_fast.run.display import Display
from dino_fast.run.log_writers import LogWriter, Row, open_log_writers
from dino_fast.run.recipe_changes import to_plain_data, write_recipe
from dino_fast.run.schedules import Schedules
from dino_fast.step.hyper import Hyper
from dino_fast.step.train_step import StepOutput, TrainStep
from pipelines.loader import Loader
from shards.text import escape_unprintable


class Clock:
    """Counts the seconds of training since the last reading, without the pauses (checkpoints, evaluations)."""

    def __init__(self) -> None:
        self._start, self._paused = time.monotonic(), 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out of the count."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - start

    def read(self) -> tuple[float, float]:
        """Return the seconds since the last reading and, apart, those of the pauses. Starts the next count."""
        now = time.monotonic()
        seconds, paused = now - self._start - self._paused, self._paused
        self._start, self._paused = now, 0.0
        return seconds, paused


class Sums:
    """Sums the figures of steps on the device, without skipped steps, in a few launches a step and without a wait."""

    NAMES = ("loss", "teacher_entropy", "grad_norm", "grad_norm_first_layer", "grad_norm_last_layer", "grad_norm_head")

    def __init__(self, parameters: Sequence[str], device: torch.device) -> None:
        """parameters: the names of the student's, in the order of `StepOutput.grad_norms`."""
        backbone = (n for n, name in enumerate(parameters) if name.startswith("backbone.") and name.endswith(".weight"))
        head = [n for n, name in enumerate(parameters) if name.startswith("head.")]
        first, last = next(backbone), parameters.index("head.last_layer.weight_v")
        self._first, self._last = slice(first, first + 1), slice(last, last + 1)
        self._head = slice(head[0], head[-1] + 1)  # a module's parameters stand together
        self._one = torch.ones(1, device=device)
        self._sums = torch.zeros(len(self.NAMES) + 1, dtype=torch.float64, device=device)  # the last: good steps
        self.had_gradient = torch.zeros(len(parameters), dtype=torch.bool, device=device)
        """whether each parameter has had a gradient other than 0 in a step that was not skipped: [parameters]"""
        self.in_a_row = torch.zeros((), device=device)
        """number of steps skipped since the last good one"""
        self.steps = 0

    @torch.no_grad()
    def add(self, output: StepOutput) -> None:
        norms = output.grad_norms
        scalars = (figure.reshape(1) for figure in (output.loss, output.teacher_entropy, output.grad_norm))
        head = torch.linalg.vector_norm(norms[self._head], keepdim=True)
        figures = torch.cat([*scalars, norms[self._first], norms[self._last], head, self._one])
        self._sums += figures.masked_fill_(output.skipped.bool(), 0)
        self.had_gradient |= (norms > 0) & (output.skipped == 0)
        self.in_a_row = torch.addcmul(output.skipped, output.skipped, self.in_a_row)
        self.steps += 1

    def read(self) -> dict[str, Tensor]:
        """Return the sums by name, and `good`: the number of steps that are in them."""
        return dict(zip((*self.NAMES, "good"), self._sums.unbind(), strict=True))

    def clear(self) -> None:
        """Start again at zero; `in_a_row` and `had_gradient` go on."""
        self._sums, self.steps = torch.zeros_like(self._sums), 0


@contextlib.contextmanager
def open_monitor(
    recipe: Recipe, ranks: Ranks, schedules: Schedules, step: TrainStep, start: int, stop: int
) -> Iterator["Monitor"]:
    """Give the log of a run from step `start` up to and without step `stop`, with its recipe beside it.

    Raises what `Monitor` does.
    """
    if ranks.first:
        write_recipe(recipe)
    with Monitor(
        Path(recipe.output), ranks, batch=recipe.batch_size, steps_per_epoch=schedules.steps_per_epoch, start=start,
        stop=stop, log_every=recipe.log_every, parameters=[name for name, _ in step.bare_student.named_parameters()],
        flops_per_image=flops_an_image(recipe), wandb=recipe.wandb, settings=to_plain_data(recipe),
    ) as monitor:  # fmt: skip
        yield monitor


class Monitor:
    """Counts every step; every `log_every` steps it reads the device and writes what it found.

    All ranks must call `tick`: figures are means over the ranks, and their bad samples are counted together. The first
    rank displays and writes.
    """

    def __init__(
        self,
        output: Path,
        ranks: Ranks,
        *,
        batch: int,
        steps_per_epoch: int,
        start: int,
        stop: int,
        log_every: int,
        parameters: Sequence[str],
        flops_per_image: float,
        wandb: str = "",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the log writers and the display.

        batch: images a step, of all ranks; start, stop: the first step and the one after the last; parameters: the
        names of the student's, in the order of `StepOutput.grad_norms`; wandb: a W&B project, "" for none; settings:
        those of the run, for W&B to show. Raises UserError where W&B refuses the run, OSError where the output folder
        refuses the files.
        """
        self._ranks, self._batch, self._log_every = ranks, batch, log_every
        self._steps_per_epoch, self._epochs, self._stop = steps_per_epoch, -(-stop // steps_per_epoch), stop
        self._sums, self._skipped, self._reported = Sums(parameters, ranks.device), 0, 0
        self._parameters, self._good = parameters, 0
        peak = peak_flops(ranks.device)
        self._peak_images_per_s = peak / flops_per_image if peak else None  # of one GPU
        self._clock = Clock()
        self._writers: list[LogWriter] = open_log_writers(output, start, wandb, settings) if ranks.first else []
        self._display = Display(start, stop) if ranks.first else None

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: object) -> None:
        if self._display is not None:
            self._display.close()
        for writer in self._writers:
            try:
                writer.close()
            except OSError as error:
                self.say(f"the last figures could not be written: {error}")

    def is_due(self, step: int) -> bool:
        """Return whether `step` will be logged."""
        return (step + 1) % self._log_every == 0 or step + 1 == self._stop

    def tick(
        self,
        step: int,
        hyper: Hyper,
        output: StepOutput,
        loader: Loader,
        more: Mapping[str, float | Tensor] | None = None,
    ) -> Row | None:
        """Count a finished step, and report the samples that the loader had to replace.

        Returns the row where the step is logged, the same on every rank, else None. more: further scalars of this rank
        for the row, under the same names on all ranks; they are not read where nothing is logged.
        """
        self._sums.add(output)
        row = self._log(step, hyper, loader, more or {}) if self.is_due(step) else None
        if row is None and self._display is not None:
            self._display.advance(step + 1)
        for report in list(loader.bad_samples.values())[self._reported :]:
            self._report(f"replaced: {report}")
            self._reported += 1
        return row

    def find_without_gradient(self, steps: int) -> list[str]:
        """Return the names of the parameters that never had a gradient other than 0.

        The list is empty until so many steps were logged that were not skipped. The host waits for the device.
        """
        if self._good < steps:
            return []
        had = self._sums.had_gradient.tolist()
        return [name for name, one in zip(self._parameters, had, strict=True) if not one]

    def record(self, step: int, figures: Mapping[str, float]) -> None:
        """Write figures that are taken only now and then, such as a score after `step`, as a row of their own."""
        self._write({"step": step, **figures, "time": time.time()})

    def _report(self, line: str) -> None:
        """Print a line on any rank: each has samples of its own to report."""
        if self._display is not None:
            self.say(line)
        else:
            with contextlib.suppress(OSError):
                print(f"rank {self._ranks.rank}: {escape_unprintable(line)}", file=sys.stderr, flush=True)

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Leave the time inside (a checkpoint, a score) out of the images per second, which the first rank measures."""
        return self._clock.paused()

    def say(self, line: str) -> None:
        """Print a line above the display, on the first rank only."""
        if self._display is not None:
            self._display.say(line)

    def restart(self, start: int) -> None:
        """Forget what came after step `start`, to which the run went back. Skipped steps stay in the total."""
        self._skipped += self._sums.steps - round(self._sums.read()["good"].item())
        self._sums.clear()
        self._sums.in_a_row.zero_()
        self._clock.read()
        for writer in self._writers:
            writer.restart(start)
        if self._display is not None:
            self._display.restart(start)

    def _log(self, step: int, hyper: Hyper, loader: Loader, more: Mapping[str, float | Tensor]) -> Row:
        row = self._row(step, hyper, loader, more)
        self._sums.clear()
        if self._display is not None:
            self._display.show(step + 1, f"{row['epoch'] + 1}/{self._epochs}", row)
        self._write(row)
        return row

    def _write(self, row: Row) -> None:
        for writer in self._writers:
            try:
                writer.write(row)
            except OSError as error:  # a full disk, say, is no reason to stop
                self.say(f"the figures of step {row['step']} could not be written yet: {error}")

    def _row(self, step: int, hyper: Hyper, loader: Loader, more: Mapping[str, float | Tensor]) -> Row:
        """Return the figures of the steps since the last row; their names are in `metrics.OF_STEPS`."""
        steps, world = self._sums.steps, self._ranks.world
        own = self._own_figures(loader)
        assert own.keys().isdisjoint(more)
        total = sum_over_ranks({**own, **more}, self._ranks)
        skipped = steps - round(total["good"] / world)
        self._skipped += skipped
        self._good += steps - skipped
        return {
            "step": step, "epoch": step // self._steps_per_epoch,
            **{name: total[name] / total["good"] if total["good"] else None for name in Sums.NAMES},
            "skipped": skipped, "skipped_total": self._skipped, "skipped_in_a_row": round(total["in_a_row"] / world),
            "lr": hyper.lr, "weight_decay": hyper.weight_decay, "ema_momentum": hyper.momentum,
            "teacher_temp": hyper.teacher_temp,
            **self._pace(total, steps),
            "bad_samples": round(total["bad"]),
            **{name: total[name] / world for name in more},
        }  # fmt: skip

    def _own_figures(self, loader: Loader) -> dict[str, float | Tensor]:
        """Return this rank's figures, of which a row needs the sums over ranks."""
        data = loader.read_figures()
        if self._ranks.device.type == "cuda":
            torch.cuda.current_stream(self._ranks.device).synchronize()  # or the clock would run behind the steps
        trained, paused = self._clock.read()
        clock = {"seconds": trained, "paused_s": paused, "time": time.time()}
        return {
            **self._sums.read(), "in_a_row": self._sums.in_a_row, "stall": data.stall, "read": data.read_bytes,
            "requests_ready": data.requests_ready, "batches_ready": data.batches_ready, "bad": len(loader.bad_samples),
            "memory": peak_memory(self._ranks.device),
            **(clock if self._ranks.first else dict.fromkeys(clock, 0.0)),
        }  # fmt: skip

    def _pace(self, total: Mapping[str, float], steps: int) -> Row:
        """Return how fast the run goes and what it waits for, from the sums over ranks."""
        world, seconds = self._ranks.world, max(total["seconds"], 1e-9)
        rate = steps * self._batch / seconds
        return {
            "images_per_s": rate, "images_per_s_per_gpu": rate / world,
            "step_ms": 1e3 * seconds / steps, "data_ms": 1e3 * total["stall"] / world / steps,
            "stall": min(1.0, total["stall"] / world / seconds),
            "mfu": rate / world / self._peak_images_per_s if self._peak_images_per_s else None,
            "memory_mb": total["memory"] / world / 1e6, "read_mb_per_s": total["read"] / 1e6 / seconds,
            "requests_ready": total["requests_ready"] / world, "batches_ready": total["batches_ready"] / world,
            "seconds": seconds, "paused_s": total["paused_s"], "time": total["time"],
        }  # fmt: skip


def peak_memory(device: torch.device) -> int:
    """Return the peak of tensors in the GPU's memory, or of this process without a GPU, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def sum_over_ranks(figures: Mapping[str, float | Tensor], ranks: Ranks) -> dict[str, float]:
    """Return the sum over ranks of each scalar, in float64, the same on all of them. Waits for the device once."""
    on_host = {name: float(value) for name, value in figures.items() if not isinstance(value, Tensor)}
    on_device = {name: value for name, value in figures.items() if isinstance(value, Tensor)}
    scalars = [value.detach().to(ranks.device, torch.float64).reshape(1) for value in on_device.values()]
    both = torch.cat([*scalars, torch.tensor(list(on_host.values()), dtype=torch.float64).to(ranks.device)])
    if ranks.world > 1:
        dist.all_reduce(both)
    return dict(zip([*on_device, *on_host], both.tolist(), strict=True))
