"""`python -m dino_fast.demo` (what `make demo` runs): pictures, shards, training and its score, on the CPU.

Everything is written below one folder, `demo/` unless told otherwise. The steps are those of a real run: the same
packing, the same training, the same k-NN.
"""

import argparse
import dataclasses
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dino_fast.checkpoint import checkpoints
from dino_fast.config import Recipe, read_recipe
from dino_fast.demo.draw import PATTERNS, draw_dataset
from dino_fast.demo.own import Survey, cleared, stage, survey
from dino_fast.distributed import join
from dino_fast.durations import Duration
from dino_fast.evaluate.features import load_backbone
from dino_fast.evaluate.knn import knn_score
from dino_fast.run.schedules import Schedules
from dino_fast.train import build_step, claimed, train
from shards.errors import UserError
from shards.index import ShardIndex
from shards.packing.pack import Options, pack
from shards.sources.scan import scan
from shards.storage.lock import locked
from shards.storage.output import LocalFolder

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "cpu_demo.yaml"
DRAWN = 108  # pictures drawn of each class
VAL_OF_DRAWN = 30  # more, of each class, that are only classified
MOST = 1600  # of the user's pictures, so that copying and scoring them stay short
FEWEST = 16  # training pictures: batch norm and the centre need some company
K = 20  # nearest neighbours
NAMED = 5  # undecodable pictures that are named

say = Console(soft_wrap=True, highlight=False, markup=False).print


@dataclasses.dataclass(frozen=True)
class Sets:
    """Packed pictures: a training set, and a labelled set to be classified (None: no score can be had)."""

    train: ShardIndex
    val: ShardIndex | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo. Returns its exit status: 0, 1 for a failure, 130 for an interrupt."""
    options = parser().parse_args(arguments)
    try:
        demo(options)
        return 0
    except UserError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, say, in a place where nothing better is known
        print(f"demo: {error.filename or 'I/O'}: {error.strerror}; mend that and try again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: stopped; the same command starts it again", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m dino_fast.demo",
        description="Draw a labelled picture set, pack it, train on it on the CPU, and print the k-NN score before "
        "and after. A few minutes on two cores.",
    )
    found.add_argument("--images", type=Path, metavar="FOLDER", help="your own pictures instead; left as they are")
    found.add_argument("--output", type=Path, default=Path("demo"), help="where everything goes (default: demo)")
    found.add_argument("--pictures", type=_count, help=f"pictures of each drawn class to train on (default: {DRAWN})")
    found.add_argument("--steps", type=_count, help="stop after so many training steps; the default is all of them")
    found.add_argument("--seed", type=_seed, default=0, help="of the drawing, the packing and the training")
    return found


def demo(options: argparse.Namespace) -> None:
    """The demo from beginning to end. UserError for what the user can mend."""
    home = options.output / ("drawn" if options.images is None else "own")
    found = None if options.images is None else survey(options.images, home, MOST)
    with locked(home, "another demo is writing into it; wait, or give another --output"):
        run_in(home, found, options)


def run_in(home: Path, found: Survey | None, options: argparse.Namespace) -> None:
    """The demo on drawn pictures, or on those found in the user's folder, all of it below `home`."""
    began = time.monotonic()

    # ---- Pictures into shards
    sets = own_sets(home, found, options.seed) if found else drawn_sets(home, options)
    if len(sets.train) < FEWEST:
        where = f"--images {found.root}" if found else f"--pictures {options.pictures}"
        raise UserError(f"{where}: {len(sets.train)} pictures to train on are too few; {FEWEST} are the least")

    # ---- The score of the weights that training begins with
    recipe = fitted(recipe_of(home, options), len(sets.train), options.steps)
    before = score(sets, recipe, None)

    # ---- Training
    run = cleared(home / "run")
    say(f"training a {recipe.backbone} without labels for {steps_of(recipe, len(sets.train))} steps …")
    with join(recipe.device) as ranks, claimed(recipe, ranks):
        checkpoint = checkpoints(train(recipe, ranks))[-1]

    # ---- The score of the trained weights
    after = score(sets, recipe, checkpoint)
    for line in report(sets, home, run, checkpoint, before, after, time.monotonic() - began):
        say(line)
    if found:
        say(PATIENCE)
    say(NEXT)


