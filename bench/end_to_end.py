"""Measure what the loader costs the training: the step alone on crops in memory, and the same step fed from shards.

    python -m bench.end_to_end SHARDS
    python -m bench.end_to_end SHARDS --arm ours-compiled --published --json bench/results/end_to_end.jsonl

Both arms run the same step in turn. --arm names it, one of the arms of bench/step.py. "step alone" repeats one batch of
the loader. "loader + step" starts to load again in each round. It counts after 8 steps, when all batches that were made
before the clock started are used. Between its rounds nothing is loaded. The figures of a round over --steps steps:

- images: images a second;
- step: ms a step;
- stall: percent of the time for which the step waited for batches, as the loader counts it;
- of the step alone: percent of the images a second of "step alone" in the same round.

With --published there is a third arm without our code: the published step of bench/baselines.py, fed by the published
loader of bench/peers.py from the shards' images as files, with a worker process for each core. It counts after all that
the workers had made ahead is used.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from pathlib import Path

import torch

from bench import peers
from bench.peer_views import Views as PeerViews
from bench.records import make_records, report, save_partial
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
UNITS = {"images": "img/s", "step": "ms", "stall": "%", "of the step alone": "%"}
FEEDABLE = [name for name, kind in ARM_KINDS.items() if kind.views is make_loader_views]


@dataclass
class Setup:
    """What both arms are given."""

    step: Step
    """the training step"""
    loader: Loader
    """our loader"""
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


def load_first_batch(setup: Setup) -> Views:
    """Return the loader's first batch. The loader loads nothing more."""
    batches = setup.loader.batches(0, 1)
    views = get_views(next(batches))
    batches.close()
    return views


def measure_alone(setup: Setup, views: Views) -> Figures:
    """Return the figures of a round of the step alone."""
    start = read_clock(setup.device)
    for _ in range(setup.steps):
        setup.step(*views)
    return make_figures(setup, read_clock(setup.device) - start)


def measure_fed(setup: Setup) -> Figures:
    """Return the figures of a round of loader and step."""
    first = next(setup.round_numbers) * (WARM_UP + setup.steps)
    batches = setup.loader.batches(first, 10**12)
    try:
        for batch in islice(batches, WARM_UP):
            setup.step(*get_views(batch))
        start = read_clock(setup.device)
        setup.loader.read_figures()  # so that the next reading counts from here
        for batch in islice(batches, setup.steps):
            setup.step(*get_views(batch))
        seconds = read_clock(setup.device) - start
        return make_figures(setup, seconds) | {"stall": 100 * setup.loader.read_figures().stall / seconds}
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
    """Compare loader and step with the step alone of the same round."""
    for figure, plain in zip(rounds.get(FED, []), rounds.get(ALONE, []), strict=False):
        figure["of the step alone"] = 100 * figure["images"] / plain["images"]


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
    parser.add_argument(
        "--decode", choices=("auto", "dali", "torch"), default="auto", help="data.decode of the recipe (auto)"
    )
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
        loader = build_loader(index, recipe, device, DataRecipe(decode=options.decode))
        setup = Setup(step, loader, recipe.batch_size, options.steps, device)
        arms: dict[str, Callable[[], Figures]] = {
            ALONE: partial(measure_alone, setup, load_first_batch(setup)),
            FED: partial(measure_fed, setup),
        }
        if options.published:
            arms[PUBLISHED] = build_published_arm(setup, index, Path(folder), recipe)
        rounds = run_interleaved(arms, options.rounds, partial(save_partial, "end to end", UNITS, options.json))
    add_ratio(rounds)
    print(f"{options.arm} from {options.shards}: {describe_recipe(recipe, device)}")
    for note in setup.loader.notes:
        print(note)
    report(make_records("end to end", UNITS, rounds), options.json)


if __name__ == "__main__":
    main()
