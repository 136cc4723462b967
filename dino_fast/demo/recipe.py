"""The recipe of the demo: configs/cpu_demo.yaml, fitted to the number of images."""

import dataclasses
from pathlib import Path

from dino_fast.config import Recipe, read_recipe
from dino_fast.demo.draw import PATTERNS
from dino_fast.demo.image_sets import IMAGES_PER_CLASS
from dino_fast.durations import Duration
from dino_fast.run.schedules import Schedules
from shards.errors import UserError

RECIPE_FILE = Path(__file__).resolve().parents[2] / "configs" / "cpu_demo.yaml"


def read_demo_recipe(home: Path, seed: int) -> Recipe:
    """Return the recipe for the shards below `home`, with its output there, too."""
    if not RECIPE_FILE.is_file():
        raise UserError(f"{RECIPE_FILE} does not exist. Run the demo from a checkout (git clone …, make demo).")
    flags = ["--output", str(home / "run"), "--data.train", str(home / "shards" / "train"), "--seed", str(seed)]
    return read_recipe(["--config", str(RECIPE_FILE), *flags])


def fit_recipe(recipe: Recipe, images: int, max_steps: int | None) -> Recipe:
    """Return the recipe for another number of images.

    It takes as many steps as on the drawn images, as many of them for warm-up, and whole batches.
    """
    drawn = Schedules(recipe, IMAGES_PER_CLASS * len(PATTERNS) // recipe.batch_size)

    def in_steps(duration: Duration) -> Duration:
        return f"{drawn.steps(duration)} steps"

    optim = dataclasses.replace(
        recipe.optim,
        warmup_epochs=in_steps(recipe.optim.warmup_epochs),
        freeze_last_layer_epochs=in_steps(recipe.optim.freeze_last_layer_epochs),
    )
    temperature_steps = in_steps(recipe.loss.warmup_teacher_temp_epochs)
    loss = dataclasses.replace(recipe.loss, warmup_teacher_temp_epochs=temperature_steps)
    epochs = in_steps(recipe.epochs)
    checkpoint = dataclasses.replace(recipe.checkpoint, every=epochs)
    batch = min(recipe.batch_size, images)
    return dataclasses.replace(
        recipe, batch_size=batch, epochs=epochs, max_steps=max_steps or 0, optim=optim, loss=loss, checkpoint=checkpoint
    )


def count_steps(recipe: Recipe, images: int) -> int:
    """Return how many steps the recipe trains for."""
    total = Schedules(recipe, images // recipe.batch_size).total_steps
    return min(recipe.max_steps or total, total)
