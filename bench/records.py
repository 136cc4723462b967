"""Keep the results of benchmarks as JSON lines, with the command, the machine, the versions and the commit."""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench.timing import Figures

PACKAGES = ("torch", "torchvision", "triton", "nvidia-dali-cuda130", "spdl-core", "pillow", "numpy")

Record = dict[str, Any]


def add_run_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Add --rounds, with its default, and --json."""
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds that are counted (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the records to this file, as JSON lines")


def add_layer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --batch, --backbone and --iterations, for benchmarks of single layers."""
    gpu = torch.cuda.is_available()
    parser.add_argument("--batch", type=int, default=128 if gpu else 1, help="images in a batch (default %(default)s)")
    parser.add_argument("--backbone", default="resnet50", metavar="NAME", help="a ResNet (resnet50)")
    parser.add_argument(
        "--iterations", type=int, default=10 if gpu else 1, help="calls in a round (default %(default)s)"
    )


def make_record(bench: str, arm: str, metric: str, unit: str, figures: list[float]) -> Record:
    """Return one record: the median and the quartiles of an arm's figures, and how they were measured."""
    quartiles = statistics.quantiles(figures, n=4, method="inclusive") if len(figures) > 1 else [figures[0]] * 3
    return {
        "bench": bench, "arm": arm, "metric": metric, "unit": unit, "median": statistics.median(figures),
        "q25": quartiles[0], "q75": quartiles[2], "n": len(figures), "command": describe_command(),
        "machine": describe_machine(), "versions": find_versions(), "commit": describe_commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def make_records(bench: str, units: Mapping[str, str], rounds: Mapping[str, list[Figures]]) -> list[Record]:
    """Return a record for every metric of every arm. `units` maps metrics to their units, `rounds` arms to figures."""
    return [
        make_record(bench, arm, metric, unit, [figures[metric] for figures in of_arm])
        for metric, unit in units.items()
        for arm, of_arm in rounds.items()
        if metric in of_arm[0]
    ]


def save_partial(bench: str, units: Mapping[str, str], file: Path | None, rounds: Mapping[str, list[Figures]]) -> None:
    """Replace the contents of `file`.partial by the records of the rounds so far.

    A process that is killed leaves them there. `report` removes the file.
    """
    if file is None:
        return
    partial = partial_file(file)
    fresh = partial.with_name(partial.name + ".new")
    partial.parent.mkdir(parents=True, exist_ok=True)
    fresh.write_text(to_json_lines(make_records(bench, units, rounds)), encoding="utf-8")
    fresh.replace(partial)


def partial_file(file: Path) -> Path:
    """Return where `save_partial` writes."""
    return file.with_name(file.name + ".partial")


def report(records: list[Record], file: Path | None) -> None:
    """Print one line for each record, append them to `file` as JSON lines, and remove `file`.partial."""
    for row in records:
        median, low, high = (format_figure(row[name]) for name in ("median", "q25", "q75"))
        print(f"{row['arm']:40s} {row['metric']:16s} {median:>10s} {row['unit']}   ({low} to {high}, n = {row['n']})")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a", encoding="utf-8") as out:
            out.write(to_json_lines(records))
        partial_file(file).unlink(missing_ok=True)


def to_json_lines(rows: list[dict[str, Any]]) -> str:
    """Return one line of JSON for each row."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def format_figure(figure: float) -> str:
    """Return a number with at least three digits, and without digits of its fraction that do not matter."""
    return f"{figure:.0f}" if abs(figure) >= 100 else f"{figure:.1f}" if abs(figure) >= 10 else f"{figure:.3g}"


def describe_command() -> str:
    """Return the command that started this process from the folder of the checkout.

    Of absolute paths only the last part is kept: the rest describes somebody's machine.
    """
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return " ".join(["python", "-m", f"bench.{Path(sys.argv[0]).stem}", *words])


def describe_machine() -> dict[str, Any]:
    """Return the processor, how many of its cores this process may use, the load, and the GPU if there is one."""
    models = [line.partition(":")[2].strip() for line in _read_lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _read_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


@cache
def find_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@cache
def describe_commit() -> str:
    """Return the commit of this checkout, with a + if files have changed since.

    The environment variable COMMIT takes its place, for copies of a checkout. Without both it is empty.
    """
    if given := os.environ.get("COMMIT"):
        return given
    here = Path(__file__).resolve().parent
    ask = ["git", "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        described = subprocess.run(ask, cwd=here, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        described = ""
    return described
