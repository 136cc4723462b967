"""What limits a run on this machine: each stage between the shards and the step measured alone, the whole loader, and
what the step would take; the doctor command.

One process: `dino-fast doctor --data DIR --config FILE`. Many: `torchrun --nproc_per_node N -m dino_fast doctor …`; all
ranks are then measured at once, as they share cores and storage, and the first one prints its own figures. Nothing is
kept of what it trains, and nothing written but --json and, where the recipe has one, the cache. The shards are dropped
from the page cache, so that a run beside it may wait for them. Not run on a GPU yet.
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

from dino_fast.advise.stages import Run, stages
from dino_fast.advise.verdict import COLD, STEP, WARM, Machine, digits, verdict
from dino_fast.config import Recipe, UsageError, read_recipe
from dino_fast.distributed import Ranks, join
from dino_fast.train import DTYPES, slow_precision
from pipelines.loader import Loader, default_threads, open_index
from shards.errors import UserError
from shards.index import ShardIndex

_STEPS_TOGETHER = 20  # of many ranks: they wait for each other, so that none may stop by its own clock


@dataclass(frozen=True)
class Figure:
    """A measured stage."""

    stage: str
    where: str
    images: int
    seconds: float

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds


def examine(run: Run, seconds: float, console: Console) -> list[Figure]:
    """Measure every stage for about so many seconds."""
    figures = []
    for stage, where, work, warm_up in stages(run):
        together = stage == STEP and run.ranks.world > 1
        items, limit = (islice(work, warm_up + _STEPS_TOGETHER), math.inf) if together else (work, seconds)
        if run.ranks.world > 1:
            dist.barrier()
        with contextlib.closing(work), console.status(f"measuring {stage}"):
            figures.append(Figure(stage, where, *measured(items, limit, run.ranks.device, warm_up)))
    return figures


def measured(work: Iterator[int], seconds: float, device: torch.device, warm_up: int = 1) -> tuple[int, float]:
    """Images and seconds of the items of `work` after the first `warm_up`, until so many seconds or its end."""
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


def rows(figures: Sequence[Figure], index: ShardIndex) -> list[dict[str, Any]]:
    """The figures as plain data; what is read also in MB/s, at the mean size of the set's pictures."""
    demand = next(figure.images_per_s for figure in figures if figure.stage == STEP)
    mb = float(index.records["size"].mean()) / 1e6
    return [
        asdict(figure)
        | {"images_per_s": figure.images_per_s, "times_demand": figure.images_per_s / demand}
        | ({"mb_per_s": figure.images_per_s * mb} if figure.stage in (COLD, WARM) else {})
        for figure in figures
    ]


def show(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """A table on a terminal, elsewhere plain lines."""
    table = Table("stage", "where", Column("img/s", justify="right"), Column("× the step", justify="right"), "")
    for row in rows:
        speed = f"{digits(row['mb_per_s'])} MB/s" if "mb_per_s" in row else ""
        cells = row["stage"], row["where"], digits(row["images_per_s"]), digits(row["times_demand"]), speed
        table.add_row(*cells)
        if not console.is_terminal:
            stage, where, rate, times, speed = cells
            say(console, f"{stage:25s} {where:22s} {rate:>8s} img/s  {times:>7s} × the step  {speed}".rstrip())
    if console.is_terminal:
        console.print(table)


def say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def doctor(recipe: Recipe, ranks: Ranks, seconds: float, file: Path | None) -> None:
    """Measure, print the table and the verdict, and write the figures to `file`, a JSON object a line."""
    console = Console(quiet=not ranks.first)
    with open_index(recipe.data) as index:
        loader = Loader(
            index, recipe.data, recipe.crops, recipe.augment, batch=recipe.batch_size, seed=recipe.seed,
            device=ranks.device, dtype=DTYPES[recipe.precision], rank=ranks.rank, world=ranks.world,
        )  # fmt: skip
        for note in slow_precision(recipe, ranks):
            say(console, note)
        run = Run(recipe, ranks, index, loader)
        views = " + ".join(f"{part.stop - part.start}×{size}" for size, part in recipe.crops.resolutions)
        what = f"{index.folder}: {len(index)} pictures; {views}, {recipe.backbone}, {recipe.precision}"
        others = f" on each of {ranks.world} ranks; the figures are one rank's" if ranks.world > 1 else ""
        say(console, f"{what}, batches of {run.share}{others}")
        found = rows(examine(run, seconds, console), index)
        show(console, found)
        rates = {row["stage"]: row["images_per_s"] for row in found}
        for line in [*verdict(rates, recipe.data, recipe.crops, machine_of(run)), *loader.notes]:
            say(console, line)
    if file is not None and ranks.first:
        file.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


def machine_of(run: Run) -> Machine:
    """What the verdict must know of the machine and the pictures."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    shards = sum(shard.bytes for shard in run.index.manifest.shards)
    short_side = float(np.median(np.minimum(run.index.heights, run.index.widths)))
    return Machine(run.ranks.device.type == "cuda", default_threads(), short_side, shards < memory / 2)


def arguments_of(arguments: Sequence[str]) -> tuple[argparse.Namespace, Recipe]:
    """The doctor's own arguments, and the recipe of the others. Raises UsageError."""
    parser = argparse.ArgumentParser(
        prog="dino-fast doctor",
        usage="dino-fast doctor --data DIR [--config FILE] [--SETTING VALUE ...] [--seconds S] [--json FILE]",
        description="Measure what limits a run of a recipe on this machine, and say which setting would lift it.",
        epilog="Any setting of a recipe may follow, as for training: `dino-fast train --help` lists them.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--data", metavar="DIR", help="the shards; the same as --data.train")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each measurement; default: 5")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there, a JSON object a line")
    try:
        own, rest = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from error
    if not 0 < own.seconds < math.inf:
        raise UsageError(f"--seconds {own.seconds}: expected a number above 0")
    if own.json and not own.json.parent.is_dir():
        raise UsageError(f"--json {own.json}: no such folder; make it first")
    data = ["--data.train", own.data] if own.data else []
    return own, read_recipe([*rest, *data], "dino-fast doctor", also=list(vars(own)))


def main(arguments: Sequence[str] | None = None) -> int:
    """The doctor command. Returns its exit status: 0, 1 for a failed measurement, 2 for a wrong call."""
    try:
        own, recipe = arguments_of(sys.argv[1:] if arguments is None else arguments)
        with join(recipe.device) as ranks:
            doctor(recipe, ranks, own.seconds, own.json)
        return 0
    except (UserError, OSError) as error:  # TimeoutError is an OSError
        print(f"dino-fast doctor: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except torch.OutOfMemoryError:
        print("dino-fast doctor: out of GPU memory: lower --batch_size, or use more GPUs", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dino-fast doctor: stopped", file=sys.stderr)
        return 130
