"""Measure what the display, the logs and the figures for the alarms cost, as a share of a training step.

    python -m bench.monitor
    python -m bench.monitor --step_ms 250 --log_every 50 --json bench/results/monitor.jsonl

The two arms are a run on a terminal, where a thread draws the progress bar, and a run without one. Each writes
metrics.jsonl and TensorBoard events into a temporary folder. No step runs: its outputs lie on the device, and the
loader does nothing. The figures of a round:

- tick: µs of a call for a step that is not logged; on a GPU until its work is launched;
- log: ms of a call for a step that is logged; on a GPU with its wait for the device, which has no other work;
- look: ms of what a log needs besides: a forward pass of the teacher, and its figures (dino_fast/run/health.py);
- background: percent of one core that other threads use while nothing is called. The bar takes at most that much from a
  step that needs all cores;
- share: percent of a step: (tick + (log + look) / log_every) / step, plus the background.

The time of the step is --step_ms. Without it the arm "ours" of bench.step is measured, with the same recipe.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bench.records import make_record, make_records, report, save_partial
from bench.step_arms import ARM_KINDS, build_arm, make_loader_views, measure_round
from bench.step_recipe import add_recipe_arguments, build_recipe, choose_device, make_steady_hyper
from bench.timing import Figures, read_clock, run_interleaved
from dino_fast.config import Recipe
from dino_fast.distributed import Ranks
from dino_fast.model.flops import flops_an_image
from dino_fast.run.build import build_train_step
from dino_fast.run.health import collect_figures
from dino_fast.run.monitor import Monitor
from dino_fast.step.train_step import StepOutput
from pipelines.loader import LoaderFigures

TICKS, LOGS, LOOKS = 500, 20, 5  # calls in a round
IDLE_SECONDS = 2.0
UNITS = {"tick": "µs", "log": "ms", "look": "ms", "background": "%", "share": "%"}


class NullOutput(io.TextIOBase):
    """A standard output that drops what is written."""

    def __init__(self, terminal: bool) -> None:
        self._terminal = terminal

    def isatty(self) -> bool:
        """Return whether it claims to be a terminal."""
        return self._terminal

    def write(self, text: str) -> int:
        """Drop the text."""
        return len(text)


class FakeRun:
    """What a monitor is given by a run of the recipe, without the run."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self._recipe, self._device = recipe, device
        self._step = build_train_step(recipe, Ranks(0, 1, device))
        self._globals = make_loader_views(recipe, device)[0]
        self._names = [name for name, _ in self._step.bare_student.named_parameters()]
        loss, entropy, norm, skipped = torch.tensor([5.0, 2.0, 1.0, 0.0], device=device).unbind()
        self._out = StepOutput(loss, entropy, norm, skipped, torch.rand(len(self._names), device=device))
        figures = LoaderFigures(0.0, 0, 2.0, 2.0)
        self._loader: Any = SimpleNamespace(read_figures=lambda: figures, bad_samples={})

    @contextmanager
    def open_monitor(self, log_every: int) -> Iterator[Monitor]:
        """Open a monitor that logs every `log_every` steps into a temporary folder."""
        run: dict[str, Any] = {
            "batch": self._recipe.batch_size, "steps_per_epoch": 1000, "start": 0, "stop": 10**6,
            "log_every": log_every, "parameters": self._names, "flops_per_image": flops_an_image(self._recipe),
        }  # fmt: skip
        ranks = Ranks(0, 1, self._device)
        with tempfile.TemporaryDirectory() as folder, Monitor(Path(folder), ranks, **run) as monitor:
            yield monitor

    def time_tick(self, monitor: Monitor, calls: int) -> float:
        """Return the seconds of one call. Some calls are not counted. The device is idle before and after."""
        hyper, warm_up = make_steady_hyper(self._recipe), calls // 10
        for step in range(warm_up + calls):
            if step == warm_up:
                start = read_clock(self._device)
            monitor.tick(step, hyper, self._out, self._loader)
        seconds = (time.perf_counter() - start) / calls
        read_clock(self._device)
        return seconds

    def time_look(self) -> float:
        """Return the seconds of one look at targets and features, as each log takes one."""
        hyper = make_steady_hyper(self._recipe)
        collect_figures(self._step, self._globals, hyper)
        start = read_clock(self._device)
        for _ in range(LOOKS):
            collect_figures(self._step, self._globals, hyper)
        return (read_clock(self._device) - start) / LOOKS


def measure_arm(run: FakeRun, terminal: bool, step: float, log_every: int) -> Figures:
    """Return the figures of a round. `step` is the time of a training step in seconds."""
    with redirect_stdout(NullOutput(terminal)):
        with run.open_monitor(log_every=10**6) as monitor:
            tick = run.time_tick(monitor, TICKS)
            used = time.process_time()
            time.sleep(IDLE_SECONDS)
            background = (time.process_time() - used) / IDLE_SECONDS
        with run.open_monitor(log_every=1) as monitor:
            log = run.time_tick(monitor, LOGS)
    look = run.time_look()
    share = (tick + (log + look) / log_every) / step + background
    return {
        "tick": 1e6 * tick, "log": 1e3 * log, "look": 1e3 * look, "background": 100 * background, "share": 100 * share,
    }  # fmt: skip


def measure_step(recipe: Recipe, device: torch.device, steps: int) -> float:
    """Return the milliseconds of a training step."""
    arm = build_arm(ARM_KINDS["ours"], recipe, device)
    measure_round(arm, recipe, device, 1)
    return measure_round(arm, recipe, device, steps)["step"]


def main() -> None:
    """Measure both arms, and report their records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_recipe_arguments(parser)
    parser.add_argument("--step_ms", type=float, metavar="MS", help="time of a step; it is measured if not given")
    parser.add_argument("--log_every", type=int, default=50, metavar="STEPS", help="steps from log to log (50)")
    options = parser.parse_args()
    recipe, device = build_recipe(options), choose_device(options.precision)
    ms = options.step_ms or measure_step(recipe, device, options.steps)
    run = FakeRun(recipe, device)
    arms = {
        name: partial(measure_arm, run, terminal, ms / 1e3, options.log_every)
        for name, terminal in {"on a terminal": True, "without a terminal": False}.items()
    }
    save = partial(save_partial, "monitor", UNITS, options.json)
    records = make_records("monitor", UNITS, run_interleaved(arms, options.rounds, save))
    step = make_record("monitor", "given" if options.step_ms else "ours", "step", "ms", [ms])
    report([step, *records], options.json)


if __name__ == "__main__":
    main()
