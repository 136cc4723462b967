"""What the loader costs the training: the step alone on pictures that lie in memory, and the same step fed from shards.

    python -m bench.end_to_end SHARDS [--arm ours] [--batch 8] [--precision P] [--rounds 5] [--steps 10]
                               [--decode auto] [--published] [--json bench/results/X.jsonl]

Both arms take the same step (--arm: one of `bench/step.py`'s), in turn. "step alone" repeats one batch of the loader.
"loader + step" begins to load afresh each round, and counts after WARM_UP steps, so that no batch is made ahead of the
clock; between its rounds nothing is loaded. Figures of a round, over --steps steps:

- images: a second;
- step: ms;
- stall: percent of the time for which the step stood waiting for batches, as the loader counts it;
- of the step alone: percent of its images a second in the same round.

With --published a third arm has nothing of ours: `bench/baselines.py`'s published step, fed by `bench/peers.py`'s
published loader, a worker process a core, from the shards' pictures as files. It counts once what the workers had made
ahead is gone.
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
from bench.roofline import finished
from bench.step import KINDS, Figures, Step, Views, add_arguments, choose_device, described, loader_views, recipe_of
from bench.timing import interleaved, keep_records, records, report
from dino_fast.config import Recipe
from dino_fast.train import DTYPES
from pipelines.loader import Batch, DataRecipe, Loader, default_threads
from shards.index import ShardIndex

WARM_UP = 8  # steps: more than the loader's queues hold
ALONE, FED, PUBLISHED = "step alone", "loader + step", "published loader + step"
UNITS = {"images": "img/s", "step": "ms", "stall": "%", "of the step alone": "%"}
FEEDABLE = [name for name, kind in KINDS.items() if kind.views is loader_views]


@dataclass
class Setting:
    """What both arms are given."""

    step: Step
    loader: Loader
    batch: int
    steps: int
    device: torch.device
    places: Iterator[int] = field(default_factory=count)  # step numbers that have not been loaded yet


def views(batch: Batch) -> Views:
    assert batch.locals is not None
    return batch.globals, batch.locals


def first_batch(setting: Setting) -> Views:
    """A batch of the loader, which loads nothing more."""
    batches = setting.loader.batches(0, 1)
    made = views(next(batches))
    batches.close()
    return made


def alone(setting: Setting, made: Views) -> Figures:
    start = finished(setting.device)
    for _ in range(setting.steps):
        setting.step(*made)
    return figures(setting, finished(setting.device) - start)


def fed(setting: Setting) -> Figures:
    place = next(setting.places) * (WARM_UP + setting.steps)
    batches = setting.loader.batches(place, 10**12)
    try:
        for batch in islice(batches, WARM_UP):
            setting.step(*views(batch))
        start = finished(setting.device)
        setting.loader.figures()  # counts from here on
        for batch in islice(batches, setting.steps):
            setting.step(*views(batch))
        seconds = finished(setting.device) - start
        return figures(setting, seconds) | {"stall": 100 * setting.loader.figures().stall / seconds}
    finally:
        batches.close()


def published_fed(step: Step, begin: Callable[[], Iterator[peers.Views]], cores: int, setting: Setting) -> Figures:
    """begin: starts the published loader, whose workers hold two batches a core."""
    batches = begin()
    for made in islice(batches, 2 * cores):
        step(*on_device(made, setting.device))
    start = finished(setting.device)
    for made in islice(batches, setting.steps):
        step(*on_device(made, setting.device))
    return figures(setting, finished(setting.device) - start)


def on_device(made: peers.Views, device: torch.device) -> Views:
    moved = [view.to(device, non_blocking=True) for view in made]
    return torch.cat(moved[:2]), torch.cat(moved[2:])


def figures(setting: Setting, seconds: float) -> Figures:
    return {"images": setting.batch * setting.steps / seconds, "step": 1e3 * seconds / setting.steps}


def add_ratio(rounds: dict[str, list[Figures]]) -> None:
    """Each round against the step alone in the same round."""
    for figure, plain in zip(rounds.get(FED, []), rounds.get(ALONE, []), strict=False):
        figure["of the step alone"] = 100 * figure["images"] / plain["images"]


def build_loader(index: ShardIndex, recipe: Recipe, device: torch.device, data: DataRecipe) -> Loader:
    """As train.py builds it."""
    return Loader(
        index, data, recipe.crops, recipe.augment, batch=recipe.batch_size, seed=recipe.seed,
        device=device, dtype=DTYPES[recipe.precision],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    add_arguments(parser)
    parser.set_defaults(steps=50 if torch.cuda.is_available() else 10)
    parser.add_argument(
        "--arm", choices=FEEDABLE, default="ours-fused-graphed" if torch.cuda.is_available() else "ours"
    )
    parser.add_argument("--decode", choices=("auto", "dali", "torch"), default="auto", help="`data.decode` of a recipe")
    parser.add_argument("--published", action="store_true", help="the published loader and step, too")
    options = parser.parse_args()
    recipe, device = recipe_of(options), choose_device(options.precision)
    if lacking := KINDS[options.arm].lacks(device):
        raise SystemExit(f"--arm {options.arm}: {lacking}")
    step = KINDS[options.arm].build(recipe, device)
    with ShardIndex(options.shards) as index, tempfile.TemporaryDirectory() as files:
        loader = build_loader(index, recipe, device, DataRecipe(decode=options.decode))
        setting = Setting(step, loader, recipe.batch_size, options.steps, device)
        arms = {ALONE: partial(alone, setting, first_batch(setting)), FED: partial(fed, setting)}
        if options.published:
            peers.unpack(index, Path(files))
            cores = default_threads()
            begin = partial(peers.published, Path(files), recipe.crops, recipe.augment, recipe.batch_size, cores)
            arms[PUBLISHED] = partial(published_fed, KINDS["published"].build(recipe, device), begin, cores, setting)
        rounds = interleaved(arms, options.rounds, partial(keep_records, "end to end", UNITS, options.json))
    add_ratio(rounds)
    print(f"{options.arm} from {options.shards}: {described(recipe, device)}")
    for note in setting.loader.notes:
        print(note)
    report(records("end to end", UNITS, rounds), options.json)


if __name__ == "__main__":
    main()
