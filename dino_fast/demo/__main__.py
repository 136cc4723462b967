"""`python -m dino_fast.demo`, which `make demo` runs: images, shards, training and its score, on the CPU.

Everything is written below one folder, `demo/` unless --output names another. The steps are those of a real run: the
same packing, the same training, the same k-NN.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from dino_fast.checkpoint import list_checkpoints
from dino_fast.config import Recipe
from dino_fast.demo.image_sets import IMAGES_PER_CLASS, ImageSets, make_drawn_sets, make_user_sets, say
from dino_fast.demo.recipe import count_steps, fit_recipe, read_demo_recipe
from dino_fast.demo.user_images import Selection, make_empty_folder, select_images
from dino_fast.distributed import join_ranks
from dino_fast.evaluate.arguments import FlagParser
from dino_fast.evaluate.features import Extraction
from dino_fast.evaluate.knn import evaluate_knn
from dino_fast.evaluate.trained_backbone import load_backbone
from dino_fast.run.build import build_train_step
from dino_fast.run.command import accept_any_encoding, lock_output
from dino_fast.train import train
from pipelines.labeled import CenterCrop, choose_resize
from shards.errors import UserError
from shards.storage.lock import lock_folder
from shards.text import escape_unprintable

MAX_USER_IMAGES = 1600  # so that copying and scoring them stay short
MIN_TRAIN_IMAGES = 16  # batch norm and the center need a few images in a batch
K = 20  # nearest neighbors


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo. Return its exit status: 0, 1 for a failure, 2 for a wrong call, 130 for an interrupt."""
    options = build_parser().parse_args(arguments)
    try:
        run_demo(options)
        return 0
    except UserError as error:
        print(f"demo: {escape_unprintable(str(error))}", file=sys.stderr)
        return 1
    except OSError as error:  # such as a full disk, in a place where nothing better is known
        print(f"demo: {error.filename or 'I/O'}: {error.strerror}. Fix that and try again.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: stopped. The same command starts it again.", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the demo's flags."""
    parser = FlagParser(
        prog="python -m dino_fast.demo",
        description="Draw a labeled image set, pack it, train on it on the CPU, and print the k-NN score before and "
        "after training. It takes a few minutes on two cores.",
    )
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="train on your own images instead; the folder is not changed"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo"), metavar="FOLDER", help="where all files go (default: demo)"
    )
    parser.add_argument(
        "--images-per-class", type=_parse_count, metavar="N",
        help=f"training images to draw of each class (default: {IMAGES_PER_CLASS})",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=_parse_count, metavar="N", help="stop after this many training steps (default: take all steps)"
    )
    parser.add_argument(
        "--seed", type=_parse_seed, default=0, metavar="N",
        help="seed of the drawing, the packing and the training (default: 0)",
    )  # fmt: skip
    return parser


def run_demo(options: argparse.Namespace) -> None:
    """Run the demo from its beginning to its end. Raises UserError for what the user can fix."""
    home = options.output / ("drawn" if options.images is None else "user")
    selection = None if options.images is None else select_images(options.images, home, MAX_USER_IMAGES)
    with lock_folder(home, "another demo is writing into it. Wait, or choose another --output."):
        run_in_folder(home, selection, options)


def run_in_folder(home: Path, selection: Selection | None, options: argparse.Namespace) -> None:
    """Run the demo on drawn images, or on those selected from the user's folder. All files go below `home`."""
    start = time.monotonic()

    # ---- Images into shards
    if selection:
        sets = make_user_sets(home, selection, options.seed)
    else:
        sets = make_drawn_sets(home, options.images_per_class, options.seed)
    if len(sets.train) < MIN_TRAIN_IMAGES:
        flag = f"--images {selection.root}" if selection else f"--images-per-class {options.images_per_class}"
        raise UserError(f"{flag} gives {len(sets.train)} images to train on, and {MIN_TRAIN_IMAGES} are needed.")

    # ---- The score of the weights that training begins with
    recipe = fit_recipe(read_demo_recipe(home, options.seed), len(sets.train), options.steps)
    before = score_teacher(sets, recipe, None, home / "features")

    # ---- Training
    run = make_empty_folder(home / "run")
    say(f"training a {recipe.backbone} without labels for {count_steps(recipe, len(sets.train))} steps …")
    with join_ranks(recipe.device) as ranks, lock_output(recipe, ranks):
        checkpoint = list_checkpoints(train(recipe, ranks))[-1]

    # ---- The score of the trained weights
    after = score_teacher(sets, recipe, checkpoint, home / "features")
    for line in describe_result(sets, home, run, checkpoint, before, after, time.monotonic() - start):
        say(line)
    if selection:
        say(PATIENCE)
    say(NEXT)


