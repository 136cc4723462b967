"""What a run will do and cost, told before it is started; the plan command.

`dino-fast plan --config FILE --images N`: steps, phases and schedules, checkpoints, memory, time. Networks are built on
torch's meta device, whose tensors have shapes and no memory. So it takes seconds, no GPU, and with --images no shards.
"""

import argparse
import copy
import json
import math
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino_fast.config import Recipe, UsageError, read_recipe
from dino_fast.distributed import Ranks
from dino_fast.run.schedules import Hyper, Schedules
from dino_fast.step.train_step import TrainStep
from dino_fast.train import DTYPES, build_step
from shards.errors import UserError
from shards.index import ShardIndex
from shards.inspect.info import amount

Plan = dict[str, Any]  # plain data, as --json writes it; sizes in bytes, times in seconds

_LOADED = 3  # batches beside those queued: at the step, just given up by it, being made
_TORCH_LOSS = 3  # times the logits that torch's operations hold; kernels hold them once, and their gradient there
_CURVES = {
    "lr": "learning rate", "weight_decay": "weight decay", "momentum": "EMA momentum",
    "teacher_temp": "teacher temperature",
}  # fmt: skip
_BLOCKS = " ▁▂▃▄▅▆▇█"  # by eighths
_HEIGHT, _GUTTER, _WIDEST = 4, 9, 120  # of a plot: rows, columns for the values of its axis, columns in all


@dataclass(frozen=True)
class Pictures:
    """The data of a run."""

    count: int
    mean_bytes: float | None  # of a compressed picture; None where only the count is known
    source: str


def pictures_of(recipe: Recipe, images: int | None) -> Pictures:
    """So many images, or else the recipe's shards. Raises UserError where there are none, or fewer than a batch."""
    if images is not None:
        found = Pictures(images, None, "--images")
    else:
        try:
            with ShardIndex(recipe.data.train) as index:
                found = Pictures(len(index), float(index.records["size"].mean()), recipe.data.train)
        except UserError as error:
            raise UserError(f"{error}; to plan without shards pass --images N") from error
    if found.count < recipe.batch_size:
        raise UserError(f"--batch_size {recipe.batch_size} is larger than the data ({found.count} images): lower it")
    return found


