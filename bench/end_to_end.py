"""Measure what the loader costs the training: the step alone on crops in memory, and the same step fed from shards.

    python -m bench.end_to_end SHARDS
    python -m bench.end_to_end SHARDS --arm ours-compiled --published --json bench/results/end_to_end.jsonl
    python -m bench.end_to_end SHARDS --decode dali --decode_device gpu split --kernels kernels.jsonl

Both arms run the same step in turn. --arm names it, one of the arms of bench/step.py. "step alone" repeats one batch of
the loader. "loader + step" starts to load again in each round. It counts after 8 steps, when all batches that were made
before the clock started are used. Between its rounds nothing is loaded. The settings of `data` may have several values
each. Then there is such an arm for every combination. The figures of a round over --steps steps:

- images: images a second;
- step: ms a step;
- stall: percent of the time for which the step waited for batches, as the loader counts it;
- busy cores: seconds of CPU cores for each second, with those of the loader's threads;
- of the step alone: percent of the images a second of "step alone" in the same round.

With --kernels, each arm but "published" runs --steps steps more under torch's profiler on a GPU. Each kernel and copy
becomes one line of JSON: arm, kernel (the start of its name), class, launches a step, ms a step.

With --published there is a third arm without our code: the published step of bench/baselines.py, fed by the published
loader of bench/peers.py from the shards' images as files, with a worker process for each core. It counts after all that
the workers had made ahead is used.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench import peers
from bench.data_settings import add_data_settings, read_combinations
from bench.kernel_classes import list_launches, make_kernel_rows
from bench.peer_views import Views as PeerViews
from bench.records import make_records, report, save_partial, to_json_lines
from bench.step_arms import ARM_KINDS, Step, Views, make_loader_views
from bench.step_recipe import add_recipe_arguments, build_recipe, choose_device, describe_recipe
from bench.timing import Figures, read_clock, run_interleaved
from dino_fast.config import Recipe
from dino_fast.step.precision import DTYPES
from pipelines.batch import Batch
from pipelines.loader import DataRecipe, Loader, count_default_threads
from shards.index import ShardIndex

WARM_UP = 8  # steps, more than the loader's queues hold
ALONE, FED, PUBLISHED = "step alone", "loader + step", "published loader + step"
UNITS = {"images": "img/s", "step": "ms", "stall": "%", "busy cores": "cores", "of the step alone": "%"}
FEEDABLE = [name for name, kind in ARM_KINDS.items() if kind.views is make_loader_views]


@dataclass
class Setup:
    """What all arms are given."""

    step: Step
    """the training step"""
    batch: int
    """images in a step"""
    steps: int
    """steps in a round"""
    device: torch.device
    """where the step runs"""
    round_numbers: Iterator[int] = field(default_factory=count)
    """numbers of the rounds; each one loads other steps"""


def get_views(batch: Batch) -> Views:
    """Return global and local views of a batch."""
    assert batch.locals is not None
    return batch.globals, batch.locals


def load_first_batch(loader: Loader) -> Views:
    """Return the loader's first batch. The loader loads nothing more."""
    batches = loader.batches(0, 1)
    views = get_views(next(batches))
    batches.close()
    return views


def measure_alone(setup: Setup, views: Views) -> Figures:
    """Return the figures of a round of the step alone."""
    start = read_clock(setup.device)
    for _ in range(setup.steps):
        setup.step(*views)
    return make_figures(setup, read_clock(setup.device) - start)


def measure_fed(setup: Setup, loader: Loader) -> Figures:
    """Return the figures of a round of loader and step."""
    first = next(setup.round_numbers) * (WARM_UP + setup.steps)
    batches = loader.batches(first, 10**12)
    try:
        for batch in islice(batches, WARM_UP):
            setup.step(*get_views(batch))
        start, cpu = read_clock(setup.device), time.process_time()
        loader.read_figures()  # so that the next reading counts from here
        for batch in islice(batches, setup.steps):
            setup.step(*get_views(batch))
        seconds = read_clock(setup.device) - start
        busy = (time.process_time() - cpu) / seconds
        stall = 100 * loader.read_figures().stall / seconds
        return make_figures(setup, seconds) | {"stall": stall, "busy cores": busy}
    finally:
        batches.close()


def measure_published(step: Step, start_loader: Callable[[], Iterator[PeerViews]], cores: int, setup: Setup) -> Figures:
    """Return the figures of a round of the published loader and step. The loader's workers hold two batches a core."""
    batches = start_loader()
    for views in islice(batches, 2 * cores):
        step(*move_views(views, setup.device))
    start = read_clock(setup.device)
    for views in islice(batches, setup.steps):
        step(*move_views(views, setup.device))
    return make_figures(setup, read_clock(setup.device) - start)


