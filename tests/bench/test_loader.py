"""The loader's benchmark gives every figure, and each is what its name says."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bench import loader
from bench.loader import (
    ALONE,
    NO_AUGMENT,
    ROOT,
    UNITS,
    Arm,
    Setup,
    find_arms,
    measure_memory,
    measure_parity,
    measure_round,
)
from bench.peers import unpack
from pipelines.photometric import PhotometricRecipe
from shards.__main__ import main as make_shards
from shards.index import ShardIndex


@pytest.fixture
def setup(make_class_folders, tmp_path: Path) -> Iterator[Setup]:
    """Twelve small images, packed and as files; batches of 4 on one core."""
    source = make_class_folders(classes=2, per_class=6)
    assert make_shards(["pack", str(source), str(tmp_path / "shards"), "--workers", "1"]) == 0
    with ShardIndex(tmp_path / "shards") as index:
        unpack(index, tmp_path / "files")
        yield Setup(index, tmp_path / "files", batch=4, cores=1)


def test_a_round_of_our_loader_has_every_figure(setup: Setup):
    figures = measure_round(find_arms()["torch"], setup, NO_AUGMENT, seconds=0.1)
    assert set(figures) == set(UNITS)
    assert figures["images"] == figures["images a core"] > 0
    assert figures["first batch"] > 0
    assert 50 < figures["memory"] < 50_000
    assert figures["parity"] < 0.2


def test_images_are_counted_over_the_seconds(setup: Setup, monkeypatch: pytest.MonkeyPatch):
    """An arm whose every batch takes a second by the clock, the first ten: 4 images a second, and half that a core."""
    clock = [0.0]
    monkeypatch.setattr("bench.loader.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(loader, "measure_cpu_seconds", lambda: 1.5 * clock[0])

    def batches(setup: Setup, augment: PhotometricRecipe) -> Iterator[list[torch.Tensor]]:
        clock[0] += 9
        while True:
            clock[0] += 1
            yield []

    two = Setup(setup.index, setup.images, setup.batch, cores=2)
    figures = measure_round(Arm(batches, lambda _: 0.0), two, PhotometricRecipe(), seconds=5)
    assert figures.pop("memory") > 0
    assert figures == {"images": 4, "images a core": 2, "busy cores": 1.5, "first batch": 10}


def test_cpu_seconds_are_those_of_the_process_and_its_children():
    before, used = loader.measure_cpu_seconds(), os.times()
    sum(range(10**7))
    now = os.times()
    expected = now.user + now.system - used.user - used.system
    assert loader.measure_cpu_seconds() - before == pytest.approx(expected, abs=0.05)
    with subprocess.Popen(
        [sys.executable, "-c", "sum(range(3 * 10**7)); print(flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        child.stdout.readline()
        assert loader.measure_cpu_seconds() - before > expected + 0.2
        child.kill()


def test_parity_is_in_levels_and_nothing_for_pillow_itself(setup: Setup):
    peer = find_arms()["published"]
    assert peer.parity(setup) == 0
    assert measure_parity(setup, lambda view, place, sample, window, size: np.zeros((size, size, 3), np.uint8)) > 50


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_memory_counts_children_and_shared_pages_once():
    before = measure_memory()
    child = subprocess.Popen(
        [sys.executable, "-c", "held = b'x' * 200_000_000; print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        assert 190 < measure_memory() - before < 300
        child.communicate(b"\n")
    held = np.ones(200_000_000, np.uint8)
    before, (reading, writing) = measure_memory(), os.pipe()
    if (process := os.fork()) == 0:
        os.read(reading, 1)
        os._exit(0)
    try:
        assert measure_memory() - before < 100
    finally:
        os.write(writing, b"\n")
        os.waitpid(process, 0)
    assert held[0] == 1


@pytest.fixture
def options(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """A call that measures for a tenth of a second."""
    words = [str(setup.index.folder), "--cores", "1", "--batch", "4", "--seconds", "0.1", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["bench.loader", *words])
    return loader.parse_arguments()


def fake_process(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """Processes of arms end at once, those of one arm with an error."""

    def run(call: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if call[call.index("--arm") + 1] == failing:
            said = "\n".join(["Traceback", *map(str, range(50)), "RuntimeError: no decoder"])
            return subprocess.CompletedProcess(call, 1, stdout="", stderr=said)
        return subprocess.CompletedProcess(call, 0, stdout='noted\n{"images": 3.0}\n', stderr="a warning\n")

    monkeypatch.setattr("bench.loader.subprocess", SimpleNamespace(run=run))


def test_an_arm_whose_process_fails_is_left_out_with_the_end_of_its_stderr(
    options: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    fake_process(monkeypatch, failing="bad")
    options.only, options.json = ["bad", "good"], tmp_path / "out.jsonl"
    loader.compare(options, "files")
    printed = capsys.readouterr()
    assert "left out: bad (RuntimeError: status 1: RuntimeError: no decoder)" in printed.out.splitlines()
    assert "\n49\n" in printed.err
    assert "\n20\n" not in printed.err
    assert printed.err.count("a warning\n") == 2
    [row] = [json.loads(line) for line in options.json.read_text().splitlines()]
    assert (row["arm"], row["median"]) == ("good", 3.0)


def test_one_arm_is_measured_in_this_process(
    options: argparse.Namespace, setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    options.arm, options.json, options.images = "torch" + ALONE, tmp_path / "out.jsonl", setup.images
    monkeypatch.setattr("bench.loader.parse_arguments", lambda: options)
    monkeypatch.setattr("bench.loader.limit_cores", lambda cores: None)
    loader.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures.keys() == set(UNITS)
    rows = [json.loads(line) for line in options.json.read_text().splitlines()]
    assert {row["metric"]: row["median"] for row in rows} == figures
    assert {row["arm"] for row in rows} == {"torch" + ALONE}


def test_an_arm_that_is_not_here_is_named_with_those_that_are(options: argparse.Namespace, setup: Setup):
    options.arm = "thoughts"
    with pytest.raises(SystemExit, match=r"--arm thoughts is not on this machine\. It has: torch; "):
        loader.measure_here(options, setup)


@pytest.mark.slow
def test_the_command_measures_every_arm_in_a_process_of_its_own(setup: Setup, tmp_path: Path):
    names = ["torch", "torch" + ALONE, "published"]
    call = [sys.executable, "-m", "bench.loader", str(setup.index.folder), "--cores", "1", "--batch", "4"]
    call += ["--seconds", "0.2", "--rounds", "1", "--json", str(tmp_path / "out.jsonl"), "--only", *names]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {(row["arm"], row["metric"], row["unit"]) for row in rows} == {
        (name, metric, unit)
        for name in names
        for metric, unit in UNITS.items()
        if metric != "parity" or name.endswith(ALONE)
    }
    assert all(row["bench"] == "loader" and row["machine"]["cores"] == 1 for row in rows)
    lines = [line for line in done.stdout.splitlines() if not line.startswith("left out")]
    assert len(lines) == 1 + len(rows)