def make_plan(recipe: Recipe, pictures: Pictures, world: int = 1, images_per_s: float | None = None) -> Plan:
    """What the recipe does to the pictures on `world` ranks. Raises UserError for what would not start."""
    parts = world * recipe.accumulate
    if recipe.batch_size % parts:
        raise UserError(
            f"--batch_size {recipe.batch_size} does not divide into {world} ranks with --accumulate "
            f"{recipe.accumulate} parts each: choose one that does"
        )
    schedules = Schedules(recipe, pictures.count // recipe.batch_size)
    stop = min(recipe.max_steps or schedules.total_steps, schedules.total_steps)
    step = after_a_step(recipe)
    epoch_images = schedules.steps_per_epoch * recipe.batch_size
    return {
        "data": {
            "source": pictures.source, "images": pictures.count, "images_an_epoch": epoch_images,
            "bytes_an_epoch": None if pictures.mean_bytes is None else round(pictures.mean_bytes * epoch_images),
        },
        "run": {
            "steps_per_epoch": schedules.steps_per_epoch, "schedule_steps": schedules.total_steps, "steps": stop,
            "epochs": stop / schedules.steps_per_epoch, "images": stop * recipe.batch_size, "ranks": world,
            "images_a_part": recipe.batch_size // parts,
        },
        "phases": phases(schedules),
        "parameters": {
            name: sum(p.numel() for p in part.parameters())
            for name, part in (("backbone", step.bare_student.backbone), ("head", step.bare_student.head))
        },
        "checkpoints": checkpoints(schedules, stop, size_of(step.state_dict())),
        "memory": memory(recipe, step, recipe.batch_size // world),
        "time": duration(recipe, stop, world, images_per_s),
        "schedules": curves(schedules, 101),
    }  # fmt: skip


# What it does


def phases(schedules: Schedules) -> list[Plan]:
    """What happens at the start alone, and during how many steps."""
    loss = schedules.recipe.loss
    temperatures = loss.warmup_teacher_temp, loss.teacher_temp
    warm = schedules.temperature_epochs * schedules.steps_per_epoch if temperatures[0] != temperatures[1] else 0
    steps = {
        "the last layer is frozen": schedules.frozen_steps,
        f"the learning rate rises to {schedules.lr:.4g}": schedules.warmup_steps,
        "the teacher's temperature goes from {:.4g} to {:.4g}, by epochs".format(*temperatures): warm,
    }
    return [{"phase": name, "steps": min(count, schedules.total_steps)} for name, count in steps.items() if count]


def curves(schedules: Schedules, points: int) -> dict[str, list[float]]:
    """The schedules at so many steps, evenly from the first to the last, and those steps as "step"."""
    steps = [round(point * (schedules.total_steps - 1) / (points - 1)) for point in range(points)]
    hypers = [schedules.at(step) for step in steps]
    return {"step": steps} | {name: [getattr(hyper, name) for hyper in hypers] for name in _CURVES}


def edges(schedules: Schedules) -> list[Hyper]:
    """The steps at which a schedule is highest or lowest."""
    last = schedules.total_steps - 1
    warm = schedules.temperature_epochs * schedules.steps_per_epoch
    return [schedules.at(min(max(step, 0), last)) for step in (0, schedules.warmup_steps - 1, warm, last)]


# What it costs


def after_a_step(recipe: Recipe) -> TrainStep:
    """The networks and the optimizer's state as after a first step, on the meta device."""
    meta = torch.device("meta")
    with meta:
        step = build_step(recipe, Ranks(0, 1, meta), kernels=False)
    for parameter in step.bare_student.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    step.optimizer.step()
    return step


def tensors_in(state: Any) -> Iterator[Tensor]:
    """Every tensor in plain data."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, (dict, list, tuple)):
        for item in state.values() if isinstance(state, dict) else state:
            yield from tensors_in(item)


def size_of(state: Any) -> int:
    """Bytes of the tensors in plain data."""
    return sum(tensor.nbytes for tensor in tensors_in(state))


def checkpoints(schedules: Schedules, stop: int, size: int) -> Plan:
    """How many are written and kept of `size` bytes each, which leaves out some 0.1 % for the file's own order."""
    recipe = schedules.recipe.checkpoint
    every, milestone = max(1, schedules.steps(recipe.every)), schedules.steps(recipe.keep_every)
    milestones = set(range(milestone, stop + 1, milestone)) if milestone else set()
    written = sorted({*range(every, stop + 1, every), *milestones, stop})
    kept = len({*written[-recipe.keep :], *milestones})
    return {
        "bytes": size, "every_steps": every, "written": len(written), "kept": kept, "disk_bytes": kept * size,
        "most_disk_bytes": (kept + (len(written) > kept)) * size,
    }  # fmt: skip


def memory(recipe: Recipe, step: TrainStep, share: int) -> dict[str, int]:
    """Bytes on one device, estimated for `share` images a step; their sum is what the backward pass takes at most.

    - weights: student, teacher and centre; on a GPU also the half-precision copies of convolutions and linear layers;
    - gradients, twice where those of one part are added to those of others, and the optimizer's state;
    - activations: what the backward pass of the student needs of the images of one part, counted tensor by tensor on
      the meta device, without a compiler, which may need less; and the prototypes at length 1;
    - logits: (V + 2) · images · K of student and teacher, by `_TORCH_LOSS` without kernels;
    - batches: `data.prefetch` + `_LOADED` of `share` images, 8-bit crops and augmented ones.

    Left out: CUDA's context, the libraries' workspaces, the allocator's gaps. Not compared with a GPU's figures yet.
    """
    on_gpu, precision = recipe.device != "cpu", DTYPES[recipe.precision]
    images = share // recipe.accumulate
    pixels = 3 * sum(side**2 for side in recipe.crops.sizes)
    logit_size = 2 if recipe.precision == "fp16" else 4
    student, head = step.bare_student, recipe.head
    logits = (recipe.crops.views + 2) * images * head.out_dim * logit_size
    halves = sum(map(half_weights, (student, step.teacher))) if on_gpu and recipe.precision != "fp32" else 0
    state = step.state_dict()
    parts = {
        "weights": size_of([state["student"], state["teacher"], state["center"]]) + halves,
        "gradients": sum(p.nbytes for p in student.parameters() if p.requires_grad)
        * (2 if recipe.accumulate > 1 else 1),
        "optimizer": size_of(state["optimizer"]),
        "activations": activations(recipe, step, images) + head.out_dim * head.bottleneck_dim * 4,
        "logits": logits * (1 if on_gpu else _TORCH_LOSS),
        "batches": (recipe.data.prefetch + _LOADED) * share * pixels * (precision.itemsize + 1),
    }
    return parts | {"total": sum(parts.values())}


def half_weights(network: nn.Module) -> int:
    """Bytes of a network's copies for autocast (`half_weights.py`)."""
    layers = (module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))
    return sum(2 * parameter.numel() for layer in layers for parameter in layer.parameters())


def activations(recipe: Recipe, step: TrainStep, images: int) -> int:
    """Bytes that autograd keeps of the student, up to the last layer, for the views of so many images."""
    dtype = DTYPES[recipe.precision]  # autocast knows no meta device: the network itself takes the precision
    student = copy.deepcopy(step.bare_student).to(dtype)
    views = [
        torch.empty((part.stop - part.start) * images, 3, size, size, dtype=dtype, device="meta")
        for size, part in recipe.crops.resolutions
    ]
    own = {_storage(tensor) for tensor in (*student.parameters(), *student.buffers(), *views)}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[_storage(tensor)] = tensor  # held, so that no other storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        student.head.mlp(torch.cat([student.backbone(view) for view in views]))
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in own)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def duration(recipe: Recipe, steps: int, world: int, images_per_s: float | None) -> Plan:
    """Of so many steps, at a given or measured speed of all ranks together; None where there is neither."""
    source = "--images-per-s"
    if images_per_s is None:
        file = Path(recipe.output) / "metrics.jsonl"
        rate = measured_rate(file)
        images_per_s = None if rate is None else rate * world
        source = "unknown" if rate is None else f"{file}: its median for a rank, times {world}"
    seconds = None if images_per_s is None else steps * recipe.batch_size / images_per_s
    return {"images_per_s": images_per_s, "source": source, "seconds": seconds}


