"""What a run says of itself, every `log_every` steps: rows of figures for the display, the writers and the alarms.

The device is read only when something is logged; between logs the step runs without waiting for the host.

Rows of `Monitor.record` have `step`, `time` and what it was given. Those of `Monitor.tick` have, of the steps since the
last one:

- `step`: the last of them, from 0; `epoch`: its epoch, from 0;
- `loss`, in nats; `teacher_entropy`: of the teacher's targets, in nats; `grad_norm`: of all gradients together,
  before clipping; `grad_norm_first_layer`, `grad_norm_last_layer`, `grad_norm_head`: of the backbone's first weights,
  of the prototypes, and of the head with them. Means over steps and ranks, skipped steps left out; None if all were;
- `skipped`: steps whose gradients were not finite, so that the student stayed; `skipped_total`: in this sitting;
  `skipped_in_a_row`: up to and with this step, 0 if it was a good one;
- `lr`, `weight_decay`, `ema_momentum`, `teacher_temp`: what this step was run with;
- `images_per_s`: pictures, not crops, of all ranks together; `images_per_s_per_gpu`: of one;
- `step_ms`: of a step, by the clock; `data_ms`: of that, waiting for data; `stall`: their ratio, 0 to 1;
- `mfu`: FLOP/s of the model as a share of what the GPU's data sheet promises in half precision, 0 to 1; None where
  that is not known (`flops.PEAKS`), and on CPUs;
- `memory_mb`: a rank's peak so far, of the GPU's memory that tensors held, without a GPU of the process's memory; in
  10⁶ bytes, the mean over ranks;
- `read_mb_per_s`: compressed pictures read by all ranks, in 10⁶ bytes a second; `requests_ready`, `batches_ready`:
  read ahead and made ahead, on average (`loader.Figures`); `bad_samples`: replaced so far, by all ranks;
- `seconds`: by the clock of the first rank, without pauses; `paused_s`: those of the pauses, in which a checkpoint was
  copied or the one before it waited for, or a score taken; `time`: when it was logged, Unix seconds;
- and what `tick` was given besides, as the mean over ranks.

A run gives it `forward_ms`, `backward_ms`, `update_ms`: of a step, on the device; in fp16 `loss_scale`; and, of at most
128 pictures (`health.py` says more), `target_kl`, `target_entropy`, in nats, `feature_rank`, from 1 to their number,
`feature_std`, from 0 to about 1, and `center_norm`, a length.

What `record` is given comes as a row of its own, with `step` and `time`: `knn_top1`, in percent, and `knn_s`, seconds.
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

from dino_fast.distributed import Ranks
from dino_fast.model.flops import peak_flops
from dino_fast.run.display import Display
from dino_fast.run.log_writers import Row, Writer, writers
from dino_fast.run.schedules import Hyper
from dino_fast.step.train_step import StepOutput
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

    def read(self) -> tuple[float, float]:
        """Seconds since the last reading, and those of the pauses apart; starts the next count."""
        now = time.monotonic()
        seconds, paused = now - self._start - self._paused, self._paused
        self._start, self._paused = now, 0.0
        return seconds, paused


class Sums:
    """Of the figures of steps, on the device, those that were skipped left out: a few launches a step, and no wait."""

    NAMES = ("loss", "teacher_entropy", "grad_norm", "grad_norm_first_layer", "grad_norm_last_layer", "grad_norm_head")

    def __init__(self, parameters: Sequence[str], device: torch.device) -> None:
        """parameters: names of the student's, in the order of `StepOutput.grad_norms`."""
        backbone = (n for n, name in enumerate(parameters) if name.startswith("backbone.") and name.endswith(".weight"))
        head = [n for n, name in enumerate(parameters) if name.startswith("head.")]
        first, last = next(backbone), parameters.index("head.last_layer.weight_v")
        self._first, self._last = slice(first, first + 1), slice(last, last + 1)
        self._head = slice(head[0], head[-1] + 1)  # a module's parameters stand together
        self._one = torch.ones(1, device=device)
        self._sums = torch.zeros(len(self.NAMES) + 1, dtype=torch.float64, device=device)  # and of good steps
        self.in_a_row = torch.zeros((), device=device)
        """steps skipped up to now, since the last good one"""
        self.steps = 0

    @torch.no_grad()
    def add(self, out: StepOutput) -> None:
        norms = out.grad_norms
        scalars = (figure.reshape(1) for figure in (out.loss, out.teacher_entropy, out.grad_norm))
        head = torch.linalg.vector_norm(norms[self._head], keepdim=True)
        figures = torch.cat([*scalars, norms[self._first], norms[self._last], head, self._one])
        self._sums += figures.masked_fill_(out.skipped.bool(), 0)
        self.in_a_row = torch.addcmul(out.skipped, out.skipped, self.in_a_row)
        self.steps += 1

    def read(self) -> dict[str, Tensor]:
        """The sums, and `good`: the steps that are in them."""
        return dict(zip((*self.NAMES, "good"), self._sums.unbind(), strict=True))

    def clear(self) -> None:
        """Begin again; `in_a_row` goes on."""
        self._sums, self.steps = torch.zeros_like(self._sums), 0