def move_views(views: PeerViews, device: torch.device) -> Views:
    """Copy a peer's views to the device, and stack global and local views."""
    moved = [view.to(device, non_blocking=True) for view in views]
    return torch.cat(moved[:2]), torch.cat(moved[2:])


def make_figures(setup: Setup, seconds: float) -> Figures:
    """Return images and step from the seconds of a round."""
    return {"images": setup.batch * setup.steps / seconds, "step": 1e3 * seconds / setup.steps}


def add_ratio(rounds: dict[str, list[Figures]]) -> None:
    """Compare each arm of loader and step with the step alone of the same round."""
    for name, figures in rounds.items():
        for figure, plain in zip(figures, rounds.get(ALONE, []), strict=False):
            if name.startswith(FED):
                figure["of the step alone"] = 100 * figure["images"] / plain["images"]


def profile_arms(arms: dict[str, Callable[[], Figures]], setup: Setup) -> Iterator[dict[str, Any]]:
    """Run each arm once more under the profiler, and yield a row for each of its kernels and copies."""
    for name, arm in arms.items():
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            arm()
        steps = setup.steps + (WARM_UP if name.startswith(FED) else 0)
        for row in make_kernel_rows(name, list_launches(profiler)):
            yield row | {"launches": row["launches"] / steps, "ms": row["ms"] / steps}


def build_loader(index: ShardIndex, recipe: Recipe, device: torch.device, data: DataRecipe) -> Loader:
    """Build the loader as training builds it."""
    return Loader(
        index, data, recipe.crops, recipe.augment, batch=recipe.batch_size, seed=recipe.seed,
        device=device, dtype=DTYPES[recipe.precision],
    )  # fmt: skip


def build_published_arm(setup: Setup, index: ShardIndex, folder: Path, recipe: Recipe) -> Callable[[], Figures]:
    """Return the arm of --published. Writes the images of the shards into `folder`."""
    peers.unpack(index, folder)
    cores = count_default_threads()
    start = partial(peers.load_published, folder, recipe.crops, recipe.augment, recipe.batch_size, cores)
    return partial(measure_published, ARM_KINDS["published"].build(recipe, setup.device), start, cores, setup)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="folder that make-shards wrote")
    add_recipe_arguments(parser)
    parser.set_defaults(steps=50 if gpu else 10)
    parser.add_argument(
        "--arm", choices=FEEDABLE, default="ours-fused-graphed" if gpu else "ours", metavar="ARM",
        help=f"the step: {', '.join(FEEDABLE)} (default %(default)s)",
    )  # fmt: skip
    add_data_settings(parser)
    parser.add_argument("--kernels", type=Path, metavar="FILE", help="append every kernel of each arm, as JSON lines")
    parser.add_argument("--published", action="store_true", help="measure the published loader and step, too")
    return parser.parse_args()


def main() -> None:
    """Measure the arms, and report their records."""
    options = parse_arguments()
    recipe, device = build_recipe(options), choose_device(options.precision)
    kind = ARM_KINDS[options.arm]
    if problem := kind.find_problem(device):
        raise SystemExit(f"--arm {options.arm} does not run here: {problem}")
    step = kind.build(recipe, device)
    with ShardIndex(options.shards) as index, tempfile.TemporaryDirectory() as folder:
        loaders = {
            ", ".join([FED, *filter(None, [name])]): build_loader(index, recipe, device, data)
            for name, data in read_combinations(options)
        }
        setup = Setup(step, recipe.batch_size, options.steps, device)
        first = load_first_batch(next(iter(loaders.values())))
        arms: dict[str, Callable[[], Figures]] = {ALONE: partial(measure_alone, setup, first)}
        arms |= {name: partial(measure_fed, setup, loader) for name, loader in loaders.items()}
        ours = dict(arms)
        if options.published:
            arms[PUBLISHED] = build_published_arm(setup, index, Path(folder), recipe)
        rounds = run_interleaved(arms, options.rounds, partial(save_partial, "end to end", UNITS, options.json))
        add_ratio(rounds)
        print(f"{options.arm} from {options.shards}: {describe_recipe(recipe, device)}")
        for note in dict.fromkeys(note for loader in loaders.values() for note in loader.notes):
            print(note)
        report(make_records("end to end", UNITS, rounds), options.json)
        if options.kernels is not None and device.type == "cuda":
            with open(options.kernels, "a", encoding="utf-8") as out:
                for row in profile_arms({name: arm for name, arm in ours.items() if name in rounds}, setup):
                    out.write(to_json_lines([row]))


if __name__ == "__main__":
    main()
