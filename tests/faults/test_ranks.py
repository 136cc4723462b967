"""Two ranks, of which one dies or hangs."""

import os
import random
import re
import time
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP

import pytest

from dino_fast import checkpoint
from tests.faults.runs import (
    assert_as_if_nothing_had_happened,
    assert_nothing_lost,
    half_written,
    rows_of,
    steps_saved,
)

STEPS = ("--epochs", "10000", "--max_steps")


def test_torchrun_goes_on_from_the_last_checkpoint_after_the_kill_of_a_rank(torchrun, tmp_path: Path):
    """To the bit: see the slow test. Here, the losses of the steps that are run again."""
    output = tmp_path / "run"
    run = torchrun(*STEPS, "6", "--checkpoint.every", "2 steps", options=("--max-restarts", "3"))
    assert run.wait_until(lambda: bool(steps_saved(output)))
    os.kill(run.ranks()[1], SIGKILL)
    assert run.wait() == 0, run.err
    assert re.findall(r"resumed from step \d+", run.out) in (["resumed from step 2"], ["resumed from step 4"])
    losses = dict[int, set[str]]()
    for step, loss in re.findall(r"step (\d)/6  loss (\S+)", run.out):
        losses.setdefault(int(step), set()).add(loss)
    assert {step: len(found) for step, found in losses.items()} == dict.fromkeys(range(1, 7), 1)
    assert [row["step"] for row in rows_of(output)] == list(range(6))
    assert steps_saved(output) == [4, 6]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_kills_of_either_rank_at_random_moments(torchrun, start_ranks, tmp_path: Path):
    """Of their whole lives: often before they have met, while both load, step, or one writes."""
    kills, moments, output = 20, random.Random(3), tmp_path / "run"
    run = torchrun(*STEPS, "1000000", "--checkpoint.every", "1 step", options=("--max-restarts", str(kills)))
    dead, before, until_first_step = set[int](), [], 30.0

    def alive() -> list[int]:
        return [rank for rank in run.ranks() if rank not in dead]

    for _ in range(kills):
        assert run.wait_until(lambda: len(alive()) == 2)
        ranks, begin, told = alive(), time.monotonic(), run.steps
        if moments.random() < 0.5:
            time.sleep(moments.uniform(0, until_first_step))
        else:
            steps = told + moments.randrange(1, 4)
            assert run.wait_until(lambda steps=steps: run.steps >= steps)
            until_first_step = time.monotonic() - begin
            time.sleep(moments.uniform(0, 0.5))
        before = steps_saved(output)
        os.kill(moments.choice(ranks), SIGKILL)
        dead.update(ranks)
        assert run.wait_until(lambda: not dead.intersection(run.ranks()))
        assert max(steps_saved(output), default=0) >= max(before, default=0)
    run.kill()
    assert_nothing_lost(output, before)
    stop = str(steps_saved(output)[-1] + 2)
    for name in ("run", "whole"):
        for rank in start_ranks(*STEPS, stop, output=name):
            assert rank.wait(1200) == 0, rank.err
    assert_as_if_nothing_had_happened(output, tmp_path / "whole")
    print(f"{kills} kills of a rank; {len(rows_of(output))} steps; 0 lost or off")


def test_a_hung_rank_ends_the_other_within_the_timeout(start_ranks, tmp_path: Path):
    ranks = start_ranks(*STEPS, "1000000", "--timeout", "10", "--checkpoint.every", "1 step")
    running, hung = ranks
    assert running.wait_until(lambda: bool(steps_saved(tmp_path / "run")))
    hung.tell(SIGSTOP)
    assert running.wait(60) == 1
    lines = running.err.splitlines()
    assert len(lines) == 1, running.err
    assert lines[0].startswith("dino-fast train: another rank has ended, or was silent for --timeout seconds (")
    assert_nothing_lost(tmp_path / "run", [1])
    assert not half_written(tmp_path / "run")
    hung.tell(SIGCONT)  # it finds the other gone
    assert hung.wait(60) == 1
    assert len(hung.err.splitlines()) == 1, hung.err


@pytest.mark.slow
def test_torchrun_leaves_no_process_behind_after_a_hung_rank(torchrun, tmp_path: Path):
    run = torchrun(
        *STEPS, "1000000", "--timeout", "10", options=("--max-restarts", "0"), TORCH_ELASTIC_SHUTDOWN_TIMEOUT="3"
    )
    assert run.wait_until(lambda: run.steps >= 2)
    ranks = run.ranks()
    assert len(ranks) == 2
    os.kill(ranks[1], SIGSTOP)
    assert run.wait(120) == 1
    assert run.err.count("dino-fast train: ") == run.err.count("was silent for --timeout seconds") == 1
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]


RANKS_WITH_A_BAD_BATCH = """
import os
import sys

import torch

from dino_fast.run.command import exit_process
from dino_fast.train import main
from pipelines.loader import Loader

whole, came = Loader.batches, []


def batches(loader, start, stop):
    for batch in whole(loader, start, stop):
        if os.environ["RANK"] == "1" and batch.step == 4 and not came:
            came.append(batch.step)
            batch.globals[0, 0, 0, 0] = torch.nan
        yield batch


Loader.batches = batches
exit_process(main(sys.argv[1:]))
"""


def test_a_bad_batch_of_one_rank_is_skipped_by_all_and_gone_back_from_together(start_ranks, tmp_path: Path):
    (tmp_path / "bad.py").write_text(RANKS_WITH_A_BAD_BATCH)
    ranks = start_ranks("--max_steps", "8", before=[str(tmp_path / "bad.py")])
    for rank in ranks:
        assert rank.wait() == 0, rank.err
    assert "after step 5 are not finite: back to step 3" in ranks[0].out
    rows, (state, _) = rows_of(tmp_path / "run"), checkpoint.load_newest(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(8))
    assert not any(row["skipped"] for row in rows)
    assert {row["skipped_total"] for row in rows[3:]} == {1}
    assert (state["step"], state["rollbacks"]) == (8, 1)
