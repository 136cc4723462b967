"""The hyper-parameters of every step, as pure functions of the step number.

There is no table: any step costs the same, so a resumed run asks for its step and goes on. The values are those of the
published schedules (`cosine_scheduler` in facebookresearch/dino `utils.py`, and `DINOLoss` in `main_dino.py` for
the teacher temperature).
"""

import math

from dino_fast.config import PHASES, Recipe, look_up
from dino_fast.durations import Duration, to_steps
from dino_fast.step.hyper import Hyper
from dino_fast.step.loss import LossRecipe
from dino_fast.step.optimizers import OptimRecipe
from shards.errors import UserError


class Schedules:
    """The schedules of one run of a recipe over data of `steps_per_epoch` steps. All lengths become steps here.

    Raises UserError if the run has no step, or if one of its phases is longer than the run.
    """

    def __init__(self, recipe: Recipe, steps_per_epoch: int) -> None:
        self.recipe, self.steps_per_epoch = recipe, steps_per_epoch
        self.lr = scale_lr(recipe.optim, recipe.batch_size)
        """peak learning rate at the recipe's batch"""
        self.total_steps = self.steps(recipe.epochs)
        self.warmup_steps = self.steps(recipe.optim.warmup_epochs)
        self.frozen_steps = self.steps(recipe.optim.freeze_last_layer_epochs)
        self.temperature_epochs = -(-self.steps(recipe.loss.warmup_teacher_temp_epochs) // max(1, steps_per_epoch))
        if not self.total_steps or not steps_per_epoch:
            raise UserError(f"epochs = {recipe.epochs} of {steps_per_epoch} steps is a run without a step. Raise it.")
        for name in PHASES:
            if self.steps(look_up(recipe, name)) > self.total_steps:
                raise UserError(
                    f"{name} = {look_up(recipe, name)} is more than epochs = {recipe.epochs}, with {steps_per_epoch} "
                    "steps an epoch. Lower it."
                )

    def steps(self, duration: Duration) -> int:
        """Return the steps of a length of the recipe."""
        return to_steps(duration, self.steps_per_epoch, self.recipe.batch_size)

    def epoch(self, step: int) -> int:
        """Return the epoch, from 0, that `step`, from 0, belongs to."""
        return step // self.steps_per_epoch

    def checkpoint_is_due(self, done: int) -> bool:
        """Return whether a checkpoint is to be written after `done` steps."""
        return is_due(done, max(1, self.steps(self.recipe.checkpoint.every))) or is_due(
            done, self.steps(self.recipe.checkpoint.keep_every)
        )

    def score_is_due(self, done: int) -> bool:
        """Return whether a k-NN score is to be taken after `done` steps."""
        return is_due(done, max(1, self.steps(self.recipe.knn.every)))

    def at(self, step: int, rollbacks: int = 0) -> Hyper:
        """Return the hyper-parameters of `step`. Each of the `rollbacks` so far halves the learning rate.

        Raises ValueError for a step outside the run.
        """
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step {step} is outside this run of {self.total_steps} steps")
        optim, loss, total = self.recipe.optim, self.recipe.loss, self.total_steps
        return Hyper(
            lr=warmup_cosine(step, total, self.warmup_steps, self.lr, optim.min_lr) * 0.5**rollbacks,
            weight_decay=cosine(step, total, optim.weight_decay, optim.weight_decay_end),
            momentum=cosine(step, total, optim.ema_momentum, 1.0),
            teacher_temp=teacher_temperature(self.epoch(step), self.temperature_epochs, loss),
            freeze_last_layer=step < self.frozen_steps,
        )


def is_due(done: int, every: int) -> bool:
    """Return whether `done` steps are a multiple of `every` (0: never)."""
    return bool(every) and done % every == 0


def scale_lr(recipe: OptimRecipe, global_batch: int) -> float:
    """Return the peak learning rate at `global_batch` images a step over all ranks. The recipe's is for 256."""
    return recipe.lr * global_batch / 256


def linspace(step: int, steps: int, start: float, end: float) -> float:
    """Return `numpy.linspace(start, end, steps)[step]`: one of `steps` evenly spaced values, `end` included."""
    if steps > 1 and step == steps - 1:
        return end
    return start + step * (end - start) / max(steps - 1, 1)


def cosine(step: int, steps: int, start: float, end: float) -> float:
    """Return half a cosine from `start` at step 0 towards `end`, which step `steps` would reach."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / steps))


def warmup_cosine(step: int, steps: int, warmup: int, peak: float, end: float) -> float:
    """Rise from 0 to `peak` at the last of `warmup` steps, then follow half a cosine over the steps that are left."""
    if step < warmup:
        return linspace(step, warmup, 0.0, peak)
    return cosine(step - warmup, steps - warmup, peak, end)


def teacher_temperature(epoch: int, warmup_epochs: int, recipe: LossRecipe) -> float:
    """Return the teacher's temperature of `epoch`: linear over the warm-up epochs, then constant."""
    if epoch < warmup_epochs:
        return linspace(epoch, warmup_epochs, recipe.warmup_teacher_temp, recipe.teacher_temp)
    return recipe.teacher_temp