# ---- pictures into shards -------------------------------------------------------------------------------------------


def drawn_sets(home: Path, options: argparse.Namespace) -> Sets:
    """Draw the pictures, unless they are there already, and pack them."""
    count = options.pictures or DRAWN
    val = min(VAL_OF_DRAWN, count)
    with bar("drawing", len(PATTERNS) * (count + val)) as tick:
        pictures = draw_dataset(home / "pictures", count, val, options.seed, tick)
    say(f"{pictures}: {len(PATTERNS)} classes of drawn patterns, {count} + {val} pictures each")
    shards = cleared(home / "shards")
    return Sets(*(packed(pictures / split, shards / split, "folders", options.seed) for split in ("train", "val")))


def own_sets(home: Path, found: Survey, seed: int) -> Sets:
    """Copy the user's pictures, made small, into the demo's own folder, and pack those."""
    say(found.text())
    copies, shards = cleared(home / "pictures"), cleared(home / "shards")
    with bar("making small copies", len(found.chosen)) as tick:
        left_out = stage(found, copies, tick)
    for name, reason in left_out[:NAMED]:
        say(f"left out: {name}: {reason}")
    if len(left_out) > NAMED:
        say(f"left out: {len(left_out) - NAMED} more")
    if not any((copies / "train").rglob("*.jpg")):
        raise UserError(f"--images {found.root}: none of its pictures could be decoded; give another folder")
    kind = "folders" if found.labelled else "flat"
    train_set = packed(copies / "train", shards / "train", kind, seed)
    if len(train_set.classes) < 2 or not any((copies / "val").rglob("*.jpg")):
        return Sets(train_set, None)
    return Sets(train_set, packed(copies / "val", shards / "val", kind, seed))


def packed(source: Path, out: Path, kind: str, seed: int) -> ShardIndex:
    """Pack a folder as `make-shards pack` does."""
    folder, workers = LocalFolder(str(out)), os.cpu_count() or 1
    with folder.held("another demo is packing into it; wait for it"):
        listing = scan(source, kind, folder.work)
        with bar("packing", len(listing)) as tick:
            pack(listing, folder, Options(seed=seed, name=out.name), workers, lambda done, _: tick(done))
    return ShardIndex(out)


# ---- the recipe -----------------------------------------------------------------------------------------------------


def recipe_of(home: Path, options: argparse.Namespace) -> Recipe:
    """configs/cpu_demo.yaml on this demo's data."""
    if not RECIPE.is_file():
        raise UserError(f"{RECIPE}: no such file; run the demo from a checkout (git clone …, make demo)")
    flags = ["--output", str(home / "run"), "--data.train", str(home / "shards" / "train"), "--seed", str(options.seed)]
    return read_recipe(["--config", str(RECIPE), *flags])


