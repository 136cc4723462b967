"""The doctor command: what limits a run on this machine.

It measures each stage between the shards and the training step alone, then the whole loader, then the step.

One process: `dino-fast doctor --data DIR --config FILE`. Many: `torchrun --nproc_per_node N -m dino_fast doctor …`. All
ranks are then measured at the same time, because they share cores and storage. The first rank prints its own figures.
The trained networks are thrown away. Nothing is written except the file of --json and, where the recipe has one, the
cache. The shards are dropped from the kernel's page cache, so another run that reads them may have to wait. The doctor
has not been run on a GPU yet.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Column, Table

from dino_fast.advise.advice import MEMORY, STEP, STORAGE, Machine, format_rate, give_advice
from dino_fast.advise.isolated_stages import RankParts, make_stages
from dino_fast.advise.own_flags import parse_own_flags
from dino_fast.advise.plan_text import describe_views
from dino_fast.config import Recipe, UsageError, read_recipe
from dino_fast.distributed import Ranks, join_ranks
from dino_fast.evaluate.arguments import parse_positive_number
from dino_fast.run.build import open_data, warn_of_slow_precision
from pipelines.loader import count_default_threads
from shards.errors import UserError
from shards.index import ShardIndex
from shards.text import escape_unprintable

_STEPS_TOGETHER = 20  # many ranks wait for each other, so all take this many steps instead of watching a clock


@dataclass(frozen=True)
class Measurement:
    """How fast a stage is."""

    stage: str
    """name of the stage, one of the constants in `advice.py`"""
    where: str
    """what it ran on, such as "2 CPU threads" or "cuda:0" """
    images: int
    """images that went through it"""
    seconds: float
    """time that they took"""

    @property
    def images_per_s(self) -> float:
        """Images a second."""
        return self.images / self.seconds


# Measuring


def measure_stages(parts: RankParts, seconds: float, console: Console) -> list[Measurement]:
    """Measure every stage for about `seconds` each."""
    measurements = []
    for stage in make_stages(parts):
        together = stage.name == STEP and parts.ranks.world > 1
        items = islice(stage.work, stage.warm_up + _STEPS_TOGETHER) if together else stage.work
        if parts.ranks.world > 1:
            dist.barrier()
        with contextlib.closing(stage.work), console.status(f"measuring: {stage.name}"):
            limit = math.inf if together else seconds
            images, taken = time_work(items, limit, parts.ranks.device, stage.warm_up)
            measurements.append(Measurement(stage.name, stage.where, images, taken))
    return measurements


def time_work(work: Iterator[int], seconds: float, device: torch.device, warm_up: int = 1) -> tuple[int, float]:
    """Return how many images `work` did and the seconds it took.

    The first `warm_up` items are not counted. It ends after `seconds`, or when `work` ends.
    """
    sum(islice(work, warm_up))
    _synchronize(device)
    start, images = time.perf_counter(), 0
    for done in work:
        images += done
        if time.perf_counter() - start >= seconds:
            break
    _synchronize(device)
    return images, time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Printing


def make_rows(measurements: Sequence[Measurement], index: ShardIndex) -> list[dict[str, Any]]:
    """Return the measurements as plain data. Reading has its speed in MB/s, too, at the mean size of the images."""
    step = next(each.images_per_s for each in measurements if each.stage == STEP)
    megabytes = float(index.records["size"].mean()) / 1e6
    return [
        asdict(each)
        | {"images_per_s": each.images_per_s, "times_training_step": each.images_per_s / step}
        | ({"mb_per_s": each.images_per_s * megabytes} if each.stage in (STORAGE, MEMORY) else {})
        for each in measurements
    ]


def print_table(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows: a table on a terminal, plain lines elsewhere."""
    rates = (Column(title, justify="right") for title in ("img/s", "× training step", ""))
    table = Table("stage", "runs on", *rates)
    for row in rows:
        speed = f"{format_rate(row['mb_per_s'])} MB/s" if "mb_per_s" in row else ""
        rate, times = format_rate(row["images_per_s"]), format_rate(row["times_training_step"])
        table.add_row(row["stage"], row["where"], rate, times, speed)
        if not console.is_terminal:
            line = f"{row['stage']:24s} {row['where']:22s} {rate:>8s} img/s  {times:>7s} × training step  {speed}"
            print_line(console, line.rstrip())
    if console.is_terminal:
        console.print(table)


