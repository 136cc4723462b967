"""A plan as lines of text."""

from collections.abc import Iterator

from dino_fast.advise.estimate import Plan
from dino_fast.config import Recipe
from pipelines.crops import CropRecipe
from shards.text import format_bytes

_TITLE_COLUMNS = 12


def format_plan(recipe: Recipe, plan: Plan) -> Iterator[str]:
    """Yield the lines of a plan, without the schedules. A title stands before the first of its lines."""
    last = ""
    for title, text in (*_describe_run(recipe, plan), *_describe_cost(recipe, plan)):
        yield f"{title if title != last else '':{_TITLE_COLUMNS}s} {text}"
        last = title


def _describe_run(recipe: Recipe, plan: Plan) -> Iterator[tuple[str, str]]:
    data, run = plan["data"], plan["run"]
    used = f"each epoch uses {data['images_per_epoch']:,} of them, in whole batches"
    yield "data", f"{data['images']:,} images ({data['source']}); {used}"
    yield "run", f"{run['steps']:,} steps of {recipe.batch_size:,} images, {run['images']:,} images in all"
    yield "run", f"{_count_epochs(run['epochs'])} of {_count(run['steps_per_epoch'], 'step')}"
    if run["steps"] < run["schedule_steps"]:
        yield "run", f"max_steps ends it early: the schedules are for {run['schedule_steps']:,} steps"
    yield "each step", _describe_step(recipe, plan)
    for phase in plan["phases"]:
        epochs = _count_epochs(phase["steps"] / run["steps_per_epoch"])
        yield "warm-up", f"{phase['phase']} during the first {_count(phase['steps'], 'step')} ({epochs})"


def _describe_step(recipe: Recipe, plan: Plan) -> str:
    run = plan["run"]
    share = f"{run['images_per_part'] * recipe.accumulate:,} images"
    ranks = f"1 rank with {share}" if run["ranks"] == 1 else f"{run['ranks']:,} ranks with {share} each"
    parts = f" in {recipe.accumulate} parts of {run['images_per_part']:,}" if recipe.accumulate > 1 else ""
    return f"{ranks}{parts}, each image in {describe_views(recipe.crops)}, in {recipe.precision}"


def describe_views(crops: CropRecipe) -> str:
    """Write the views of an image in words: "2 views of 224 pixels and 8 of 96"."""
    (globals_, *locals_) = [(part.stop - part.start, size) for size, part in crops.resolutions]
    others = "".join(f" and {count} of {size}" for count, size in locals_)
    return f"{globals_[0]} views of {globals_[1]} pixels{others}"


def _describe_cost(recipe: Recipe, plan: Plan) -> Iterator[tuple[str, str]]:
    data, saved, used = plan["data"], plan["checkpoints"], plan["memory"]
    sizes = " and ".join(f"{count / 1e6:.1f} M in the {name}" for name, count in plan["parameters"].items())
    yield "parameters", f"{recipe.backbone} has {sizes}; the teacher has as many"
    every = _count(saved["every_steps"], "step")
    yield "checkpoints", f"{format_bytes(saved['bytes'])} each, written every {every} and at the end"
    size, peak = format_bytes(saved["disk_bytes"]), format_bytes(saved["peak_disk_bytes"])
    during = f", and {peak} while one is being written" if peak != size else ""
    yield "checkpoints", f"{saved['kept']:,} of {saved['written']:,} are kept, which takes {size} on disk{during}"
    device = "CPU" if recipe.device == "cpu" else "GPU"
    yield "memory", f"about {format_bytes(used['total'])} on each {device}, by an estimate:"
    yield "memory", ", ".join(f"{name} {format_bytes(size)}" for name, size in used.items() if name != "total")
    if data["bytes_per_epoch"] is not None:
        whole = data["bytes_per_epoch"] * plan["run"]["epochs"]
        yield "reading", f"{format_bytes(data['bytes_per_epoch'])} of images an epoch, {format_bytes(whole)} in all"
    yield from _describe_time(plan)


def _describe_time(plan: Plan) -> Iterator[tuple[str, str]]:
    time = plan["time"]
    if time["seconds"] is None:
        yield "time", "unknown; to estimate it, pass --images-per-s (images a second of all ranks together)"
    else:
        speed = f"{time['images_per_s']:,.1f} img/s ({time['source']})"
        yield "time", f"{format_duration(time['seconds'])} of training at {speed}"
        yield "time", "start-up, checkpoints and k-NN scores are not included"


def _count_epochs(number: float) -> str:
    return _count(round(number), "epoch") if number >= 1000 else f"{number:.4g} epoch{'s' if number != 1 else ''}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def format_duration(seconds: float) -> str:
    """Write a time in the two units that matter: "3 d 4 h", "5 h 12 min", "40 s"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    if days:
        return f"{days:,} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
