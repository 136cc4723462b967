"""What a run has left in its output folder, and whether faults show in it."""

import json
from pathlib import Path

import torch

from dino_fast import checkpoint


def steps_saved(output: Path) -> list[int]:
    """The steps of the checkpoints that are there, oldest first."""
    return [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(output)]


def rows_of(output: Path) -> list[dict]:
    """What was logged, but for a line that is still being written."""
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines(True) if line[-1] == "\n"] if path.exists() else []


def half_written(output: Path) -> dict[str, int]:
    """The checkpoints under their temporary names, and when they last grew."""
    found = {}
    for path in output.glob(".writing-*"):
        try:
            found[path.name] = path.stat().st_mtime_ns
        except FileNotFoundError:  # renamed meanwhile
            continue
    return found


def assert_nothing_lost(output: Path, before: list[int]) -> None:
    """Every checkpoint that is there can be read, and none is older than those of `before`."""
    good = [checkpoint.load(path)["step"] for path in checkpoint.list_checkpoints(output)]
    assert good == steps_saved(output)
    assert len(good) >= len(before)
    assert max(good, default=0) >= max(before, default=0)
    assert len(half_written(output)) <= 1


def assert_as_if_nothing_had_happened(output: Path, whole: Path) -> None:
    """A run with faults has come to the same end, to the bit, as the run `whole`; no step is missing or twice."""
    (run, damaged), (other, _) = checkpoint.load_newest(output), checkpoint.load_newest(whole)
    assert run["step"] == other["step"]
    torch.testing.assert_close(run["model"], other["model"], rtol=0, atol=0)
    assert not damaged
    assert [row["step"] for row in rows_of(output)] == list(range(run["step"]))
    assert [row["loss"] for row in rows_of(output)] == [row["loss"] for row in rows_of(whole)]
    assert not half_written(output)