def measured_rate(file: Path) -> float | None:
    """Median of the images a second and rank that a run logged; None where it logged none."""
    rates = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last one of a killed run
        rate = row.get("images_per_s_per_gpu") if isinstance(row, dict) else None
        rates += [rate] if isinstance(rate, (int, float)) and rate > 0 else []
    return statistics.median(rates) if rates else None


# How it is shown


def told(recipe: Recipe, plan: Plan) -> Iterator[str]:
    """The plan in lines of text, without the schedules."""
    last = ""
    for title, text in (*_doing(recipe, plan), *_costing(recipe, plan)):
        yield f"{title if title != last else '':12s} {text}"
        last = title


def _doing(recipe: Recipe, plan: Plan) -> Iterator[tuple[str, str]]:
    data, run = plan["data"], plan["run"]
    views = " + ".join(f"{part.stop - part.start}×{size}" for size, part in recipe.crops.resolutions)
    yield "data", f"{data['images']:,} images ({data['source']}), of which an epoch sees {data['images_an_epoch']:,}"
    yield "run", f"{run['steps']:,} steps of {recipe.batch_size:,} images: {run['images']:,} in all"
    yield "run", f"{_epochs(run['epochs'])} of {_count(run['steps_per_epoch'], 'step')}"
    if run["steps"] < run["schedule_steps"]:
        yield "run", f"max_steps ends it there: the schedules are for {run['schedule_steps']:,} steps"
    ranks, each = ("one rank", "") if run["ranks"] == 1 else (f"{run['ranks']:,} ranks", " each")
    parts = f" in {recipe.accumulate} parts of {run['images_a_part']:,}" if recipe.accumulate > 1 else ""
    share = run["images_a_part"] * recipe.accumulate
    yield "a step", f"{ranks}, {share:,} images{each}{parts}, as {views} pixels, in {recipe.precision}"
    for phase in plan["phases"]:
        epochs = _epochs(phase["steps"] / run["steps_per_epoch"])
        yield "phases", f"{phase['phase']}: the first {_count(phase['steps'], 'step')} ({epochs})"


def _costing(recipe: Recipe, plan: Plan) -> Iterator[tuple[str, str]]:
    data, run, saved, used, time = (plan[name] for name in ("data", "run", "checkpoints", "memory", "time"))
    sizes = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in plan["parameters"].items())
    yield "parameters", f"{recipe.backbone}: {sizes}; the teacher has as many again"
    yield "checkpoints", f"{amount(saved['bytes'])} each, every {_count(saved['every_steps'], 'step')} and at the end"
    yield (
        "checkpoints",
        (
            f"{saved['kept']:,} of {saved['written']:,} are kept: {amount(saved['disk_bytes'])}, "
            f"at most {amount(saved['most_disk_bytes'])} while one is written"
        ),
    )
    yield "memory", f"{amount(used['total'])} on each {'CPU' if recipe.device == 'cpu' else 'GPU'}, estimated:"
    yield "memory", ", ".join(f"{name} {amount(size)}" for name, size in used.items() if name != "total")
    if data["bytes_an_epoch"] is not None:
        whole = data["bytes_an_epoch"] * run["epochs"]
        yield "reading", f"{amount(data['bytes_an_epoch'])} of pictures an epoch, {amount(whole)} in all"
    if time["seconds"] is None:
        yield "time", "unknown: pass --images-per-s, of all ranks together"
    else:
        yield "time", f"{clock(time['seconds'])} of training at {time['images_per_s']:,.1f} img/s ({time['source']})"
        yield "time", "start-up, checkpoints and scores come on top"


