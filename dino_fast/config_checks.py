"""Contradictions between the settings of a recipe: each is a line that says what is wrong and how to fix it."""

import math
from collections.abc import Iterator, Mapping

from dino_fast.durations import Duration, parse
from dino_fast.model.backbones import check_name
from dino_fast.model.head import HeadRecipe
from dino_fast.step.loss import LossRecipe
from dino_fast.step.optimizers import OptimRecipe
from pipelines.crops import CropRecipe
from pipelines.loader import DataRecipe
from pipelines.photometric import PhotometricRecipe
from shards.errors import UserError


def check_backbone(name: str) -> Iterator[str]:
    try:
        check_name(name)
    except UserError as error:
        yield str(error)


def check_crops(crops: CropRecipe) -> Iterator[str]:
    for name, (low, high) in {"global_scale": crops.global_scale, "local_scale": crops.local_scale}.items():
        if not 0 < low <= high <= 1:
            yield f"crops.{name} = [{low}, {high}]: expected two shares of the area, 0 < least <= most <= 1"
    if crops.locals and crops.local_size > crops.global_size:
        yield (
            f"crops.local_size = {crops.local_size} is larger than crops.global_size = {crops.global_size}: local "
            "views are the small ones. Swap the two, or lower local_size."
        )


def check_augmentation(augment: PhotometricRecipe) -> Iterator[str]:
    low, high = augment.blur_sigma
    if not 0 < low <= high <= 2.3:
        yield f"augment.blur_sigma = [{low}, {high}]: expected pixels, 0 < least <= most <= 2.3 (15 taps)"


def check_data(data: DataRecipe) -> Iterator[str]:
    if data.decode == "torch" and data.decode_device in ("gpu", "split"):
        yield f"data.decode_device = {data.decode_device} needs data.decode = dali or auto: torch uses the CPU alone"
    if -1 < data.hw_decoder_load < 0:
        yield f"data.hw_decoder_load = {data.hw_decoder_load}: expected a share from 0 to 1, or -1 for automatic"
    if not all(math.isfinite(mean) for mean in data.mean):
        yield f"data.mean = {list(data.mean)}: expected three finite numbers"
    if not all(0 < std < math.inf for std in data.std):
        yield f"data.std = {list(data.std)}: expected three finite numbers above 0"


def check_lengths(epochs: Duration, phases: Mapping[str, Duration]) -> Iterator[str]:
    """phases: parts of the run by the names of their settings."""
    whole = parse(epochs)
    if not whole.number:
        yield f"epochs = {epochs}: a run without a length. Give it one."
    for name, length in phases.items():
        part = parse(length)  # in another unit only the data tell: see Schedules
        if part.unit == whole.unit and part.number > whole.number:
            yield f"{name} = {length} is more than epochs = {epochs}. Lower it."


def check_head(head: HeadRecipe) -> Iterator[str]:
    if head.batch_norm and head.layers == 1:
        yield "head.batch_norm = True does nothing with head.layers = 1: it follows hidden layers. Give 2 or more."


def check_temperatures(loss: LossRecipe) -> Iterator[str]:
    for name, value in {"teacher_temp": loss.teacher_temp, "warmup_teacher_temp": loss.warmup_teacher_temp}.items():
        if value >= loss.student_temp:
            yield (
                f"loss.{name} = {value} is not below loss.student_temp = {loss.student_temp}: the teacher must be "
                "sharper than the student. The published value is 0.04."
            )
    # To lower the temperature, the remedy for a collapse, must take one flag only: so only a rise is checked.
    if loss.warmup_teacher_temp < loss.teacher_temp and not parse(loss.warmup_teacher_temp_epochs).number:
        yield (
            f"loss.warmup_teacher_temp = {loss.warmup_teacher_temp} is never used. Give "
            f"loss.warmup_teacher_temp_epochs, or set it to loss.teacher_temp = {loss.teacher_temp}."
        )


def check_rates(optim: OptimRecipe, batch_size: int) -> Iterator[str]:
    peak = optim.lr * batch_size / 256
    if not optim.lr and optim.min_lr:
        yield (
            f"optim.lr = 0 is below optim.min_lr = {optim.min_lr}, so the learning rate would rise to that. "
            "Give optim.min_lr = 0, too."
        )
    elif optim.min_lr > peak:
        yield (
            f"optim.min_lr = {optim.min_lr} is above the peak learning rate of {peak:.4g} (optim.lr * batch_size / "
            "256). Lower it."
        )
    if optim.ema_momentum == 1:
        yield "optim.ema_momentum = 1.0: the teacher would stay as it was at first. The published value is 0.996."