class Monitor:
    """Counts every step; every `log_every` steps it reads the device and writes what it found.

    All ranks tick: the figures are means over the ranks, and their bad samples together. The first one displays and
    writes.
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
        """batch: images a step, of all ranks; start, stop: the first step and the one after the last; parameters: names
        of the student's, in the order of `StepOutput.grad_norms`; wandb: a W&B project, "" for none; settings: the
        run's, for W&B to show.

        Raises UserError where W&B does not take the run, OSError where the output folder does not.
        """
        self._ranks, self._batch, self._log_every = ranks, batch, log_every
        self._steps_per_epoch, self._epochs, self._stop = steps_per_epoch, -(-stop // steps_per_epoch), stop
        self._sums, self._skipped, self._reported = Sums(parameters, ranks.device), 0, 0
        peak = peak_flops(ranks.device)
        self._peak_images_per_s = peak / flops_per_image if peak else None  # of one GPU
        self._clock = Clock()
        self._writers: list[Writer] = writers(output, start, wandb, settings) if ranks.first else []
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
                self.say(f"the last figures are not written: {error}")

    def due(self, step: int) -> bool:
        """Whether `step` will be logged."""
        return (step + 1) % self._log_every == 0 or step + 1 == self._stop

    def tick(
        self, step: int, at: Hyper, out: StepOutput, loader: Loader, more: Mapping[str, float | Tensor] | None = None
    ) -> Row | None:
        """Count a finished step, and report the samples that the loader had to replace.

        Returns the row where the step is logged, the same on every rank: see above for its keys. more: further figures
        of this rank, under the same names on all ranks, for the row; scalars. Not looked at where none is logged.
        """
        self._sums.add(out)
        row = self._log(step, at, loader, more or {}) if self.due(step) else None
        if row is None and self._display is not None:
            self._display.advance(step + 1)
        for report in list(loader.bad.values())[self._reported :]:
            self._report(f"replaced: {report}")
            self._reported += 1
        return row

    def record(self, step: int, figures: Mapping[str, float]) -> None:
        """Write figures that are taken now and then, such as a score after `step`, as a row of their own."""
        self._write({"step": step, **figures, "time": time.time()})

    def _report(self, line: str) -> None:
        """Every rank has samples of its own to report."""
        if self._display is not None:
            self.say(line)
        else:
            with contextlib.suppress(OSError):
                print(f"rank {self._ranks.rank}: {line}", file=sys.stderr, flush=True)

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Leave what is done inside (a checkpoint) out of the images per second. The first rank's clock is the one."""
        return self._clock.paused()

    def say(self, line: str) -> None:
        """Print a line above the display, once."""
        if self._display is not None:
            self._display.say(line)

    def restart(self, start: int) -> None:
        """The run has gone back to step `start`: forget what came after it. Skipped steps stay in the total."""
        self._skipped += self._sums.steps - round(self._sums.read()["good"].item())
        self._sums.clear()
        self._sums.in_a_row.zero_()
        self._clock.read()
        for writer in self._writers:
            writer.restart(start)
        if self._display is not None:
            self._display.restart(start)

    def _log(self, step: int, at: Hyper, loader: Loader, more: Mapping[str, float | Tensor]) -> Row:
        row = self._row(step, at, loader, more)
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
                self.say(f"the figures of step {row['step']} are not written yet: {error}")

    def _row(self, step: int, at: Hyper, loader: Loader, more: Mapping[str, float | Tensor]) -> Row:
        sums, world, steps, data = self._sums, self._ranks.world, self._sums.steps, loader.figures()
        if self._ranks.device.type == "cuda":
            torch.cuda.current_stream(self._ranks.device).synchronize()  # or the clock would run behind the steps
        trained, paused = self._clock.read()
        clock = {"seconds": trained, "paused_s": paused, "time": time.time()}
        own: dict[str, float | Tensor] = {
            **sums.read(), "in_a_row": sums.in_a_row, "stall": data.stall, "read": data.read_bytes,
            "requests_ready": data.requests_ready, "batches_ready": data.batches_ready, "bad": len(loader.bad),
            "memory": peak_memory(self._ranks.device),
            **(clock if self._ranks.first else dict.fromkeys(clock, 0.0)),
        }  # fmt: skip
        assert own.keys().isdisjoint(more)
        total = over_ranks({**own, **more}, self._ranks)
        seconds = max(total["seconds"], 1e-9)
        rate = steps * self._batch / seconds
        skipped = steps - round(total["good"] / world)
        self._skipped += skipped
        return {
            "step": step, "epoch": step // self._steps_per_epoch,
            **{name: total[name] / total["good"] if total["good"] else None for name in Sums.NAMES},
            "skipped": skipped, "skipped_total": self._skipped, "skipped_in_a_row": round(total["in_a_row"] / world),
            "lr": at.lr, "weight_decay": at.weight_decay, "ema_momentum": at.momentum, "teacher_temp": at.teacher_temp,
            "images_per_s": rate, "images_per_s_per_gpu": rate / world,
            "step_ms": 1e3 * seconds / steps, "data_ms": 1e3 * total["stall"] / world / steps,
            "stall": min(1.0, total["stall"] / world / seconds),
            "mfu": rate / world / self._peak_images_per_s if self._peak_images_per_s else None,
            "memory_mb": total["memory"] / world / 1e6, "read_mb_per_s": total["read"] / 1e6 / seconds,
            "requests_ready": total["requests_ready"] / world, "batches_ready": total["batches_ready"] / world,
            "bad_samples": round(total["bad"]),
            "seconds": seconds, "paused_s": total["paused_s"], "time": total["time"],
            **{name: total[name] / world for name in more},
        }  # fmt: skip


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's memory that tensors held at most, without a GPU of this process's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def over_ranks(figures: Mapping[str, float | Tensor], ranks: Ranks) -> dict[str, float]:
    """The sum over ranks of each scalar, in float64, the same on all of them. Waits for the device once."""
    on_host = {name: float(value) for name, value in figures.items() if not isinstance(value, Tensor)}
    on_device = {name: value for name, value in figures.items() if isinstance(value, Tensor)}
    scalars = [value.detach().to(ranks.device, torch.float64).reshape(1) for value in on_device.values()]
    both = torch.cat([*scalars, torch.tensor(list(on_host.values()), dtype=torch.float64).to(ranks.device)])
    if ranks.world > 1:
        dist.all_reduce(both)
    return dict(zip([*on_device, *on_host], both.tolist(), strict=True))