# ---- The score ------------------------------------------------------------------------------------------------------


def score_teacher(sets: ImageSets, recipe: Recipe, checkpoint: Path | None, cache: Path) -> float | None:
    """Return the k-NN accuracy in percent of the teacher in a checkpoint, or of the recipe's initial weights.

    Return None where there are no labels. The features are kept in the folder `cache`.
    """
    if sets.val is None:
        return None
    crop = recipe.crops.global_size
    center = CenterCrop(choose_resize(crop), crop, recipe.data.normalization)
    with join_ranks("cpu") as ranks:
        if checkpoint is None:
            backbone = build_train_step(recipe, ranks).teacher.backbone
        else:
            backbone = load_backbone(checkpoint, "teacher").network
        how = Extraction(recipe.backbone, center, ranks, cache)
        scores = evaluate_knn(backbone, sets.train, sets.val, how)
    top1 = scores[K].top1
    say(f"k-NN (k = {K}) {'before' if checkpoint is None else 'after'} training: {top1:.1f} %")
    return top1


def describe_result(
    sets: ImageSets, home: Path, run: Path, checkpoint: Path, before: float | None, after: float | None, seconds: float
) -> Iterator[str]:
    """Yield lines about the scores, and about where the files are."""
    yield f"\nThe demo took {seconds / 60:.1f} minutes."
    if sets.val is None or before is None or after is None:
        yield (
            "There is no k-NN score, because it needs labels: two or more class folders (cat/…, dog/…) of five images "
            "or more."
        )
    else:
        classes = len(sets.train.classes)
        yield f"k-NN accuracy (k = {K}, {len(sets.val)} images in {classes} classes, chance {100 / classes:.1f} %):"
        yield f"  before training  {before:5.1f} %"
        yield f"  after training   {after:5.1f} %"
    yield f"\nImages       {home / 'images'}"
    yield f"Shards       {home / 'shards'}"
    yield f"Checkpoint   {checkpoint}"
    yield f"Metrics      {run / 'metrics.jsonl'}   (to plot them: {sys.executable} -m tensorboard.main --logdir {run})"


PATIENCE = """
Drawn patterns are learned in minutes, but photographs are not: on them, a run as short as this may not raise the score.
A real run takes hours on a GPU. It uses your images themselves instead of the demo's small copies:
  make-shards pack YOUR_FOLDER data/mine --format flat
  dino-fast train --config configs/own_photos.yaml --data.train data/mine --output runs/mine"""

NEXT = """
Next: train on ImageNet (folders train/ and val/ of class folders) with 8 GPUs. Activate the environment first:
  source .venv/bin/activate
  make-shards pack /path/to/imagenet/train data/imagenet/train
  make-shards pack /path/to/imagenet/val data/imagenet/val
  torchrun --nproc_per_node 8 -m dino_fast.train --config configs/resnet50_100ep.yaml --data.train data/imagenet/train
  dino-fast knn --checkpoint runs/resnet50_100ep --train data/imagenet/train --val data/imagenet/val"""


# ---- Flags ----------------------------------------------------------------------------------------------------------


def _parse_count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,6}", text):
        raise argparse.ArgumentTypeError(f"expected a whole number, 1 or more, not {text!r}")
    return int(text)


def _parse_seed(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text):
        raise argparse.ArgumentTypeError(f"expected a whole number, 0 or more, not {text!r}")
    return int(text)


if __name__ == "__main__":
    accept_any_encoding()
    # The loader's threads may be inside DALI. After a failure, do not wait for them.
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status) if status else sys.exit(0)
