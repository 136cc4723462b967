"""SIGTERM and SIGUSR1: a checkpoint after the step under way, a status of its own, and the same command goes on."""

import random
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from signal import SIGCONT, SIGSTOP, SIGTERM, SIGUSR1

import pytest

from dino_fast.run.signals import STOPPED_BY_SIGNAL
from tests.dino_fast.conftest import ROOT
from tests.faults.conftest import Process
from tests.faults.runs import (
    assert_as_if_nothing_had_happened,
    assert_nothing_lost,
    half_written,
    rows_of,
    steps_saved,
)

# A run that no chain of signals comes to the end of: --max_steps ends it.
ENDLESS = ("--epochs", "10000", "--checkpoint.every", "100000 steps", "--max_steps")
LINE = r"dino-fast train: stopped by a signal after step (\d+)\. The same command again resumes\."


AT_ONCE = "dino-fast train: stopped by a signal while no step was running. The same command again resumes.\n"


def assert_stopped(run: Process, output: Path, at_most: int) -> None:
    """The process has ended as one that was told to: at_most: steps that it may have done."""
    assert run.wait() == STOPPED_BY_SIGNAL, run.err
    said = re.fullmatch(LINE + r"\n", run.err)
    assert said, run.err
    step = int(said[1])
    assert steps_saved(output)[-1] == len(rows_of(output)) == step <= at_most
    assert_nothing_lost(output, [step])
    assert not half_written(output)


def finish(train_here: Callable[..., int], output: Path, whole: Path) -> None:
    """The same command goes on to the end, which is that of a run without signals."""
    stop = str(steps_saved(output)[-1] + 2)
    for folder in (output, whole):
        assert train_here(folder, *ENDLESS, stop) == 0
    assert_as_if_nothing_had_happened(output, whole)


def test_a_signal_ends_the_run_after_the_step_under_way_and_the_same_command_goes_on(start, train_here, tmp_path: Path):
    """At a random moment; then while a checkpoint is written, and twice, as from torchrun and from whoever told
    torchrun: the second must not end what the first began."""
    moments, output = random.Random(1), tmp_path / "run"
    run, steps = start(*ENDLESS, "1000000"), moments.randrange(1, 5)
    assert run.wait_until(lambda: run.steps >= steps)
    time.sleep(moments.uniform(0, 0.2))
    run.tell(SIGTERM)
    assert_stopped(run, output, at_most=len(rows_of(output)) + 1)
    run = start(*ENDLESS, "1000000", "--checkpoint.every", "1 step")
    assert run.wait_until(lambda: bool(half_written(output)))
    run.tell(SIGUSR1)
    at_most = len(rows_of(output)) + 1
    run.tell(SIGTERM)
    assert_stopped(run, output, at_most)
    finish(train_here, output, tmp_path / "whole")


def test_a_signal_before_the_first_step_ends_the_run_at_once(start, train_here, tmp_path: Path):
    """With the same status, so that a cluster treats it alike; there is nothing yet to save."""
    output = tmp_path / "run"
    run = start("--max_steps", "2")
    assert run.wait_until(output.is_dir)
    run.tell(SIGTERM)
    assert run.wait() == STOPPED_BY_SIGNAL
    assert run.err == AT_ONCE
    assert not rows_of(output)
    assert train_here(output, "--max_steps", "2") == 0
    assert len(rows_of(output)) == 2


