"""Estimate what a run will do and cost: steps, phases, schedules, checkpoints, memory, time."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dino_fast.advise.memory import build_meta_step, count_bytes, estimate_memory
from dino_fast.advise.schedule_plots import sample_schedules
from dino_fast.config import Recipe
from dino_fast.distributed import Ranks
from dino_fast.run.build import check_batch_size
from dino_fast.run.schedules import Schedules
from shards.errors import UserError
from shards.index import ShardIndex

Plan = dict[str, Any]  # plain data, as --json writes it; sizes in bytes, times in seconds

_POINTS = 101  # of each schedule in a plan


@dataclass(frozen=True)
class TrainSet:
    """The size of the training set."""

    images: int
    """how many"""
    mean_bytes: float | None
    """mean size of an encoded image; None if only the number of images is known"""
    source: str
    """where this is known from: a folder, or a flag"""


def measure_train_set(recipe: Recipe, images: int | None) -> TrainSet:
    """Return the training set of so many images, or else that of the recipe's shards.

    Raises UserError where there are no shards, or fewer images than a batch.
    """
    if images is not None:
        found = TrainSet(images, None, "--images")
    else:
        try:
            with ShardIndex(recipe.data.train) as index:
                found = TrainSet(len(index), float(index.records["size"].mean()), recipe.data.train)
        except UserError as error:
            raise UserError(f"{str(error).rstrip('.')}. To plan without shards, pass --images N.") from error
    if found.images < recipe.batch_size:
        raise UserError(
            f"--batch_size {recipe.batch_size} is larger than the training set ({found.images} images). Lower it."
        )
    return found


def estimate_run(recipe: Recipe, train_set: TrainSet, world: int = 1, images_per_s: float | None = None) -> Plan:
    """Estimate what the recipe does with the training set on `world` ranks.

    `images_per_s` is the speed of all ranks together. Raises UserError for a run that would not start.
    """
    check_batch_size(recipe, Ranks(0, world, torch.device("meta")))
    schedules = Schedules(recipe, train_set.images // recipe.batch_size)
    stop = min(recipe.max_steps or schedules.total_steps, schedules.total_steps)
    step = build_meta_step(recipe)
    epoch_images = schedules.steps_per_epoch * recipe.batch_size
    return {
        "data": {
            "source": train_set.source, "images": train_set.images, "images_per_epoch": epoch_images,
            "bytes_per_epoch": None if train_set.mean_bytes is None else round(train_set.mean_bytes * epoch_images),
        },
        "run": {
            "steps_per_epoch": schedules.steps_per_epoch, "schedule_steps": schedules.total_steps, "steps": stop,
            "epochs": stop / schedules.steps_per_epoch, "images": stop * recipe.batch_size, "ranks": world,
            "images_per_part": recipe.batch_size // (world * recipe.accumulate),
        },
        "phases": list_phases(schedules),
        "parameters": {
            name: sum(parameter.numel() for parameter in network.parameters())
            for name, network in (("backbone", step.bare_student.backbone), ("head", step.bare_student.head))
        },
        "checkpoints": count_checkpoints(schedules, stop, count_bytes(step.state_dict())),
        "memory": estimate_memory(recipe, step, recipe.batch_size // world),
        "time": estimate_time(recipe, stop, world, images_per_s),
        "schedules": sample_schedules(schedules, _POINTS),
    }  # fmt: skip


def list_phases(schedules: Schedules) -> list[Plan]:
    """Return what happens at the start of the run only, and for how many steps."""
    loss = schedules.recipe.loss
    temperatures = loss.warmup_teacher_temp, loss.teacher_temp
    warm = schedules.temperature_epochs * schedules.steps_per_epoch if temperatures[0] != temperatures[1] else 0
    steps = {
        "the head's last layer is frozen": schedules.frozen_steps,
        f"the learning rate rises from 0 to {schedules.lr:.4g}": schedules.warmup_steps,
        "the teacher's temperature goes from {:.4g} to {:.4g}".format(*temperatures): warm,
    }
    return [{"phase": name, "steps": min(count, schedules.total_steps)} for name, count in steps.items() if count]


def count_checkpoints(schedules: Schedules, stop: int, size: int) -> Plan:
    """Count the checkpoints of `size` bytes that are written and kept. A file has some 0.1 % more than its tensors."""
    recipe = schedules.recipe.checkpoint
    every, keep_every = max(1, schedules.steps(recipe.every)), schedules.steps(recipe.keep_every)
    kept_for_good = set(range(keep_every, stop + 1, keep_every)) if keep_every else set()
    written = sorted({*range(every, stop + 1, every), *kept_for_good, stop})
    kept = len({*written[-recipe.keep :], *kept_for_good})
    return {
        "bytes": size, "every_steps": every, "written": len(written), "kept": kept, "disk_bytes": kept * size,
        "peak_disk_bytes": (kept + (len(written) > kept)) * size,
    }  # fmt: skip


def estimate_time(recipe: Recipe, steps: int, world: int, images_per_s: float | None) -> Plan:
    """Estimate the time of so many steps, at a given or logged speed. It is None where neither is known."""
    source = "--images-per-s"
    if images_per_s is None:
        file = Path(recipe.output) / "metrics.jsonl"
        rate = read_logged_rate(file)
        images_per_s = None if rate is None else rate * world
        times = f" times {world} ranks" if world > 1 else ""
        source = "unknown" if rate is None else f"median of {file}{times}"
    seconds = None if images_per_s is None else steps * recipe.batch_size / images_per_s
    return {"images_per_s": images_per_s, "source": source, "seconds": seconds}


def read_logged_rate(file: Path) -> float | None:
    """Return the median of the images a second and rank that a run logged. It is None if the run logged none."""
    rates = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a killed run may be cut off
        rate = row.get("images_per_s_per_gpu") if isinstance(row, dict) else None
        rates += [rate] if isinstance(rate, (int, float)) and rate > 0 else []
    return statistics.median(rates) if rates else None