def print_line(console: Console, line: str) -> None:
    """Print a line. Characters that could harm a terminal are escaped."""
    console.print(escape_unprintable(line), markup=False, highlight=False, soft_wrap=True)


# The command


def examine(recipe: Recipe, ranks: Ranks, seconds: float, file: Path | None) -> None:
    """Measure, print the table and the advice, and write the figures to `file`, one JSON object a line."""
    console = Console(quiet=not ranks.first)
    index, loader = open_data(recipe, ranks)
    with index:
        parts = RankParts(recipe, ranks, index, loader)
        for line in [*warn_of_slow_precision(recipe, ranks), describe_run(parts)]:
            print_line(console, line)
        rows = make_rows(measure_stages(parts, seconds, console), index)
        print_table(console, rows)
        rates = {row["stage"]: row["images_per_s"] for row in rows}
        for line in [*give_advice(rates, recipe.data, recipe.crops, inspect_machine(parts)), *loader.notes]:
            print_line(console, line)
    if file is not None and ranks.first:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def describe_run(parts: RankParts) -> str:
    """Return a line that says what is measured."""
    recipe, ranks = parts.recipe, parts.ranks
    others = f" on each of {ranks.world} ranks; the figures are one rank's" if ranks.world > 1 else ""
    return (
        f"{recipe.backbone} in {recipe.precision} on {len(parts.index):,} images of {parts.index.folder}, each in "
        f"{describe_views(recipe.crops)}, batches of {parts.share}{others}"
    )


def inspect_machine(parts: RankParts) -> Machine:
    """Return what the advice depends on besides the figures."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    shards = sum(shard.bytes for shard in parts.index.manifest.shards)
    short_side = float(np.median(np.minimum(parts.index.heights, parts.index.widths)))
    return Machine(parts.ranks.device.type == "cuda", count_default_threads(), short_side, shards < memory / 2)


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, Recipe]:
    """Return the doctor's own flags, and the recipe that the other flags describe. Raises UsageError."""
    own, rest = parse_own_flags(build_parser(), arguments)
    data = ["--data.train", own.data] if own.data else []
    return own, read_recipe([*rest, *data], "dino-fast doctor", also=list(vars(own)))


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the doctor's own flags."""
    parser = argparse.ArgumentParser(
        prog="dino-fast doctor",
        usage="dino-fast doctor --data DIR [--config FILE] [--SETTING VALUE ...] [--seconds S] [--json FILE]",
        description="Find what limits a run of a recipe on this machine: storage, decoding, augmentation or the "
        "training step. Each is measured alone. The advice names the slowest one, and a setting that makes it faster.",
        epilog="Every setting of a recipe is a flag, too. `dino-fast train --help` lists them.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--data", metavar="DIR", help="folder or URL of the shards; the same as --data.train")
    parser.add_argument(
        "--seconds", type=parse_positive_number, default=5.0, metavar="S",
        help="how long each stage is measured, in seconds (default: 5)",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the figures to this file, one JSON object a line"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the doctor command. Return its exit status: 0, 1 for a failed measurement, 2 for a wrong call."""
    try:
        own, recipe = parse_arguments(sys.argv[1:] if arguments is None else arguments)
        with join_ranks(recipe.device) as ranks:
            examine(recipe, ranks, own.seconds, own.json)
        return 0
    except (UserError, OSError) as error:  # TimeoutError is an OSError
        print(f"dino-fast doctor: {escape_unprintable(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except torch.OutOfMemoryError:
        print("dino-fast doctor: out of GPU memory. Lower --batch_size, or use more GPUs.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dino-fast doctor: stopped", file=sys.stderr)
        return 130