def test_only_one_thread_ends_the_process():
    """The main thread and the watching one, both on their way to it while the process takes its time to end."""
    script = """
        import os, signal, time
        from dino_fast.run.signals import exit_at_signal_during_setup

        end = os._exit
        os._exit = lambda status: (time.sleep(0.5), end(status))
        with exit_at_signal_during_setup():
            signal.raise_signal(signal.SIGTERM)
            time.sleep(10)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stderr) == (STOPPED_BY_SIGNAL, AT_ONCE)


def test_a_rank_that_waits_for_another_ends_at_once(start):
    """In the rendezvous, where Python's own handlers would not run."""
    waiting = start("--max_steps", "2", RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    assert waiting.wait_until(lambda: waiting.catches(SIGTERM))
    time.sleep(1)
    waiting.tell(SIGTERM)
    assert waiting.wait(10) == STOPPED_BY_SIGNAL
    assert waiting.err == AT_ONCE


@pytest.mark.slow
def test_however_often_it_is_told_it_stops_as_if_told_once(start, tmp_path: Path):
    run = start(*ENDLESS, "1000000")
    assert run.wait_until(lambda: run.steps >= 1)
    run.tell_until_it_ends(SIGTERM)
    assert_stopped(run, tmp_path / "run", at_most=1000000)


@pytest.mark.slow
def test_signals_at_many_random_moments(start, train_here, tmp_path: Path):
    moments, output = random.Random(2), tmp_path / "run"
    for _ in range(20):
        run = start(*ENDLESS, "1000000", "--checkpoint.every", "2 steps")
        steps = moments.randrange(1, 8)
        assert run.wait_until(lambda run=run, steps=steps: run.steps >= steps)
        time.sleep(moments.uniform(0, 0.5))
        run.tell(moments.choice([SIGTERM, SIGUSR1]))
        assert_stopped(run, output, at_most=len(rows_of(output)) + 1)
    finish(train_here, output, tmp_path / "whole")


def test_two_ranks_stop_after_the_same_step_though_only_one_is_told(start_ranks, tmp_path: Path):
    output = tmp_path / "run"
    ranks = start_ranks(*ENDLESS, "1000000")
    assert ranks[0].wait_until(lambda: ranks[0].steps >= 2)
    ranks[1].tell(SIGUSR1)
    at_most = len(rows_of(output)) + 2  # the ranks' votes are counted beside the next step
    for rank in ranks:
        assert_stopped(rank, output, at_most)
    assert len(steps_saved(output)) == 1


@pytest.mark.slow
def test_two_ranks_stop_whoever_is_told_and_go_on(start_ranks, tmp_path: Path):
    output = tmp_path / "run"
    for told in ([0], [0, 1], [1, 0, 1, 0]):
        ranks = start_ranks(*ENDLESS, "1000000")
        assert ranks[0].wait_until(lambda ranks=ranks: ranks[0].steps >= 3)
        for rank in told:
            ranks[rank].tell(SIGTERM)
        at_most = len(rows_of(output)) + 2
        for rank in ranks:
            assert_stopped(rank, output, at_most)
    stop = str(steps_saved(output)[-1] + 2)
    for name in ("run", "whole"):
        for rank in start_ranks(*ENDLESS, stop, output=name):
            assert rank.wait() == 0, rank.err
    assert_as_if_nothing_had_happened(output, tmp_path / "whole")


@pytest.mark.slow
def test_a_rank_that_waits_for_the_last_checkpoint_may_be_told_again(start_ranks, tmp_path: Path):
    """The first rank writes it while the others wait; here it is stopped in the middle of that."""
    output = tmp_path / "run"
    first, other = ranks = start_ranks(*ENDLESS, "1000000")
    assert first.wait_until(lambda: first.steps >= 1)
    other.tell(SIGTERM)
    assert first.wait_until(lambda: bool(half_written(output)))
    first.tell(SIGSTOP)
    for _ in range(100):
        other.tell(SIGTERM)
        time.sleep(0.01)
    first.tell(SIGCONT)
    for rank in ranks:
        assert_stopped(rank, output, at_most=1000000)


@pytest.mark.slow
@pytest.mark.parametrize("number", [SIGTERM, SIGUSR1])
def test_torchrun_hands_the_signal_on(torchrun, tmp_path: Path, number):
    """torchrun has no status for it: 1, as after any other failure. SIGUSR1 takes its --signals-to-handle."""
    output = tmp_path / "run"
    options = ("--signals-to-handle", "SIGTERM,SIGUSR1")
    run = torchrun(*ENDLESS, "1000000", options=options)
    assert run.wait_until(lambda: run.steps >= 2)
    ranks = run.ranks()
    assert len(ranks) == 2
    run.tell(number)
    at_most = len(rows_of(output)) + 2
    assert run.wait() == 1
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]
    stopped = re.findall(LINE, run.err)
    assert len(stopped) == 2
    assert stopped[0] == stopped[1]
    assert steps_saved(output) == [len(rows_of(output))] == [int(stopped[0])]
    assert int(stopped[0]) <= at_most
    assert_nothing_lost(output, steps_saved(output))
