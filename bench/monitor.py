"""What the display, the logs and the figures for the alarms cost: the time that they take from a step, as its share.

    python -m bench.monitor [--step_ms MS] [--log_every 50] [--rounds 5] [--batch 8] [--backbone resnet50] ...
                            [--json bench/results/X.jsonl]

Two arms, a run on a terminal, where a thread draws the bar, and one without; each writes `metrics.jsonl` and
TensorBoard events into a temporary folder. The step is none: its outputs lie on the device, and its loader is at rest.
Figures of a round:

- tick: µs of a call for a step that is not logged; on a GPU until its work is launched;
- log: ms of a call for one that is; on a GPU with its wait for the device, which has nothing else to do;
- look: ms of what a log asks besides: a forward pass of the teacher and its figures (`dino_fast/run/health.py`);
- background: percent of one core that other threads take while nothing is called: what the bar takes at most from the
  step, where that needs all cores;
- share: percent of a step: (tick + (log + look) / log_every) / step, and the background.

The step's time is --step_ms, or measured: that of `bench.step`'s arm "ours", whose settings of the recipe are these.
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

from bench.roofline import finished
from bench.step import KINDS, add_arguments, build_arm, choose_device, loader_views, one_round, recipe_of, steady
from bench.timing import interleaved, keep_records, record, records, report
from dino_fast.config import Recipe
from dino_fast.distributed import Ranks
from dino_fast.model.flops import flops_an_image
from dino_fast.run.monitor import Monitor
from dino_fast.step.train_step import StepOutput
from dino_fast.train import build_step, seen
from pipelines.loader import Figures as LoaderFigures

TICKS, LOGS, LOOKS, IDLE = 500, 20, 5, 2.0  # calls, calls, calls and seconds of a round
UNITS = {"tick": "µs", "log": "ms", "look": "ms", "background": "%", "share": "%"}

Figures = dict[str, float]  # by the names of UNITS


class Sink(io.TextIOBase):
    """A standard output that keeps nothing."""

    def __init__(self, terminal: bool) -> None:
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def write(self, text: str) -> int:
        return len(text)


class Watched:
    """A monitor's parts of a run of the recipe, without the run."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self._recipe, self._device = recipe, device
        self._step = build_step(recipe, Ranks(0, 1, device))
        self._globals = loader_views(recipe, device)[0]
        self._names = [name for name, _ in self._step.bare_student.named_parameters()]
        loss, entropy, norm, skipped = torch.tensor([5.0, 2.0, 1.0, 0.0], device=device).unbind()
        self._out = StepOutput(loss, entropy, norm, skipped, torch.rand(len(self._names), device=device))
        self._loader: Any = SimpleNamespace(figures=lambda: LoaderFigures(0.0, 0, 2.0, 2.0), bad={})

    @contextmanager
    def monitor(self, log_every: int) -> Iterator[Monitor]:
        run: dict[str, Any] = {
            "batch": self._recipe.batch_size, "steps_per_epoch": 1000, "start": 0, "stop": 10**6,
            "log_every": log_every, "parameters": self._names, "flops_per_image": flops_an_image(self._recipe),
        }  # fmt: skip
        ranks = Ranks(0, 1, self._device)
        with tempfile.TemporaryDirectory() as folder, Monitor(Path(folder), ranks, **run) as monitor:
            yield monitor

    def seconds(self, monitor: Monitor, calls: int) -> float:
        """Of one call, after some that are not counted. The device has nothing to do before and after."""
        at, warm_up = steady(self._recipe), calls // 10
        for step in range(warm_up + calls):
            if step == warm_up:
                start = finished(self._device)
            monitor.tick(step, at, self._out, self._loader)
        seconds = (time.perf_counter() - start) / calls
        finished(self._device)
        return seconds

    def look(self) -> float:
        """Seconds of a look at targets and features, as each log takes one."""
        at = steady(self._recipe)
        seen(self._step, self._globals, at)
        start = finished(self._device)
        for _ in range(LOOKS):
            seen(self._step, self._globals, at)
        return (finished(self._device) - start) / LOOKS


def one_arm(watched: Watched, terminal: bool, step: float, log_every: int) -> Figures:
    """A round. step: its seconds."""
    with redirect_stdout(Sink(terminal)):
        with watched.monitor(log_every=10**6) as monitor:
            tick = watched.seconds(monitor, TICKS)
            used = time.process_time()
            time.sleep(IDLE)
            background = (time.process_time() - used) / IDLE
        with watched.monitor(log_every=1) as monitor:
            log = watched.seconds(monitor, LOGS)
    look = watched.look()
    share = (tick + (log + look) / log_every) / step + background
    return {
        "tick": 1e6 * tick, "log": 1e3 * log, "look": 1e3 * look, "background": 100 * background, "share": 100 * share,
    }  # fmt: skip


def measured_step(recipe: Recipe, device: torch.device, steps: int) -> float:
    """Milliseconds."""
    arm = build_arm(KINDS["ours"], recipe, device)
    one_round(arm, recipe, device, 1)
    return one_round(arm, recipe, device, steps)["step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--step_ms", type=float, help="of a step; measured unless given")
    parser.add_argument("--log_every", type=int, default=50, help="steps")
    options = parser.parse_args()
    recipe, device = recipe_of(options), choose_device(options.precision)
    ms = options.step_ms or measured_step(recipe, device, options.steps)
    watched = Watched(recipe, device)
    arms = {
        name: partial(one_arm, watched, terminal, ms / 1e3, options.log_every)
        for name, terminal in {"on a terminal": True, "without a terminal": False}.items()
    }
    keep = partial(keep_records, "monitor", UNITS, options.json)
    rows = records("monitor", UNITS, interleaved(arms, options.rounds, keep))
    report([record("monitor", "given" if options.step_ms else "ours", "step", "ms", [ms]), *rows], options.json)


if __name__ == "__main__":
    main()