def fitted(recipe: Recipe, pictures: int, steps: int | None) -> Recipe:
    """The recipe for another number of pictures: as many steps, of them as many to warm up, and whole batches."""
    drawn = Schedules(recipe, DRAWN * len(PATTERNS) // recipe.batch_size)

    def as_many(duration: Duration) -> Duration:
        return f"{drawn.steps(duration)} steps"

    optim = dataclasses.replace(
        recipe.optim,
        warmup_epochs=as_many(recipe.optim.warmup_epochs),
        freeze_last_layer_epochs=as_many(recipe.optim.freeze_last_layer_epochs),
    )
    loss = dataclasses.replace(recipe.loss, warmup_teacher_temp_epochs=as_many(recipe.loss.warmup_teacher_temp_epochs))
    epochs = as_many(recipe.epochs)
    saves = dataclasses.replace(recipe.checkpoint, every=epochs)
    batch = min(recipe.batch_size, pictures)
    return dataclasses.replace(
        recipe, batch_size=batch, epochs=epochs, max_steps=steps or 0, optim=optim, loss=loss, checkpoint=saves
    )


def steps_of(recipe: Recipe, pictures: int) -> int:
    """How many steps the recipe runs for."""
    total = Schedules(recipe, pictures // recipe.batch_size).total_steps
    return min(recipe.max_steps or total, total)


# ---- the score ------------------------------------------------------------------------------------------------------


def score(sets: Sets, recipe: Recipe, checkpoint: Path | None) -> float | None:
    """k-NN accuracy in percent of the teacher in a checkpoint, or of the weights that the recipe's run begins with."""
    if sets.val is None:
        return None
    if checkpoint is None:
        with join(recipe.device) as ranks:
            backbone = build_step(recipe, ranks).teacher.backbone
    else:
        backbone = load_backbone(checkpoint, "teacher")[0]
    crop = recipe.crops.global_size
    scores = knn_score(backbone, sets.train, sets.val, round(crop * 256 / 224), crop, torch.device("cpu"))
    found = scores[K].top1
    say(f"k-NN (k = {K}) {'before' if checkpoint is None else 'after'} training: {found:.1f} %")
    return found


def report(
    sets: Sets, home: Path, run: Path, checkpoint: Path, before: float | None, after: float | None, seconds: float
) -> Iterator[str]:
    """What came out, where it lies and what to do next."""
    yield f"\nThe demo took {seconds / 60:.1f} minutes."
    if sets.val is None or before is None or after is None:
        yield "No k-NN score: it takes labels: two or more class folders (cat/…, dog/…) of five pictures or more."
    else:
        classes = len(sets.train.classes)
        yield f"k-NN accuracy (k = {K}, {len(sets.val)} pictures in {classes} classes, chance {100 / classes:.1f} %):"
        yield f"  before training  {before:5.1f} %"
        yield f"  after training   {after:5.1f} %"
    yield f"\nPictures     {home / 'pictures'}"
    yield f"Shards       {home / 'shards'}"
    yield f"Checkpoint   {checkpoint}"
    yield f"Metrics      {run / 'metrics.jsonl'}   (curves: {sys.executable} -m tensorboard.main --logdir {run})"


PATIENCE = """
Drawn patterns are learned in minutes, photographs are not: on these, a run this short need not raise the score. A real
run takes hours on a GPU, and starts from the pictures themselves rather than the demo's small copies:
  make-shards pack YOUR_FOLDER data/mine
  dino-fast train --config configs/imagenette_resnet18.yaml --data.train data/mine --output runs/mine"""

NEXT = """
Next, on ImageNet (folders train/ and val/ of class folders), with 8 GPUs; activate the environment first:
  source .venv/bin/activate
  make-shards pack /path/to/imagenet/train data/imagenet/train
  make-shards pack /path/to/imagenet/val data/imagenet/val
  torchrun --nproc_per_node 8 -m dino_fast.train --config configs/resnet50_100ep.yaml --data.train data/imagenet/train
  dino-fast knn --checkpoint runs/resnet50_100ep --train data/imagenet/train --val data/imagenet/val"""


# ---- small things ---------------------------------------------------------------------------------------------------


@contextmanager
def bar(doing: str, total: int) -> Iterator[Callable[..., None]]:
    """A progress bar on a terminal, nothing elsewhere. Gives a function: one more, or so many in all."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task(doing, total=total)

        def tick(done: int | None = None) -> None:
            shown.advance(task) if done is None else shown.update(task, completed=done)

        yield tick


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,6}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)


def _seed(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no seed; give a whole number of 0 or more")
    return int(text)


if __name__ == "__main__":
    # The loader's threads may stand in DALI: after a failure, leave without waiting for them.
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status) if status else sys.exit(0)
