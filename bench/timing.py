"""What all benchmarks share: interleaved rounds, the machine, and JSON lines."""

import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

PACKAGES = ("torch", "torchvision", "triton", "nvidia-dali-cuda130", "spdl-core", "pillow", "numpy")

CLOCK = 2e9  # cycles a second of a GPU, at most

Figure = TypeVar("Figure")


def interleaved(
    arms: Mapping[str, Callable[[], Figure]],
    rounds: int,
    keep: Callable[[dict[str, list[Figure]]], None] = lambda _: None,
    uncounted: int = 1,
) -> dict[str, list[Figure]]:
    """Run every arm `rounds` times in turn, after `uncounted` rounds. An arm returns one figure, or several at once.

    An arm that raises is left out, and the others go on; SystemExit where none is left. After each round `keep` gets
    the figures so far; before the first counted round, those of the uncounted one. KeyboardInterrupt ends the rounds:
    those that are complete are returned, and without one it is raised again.
    """
    going = dict(arms)
    counted: dict[str, list[Figure]] = {name: [] for name in arms}
    complete = 0
    try:
        for number in range(uncounted + rounds):
            made = {name: figure for name, arm in going.items() if (figure := attempt(name, arm)) is not None}
            if not made:
                raise SystemExit("no arm is left")
            going = {name: going[name] for name in made}
            if number < uncounted:
                keep({name: [figure] for name, figure in made.items()})
                continue
            for name, figure in made.items():
                counted[name].append(figure)
            complete += 1
            keep({name: counted[name] for name in going})
    except KeyboardInterrupt:
        print(f"interrupted after {complete} of {rounds} rounds")
        if not complete:
            raise
    return {name: counted[name] for name in going}


def attempt(name: str, work: Callable[[], Figure]) -> Figure | None:
    """Return what `work` returns. Where it raises, print one line with the reason, the traceback to stderr, and return
    None."""
    try:
        return work()
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        print(f"left out, {name}: {': '.join([type(error).__name__, *lines[:1]])}", flush=True)
        traceback.print_exc()
    gc.collect()  # what the failed arm held, the GPU's memory above all
    return None


def device_time(work: Callable[[], object], iterations: int, device: torch.device) -> float:
    """Seconds of one of `iterations` calls. On a GPU those that it takes alone: the calls are made while it is busy
    with something else, for twice as long as they took the host before. A call that waits for it shows as it is.
    """
    start = time.perf_counter()
    for _ in range(iterations):
        work()
    seconds = time.perf_counter() - start
    if device.type != "cuda":
        return seconds / iterations
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    torch.cuda._sleep(int(2 * seconds * CLOCK))
    first.record()
    for _ in range(iterations):
        work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / iterations


def record(bench: str, arm: str, metric: str, unit: str, figures: list[float]) -> dict[str, Any]:
    """One JSON object: median and quartiles of an arm's figures, with the command, the machine, the versions and the
    commit."""
    quartiles = statistics.quantiles(figures, n=4, method="inclusive") if len(figures) > 1 else [figures[0]] * 3
    return {
        "bench": bench, "arm": arm, "metric": metric, "unit": unit, "median": statistics.median(figures),
        "q25": quartiles[0], "q75": quartiles[2], "n": len(figures), "command": command(), "machine": machine(),
        "versions": versions(), "commit": commit(), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def records(bench: str, units: Mapping[str, str], rounds: Mapping[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """A record of every metric (`units`: the unit of each) of every arm that has it, from its figures by round."""
    return [
        record(bench, arm, metric, unit, [figures[metric] for figures in found])
        for metric, unit in units.items()
        for arm, found in rounds.items()
        if metric in found[0]
    ]


def keep_records(
    bench: str, units: Mapping[str, str], file: Path | None, rounds: Mapping[str, list[dict[str, float]]]
) -> None:
    """Write the records of `rounds` to `file`.partial, in place of what it held. A process that is killed leaves them
    there; `report` removes them."""
    if file is None:
        return
    part = partial_of(file)
    fresh = part.with_name(part.name + ".new")
    part.parent.mkdir(parents=True, exist_ok=True)
    fresh.write_text(json_lines(records(bench, units, rounds)), encoding="utf-8")
    fresh.replace(part)


def partial_of(file: Path) -> Path:
    return file.with_name(file.name + ".partial")


def report(rows: list[dict[str, Any]], file: Path | None) -> None:
    """Print one line a record, and append them to `file` as JSON lines. Removes `file`.partial."""
    for row in rows:
        median, low, high = (digits(row[name]) for name in ("median", "q25", "q75"))
        print(f"{row['arm']:40s} {row['metric']:16s} {median:>10s} {row['unit']}   ({low} to {high}, n = {row['n']})")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a", encoding="utf-8") as out:
            out.write(json_lines(rows))
        partial_of(file).unlink(missing_ok=True)


def json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def digits(figure: float) -> str:
    """Three digits at least, none of a fraction that does not count."""
    return f"{figure:.0f}" if abs(figure) >= 100 else f"{figure:.1f}" if abs(figure) >= 10 else f"{figure:.3g}"


def command() -> str:
    """How this process was started, from the checkout's folder. Of absolute paths the last part: what comes before is
    nobody's business."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return " ".join(["python", "-m", f"bench.{Path(sys.argv[0]).stem}", *words])


def machine() -> dict[str, Any]:
    """The processor, how many cores of it this process may use, and the GPU if there is one."""
    models = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


@cache
def versions() -> dict[str, str]:
    """Python's and the packages' versions, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def commit() -> str:
    """The commit of this checkout, with a + if it was changed since; without git, what COMMIT says, or nothing."""
    here = Path(__file__).resolve().parent
    ask = ["git", "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        described = subprocess.run(ask, cwd=here, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        described = ""
    return described or os.environ.get("COMMIT", "")