def _epochs(number: float) -> str:
    return _count(round(number), "epoch") if number >= 1000 else f"{number:.4g} epoch{'s' if number != 1 else ''}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def plots(schedules: Schedules, width: int) -> Iterator[str]:
    """The schedules over the steps, in lines of at most `width` columns (of 40 at least)."""
    columns = min(max(width, 40), _WIDEST) - _GUTTER - 2
    drawn, turning = curves(schedules, columns), edges(schedules)
    for name, title in _CURVES.items():
        values = drawn[name]
        extremes = [*values, *(getattr(hyper, name) for hyper in turning)]
        if min(extremes) == max(extremes):
            yield f"{title}: {values[0]:.4g} throughout"
            continue
        yield f"{title} over steps"
        yield from plot(values, min(extremes), max(extremes))
        last = f"{schedules.total_steps - 1:,}"
        yield f"{'':{_GUTTER}} 0{last:>{columns}}"


def plot(values: Sequence[float], low: float, high: float) -> Iterator[str]:
    """Columns of blocks from `low` (empty) to `high` (full), one a value, beside and above their axes."""
    eighths = [round((value - low) / (high - low) * _HEIGHT * 8) for value in values]
    labels = {_HEIGHT - 1: f"{high:.4g}", 0: f"{low:.4g}"}
    for row in reversed(range(_HEIGHT)):
        blocks = "".join(_BLOCKS[min(max(filled - 8 * row, 0), 8)] for filled in eighths)
        yield f"{labels.get(row, ''):>{_GUTTER}} {'┤' if row in labels else '│'}{blocks}".rstrip()
    yield f"{'':{_GUTTER}} └{'─' * len(values)}"


def clock(seconds: float) -> str:
    """Time in the two units that matter: "3 d 4 h", "5 h 12 min", "40 s"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    if days:
        return f"{days:,} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


# The command


def arguments_of(arguments: Sequence[str]) -> tuple[argparse.Namespace, Recipe]:
    """The plan's own arguments, and the recipe of the others. Raises UsageError."""
    parser = argparse.ArgumentParser(
        prog="dino-fast plan",
        usage="dino-fast plan --config FILE [--SETTING VALUE ...] [--images N] [--world N] [--images-per-s X] "
        "[--json FILE]",
        description="Tell what a run of a recipe will do and cost: steps, schedules, checkpoints, memory, time.",
        epilog="Any setting of a recipe may follow, as for training: `dino-fast train --help` lists them.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--images", type=int, metavar="N", help="of the data; default: counts the shards of data.train")
    parser.add_argument("--world", type=int, default=1, metavar="N", help="ranks, one a GPU; default: 1")
    parser.add_argument(
        "--images-per-s", type=float, metavar="X",
        help="speed of all ranks together; default: what a run in the recipe's output has logged",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the plan there, as one JSON object")
    try:
        own, rest = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from error
    for flag, value in (("--images", own.images), ("--world", own.world), ("--images-per-s", own.images_per_s)):
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{flag} {value}: expected a number above 0")
    if own.json and not own.json.parent.is_dir():
        raise UsageError(f"--json {own.json}: no such folder; make it first")
    return own, read_recipe(rest, "dino-fast plan", also=[name.replace("_", "-") for name in vars(own)])


def main(arguments: Sequence[str] | None = None) -> int:
    """The plan command. Returns its exit status: 0, 1 for a run that could not start, 2 for a wrong call."""
    try:
        own, recipe = arguments_of(sys.argv[1:] if arguments is None else arguments)
        pictures = pictures_of(recipe, own.images)
        plan = make_plan(recipe, pictures, own.world, own.images_per_s)
        schedules = Schedules(recipe, plan["run"]["steps_per_epoch"])
        # All at once, so that `| head` breaks no pipe.
        print("\n".join([*told(recipe, plan), "", *plots(schedules, shutil.get_terminal_size().columns)]))
        if own.json:
            own.json.write_text(json.dumps(plan) + "\n", encoding="utf-8")
        return 0
    except (UserError, OSError) as error:
        print(f"dino-fast plan: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("dino-fast plan: stopped", file=sys.stderr)
        return 130
