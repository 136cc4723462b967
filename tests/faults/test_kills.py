"""kill -9 at any moment loses nothing: no finished checkpoint, no step, not a bit."""

import collections
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.faults.runs import (
    assert_as_if_nothing_had_happened,
    assert_nothing_lost,
    half_written,
    rows_of,
    steps_saved,
)

# A run that no chain of kills comes to the end of: --max_steps ends it.
ENDLESS = ("--epochs", "10000", "--checkpoint.every", "1 step", "--max_steps")
STARTING, STEPPING, WRITING = "starting", "stepping", "writing"


class Killer:
    """Starts a run again and again, and kills it at moments drawn from its whole life."""

    def __init__(self, start: Callable[..., object], output: Path, seed: int, settings: Sequence[str] = ()) -> None:
        self._start, self._output, self._moments = start, output, random.Random(seed)
        self._settings = settings
        self._until_first_step = 10.0  # seconds; measured whenever a run comes so far
        self._newest = 0  # checkpoint, by its step
        self.hit = collections.Counter[str]()

    def kill_while(self, phase: str) -> None:
        """One life, ended at a random moment of a phase. What was hit is seen afterwards: `hit`."""
        left = half_written(self._output)
        run = self._start(*ENDLESS, "1000000", *self._settings, output=self._output)
        self._wait(run, phase, left)
        before = steps_saved(self._output)
        run.kill()
        assert run.err == ""
        self._check(run)
        assert_nothing_lost(self._output, before)
        self._newest = max(steps_saved(self._output), default=0)
        half = half_written(self._output)
        self.hit[WRITING if half and half != left else STEPPING if run.steps else STARTING] += 1

    def _wait(self, run, phase: str, left: dict[str, int]) -> None:
        begin = time.monotonic()
        if phase == STARTING:  # imports, data, networks, checkpoint
            moment = begin + self._moments.uniform(0, self._until_first_step)
            assert run.wait_until(lambda: time.monotonic() > moment)
            return
        assert run.wait_until(lambda: run.steps > 0)
        self._until_first_step = time.monotonic() - begin
        if phase == STEPPING:
            steps = self._moments.randrange(1, 4)
            assert run.wait_until(lambda: run.steps >= steps)
            time.sleep(self._moments.uniform(0, 0.2))
        else:  # torch.save, sync, hash, rename, and what is pruned
            assert run.wait_until(lambda: half_written(self._output) not in ({}, left))
            time.sleep(self._moments.uniform(0, 0.4))

    def _check(self, run) -> None:
        """It went on from the newest checkpoint."""
        resumed = re.findall(r"resumed from step (\d+) of", run.out)
        assert resumed in ([], [str(self._newest)])
        assert resumed or not self._newest or not run.steps


def test_killed_while_it_starts_steps_and_writes_a_run_ends_the_same(start, train_here, tmp_path: Path):
    output = tmp_path / "run"
    killer = Killer(start, output, seed=1)
    for phase in (STEPPING, WRITING, STARTING):
        killer.kill_while(phase)
    stop = str(max(steps_saved(output), default=0) + 2)
    assert train_here(output, *ENDLESS, stop) == 0
    assert train_here(tmp_path / "whole", *ENDLESS, stop, "--checkpoint.every", "1000 steps") == 0
    assert_as_if_nothing_had_happened(output, tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_vision_transformer_goes_on_with_the_drop_path_that_it_would_have_had(
    start, train_here, tmp_path: Path
):
    vit = ("--backbone", "vit_tiny_patch16", "--drop_path", "0.5")
    output = tmp_path / "run"
    killer = Killer(start, output, seed=3, settings=vit)
    for phase in (STEPPING, WRITING):
        killer.kill_while(phase)
    stop = str(max(steps_saved(output), default=0) + 2)
    assert train_here(output, *ENDLESS, stop, *vit) == 0
    assert train_here(tmp_path / "whole", *ENDLESS, stop, *vit, "--checkpoint.every", "1000 steps") == 0
    assert_as_if_nothing_had_happened(output, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_after_two_hundred_kills_nothing_is_lost(start, tmp_path: Path):
    kills, seed, output = 200, 6, tmp_path / "run"
    moments, killer = random.Random(seed), Killer(start, output, seed)
    for _ in range(kills):
        killer.kill_while(moments.choices((STARTING, STEPPING, WRITING), (2, 3, 3))[0])
    assert killer.hit.total() == kills
    assert all(killer.hit[phase] >= kills // 20 for phase in (STARTING, STEPPING, WRITING)), killer.hit
    stop = str(max(steps_saved(output)) + 2)
    runs = [
        start(*ENDLESS, stop, output=output),
        start(*ENDLESS, stop, "--checkpoint.every", "100000 steps", output="whole"),
    ]
    for run in runs:
        assert run.wait(1200) == 0, run.err
    assert_as_if_nothing_had_happened(output, tmp_path / "whole")
    print(f"{kills} kills, of which {dict(killer.hit)}; {len(rows_of(output))} steps; 0 lost or off")
