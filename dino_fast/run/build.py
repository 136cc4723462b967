"""Builds the parts of a run from its recipe: the loader, the step, and the form in which the step runs."""

import os
from importlib.util import find_spec

import torch

from dino_fast.config import Recipe
from dino_fast.distributed import Ranks, wrap_in_ddp
from dino_fast.model.backbones import checkpoint_activations
from dino_fast.model.student_teacher import build_student_teacher
from dino_fast.model.trial import count_positions
from dino_fast.step.compiled import compile_backbones, find_compile_problem
from dino_fast.step.optimizers import build_optimizer
from dino_fast.step.precision import DTYPES
from dino_fast.step.train_step import TrainStep
from pipelines.loader import Loader, open_index
from shards.errors import UserError
from shards.index import ShardIndex


def open_data(recipe: Recipe, ranks: Ranks) -> tuple[ShardIndex, Loader]:
    """Open the shards, and build the loader of this rank's share of the batches."""
    index = open_index(recipe.data)
    return index, Loader(
        index, recipe.data, recipe.crops, recipe.augment, batch=recipe.batch_size, seed=recipe.seed,
        device=ranks.device, dtype=DTYPES[recipe.precision], rank=ranks.rank, world=ranks.world,
    )  # fmt: skip


def build_train_step(
    recipe: Recipe,
    ranks: Ranks,
    *,
    kernels: bool | None = None,
    fused_norms: bool | None = None,
    teacher_aside: bool = False,
) -> TrainStep:
    """Build student, teacher and optimizer on this rank's device. The first weights depend on the seed alone.

    The options are those of `TrainStep`. kernels None: on a GPU where Triton is installed. fused_norms None: where
    steps are recorded, unless the recipe says that the backbones are compiled. Raises UserError for a batch that cannot
    be split evenly, and for checkpointing of activations where the backbone has no blocks.
    """
    check_batch_size(recipe, ranks)
    torch.manual_seed(recipe.seed)
    student, teacher = build_student_teacher(recipe.backbone, recipe.head)
    if recipe.activation_checkpointing:
        checkpoint_activations(student.backbone, recipe.backbone)
    student.to(ranks.device)
    teacher.to(ranks.device)
    optimizer = build_optimizer(recipe.optim, student)
    if kernels is None:
        kernels = ranks.device.type == "cuda" and find_spec("triton") is not None
    if fused_norms is None:
        # Launched one by one they keep the host busy for longer than what a compiler makes of torch's.
        fused_norms = _can_record(kernels, ranks) and recipe.graph != "never" and recipe.compile != "always"
    return TrainStep(
        wrap_in_ddp(student, ranks), teacher, optimizer, recipe.loss, recipe.optim.clip_grad, recipe.precision,
        accumulate=recipe.accumulate, kernels=kernels, fused_norms=fused_norms, teacher_aside=teacher_aside,
    )  # fmt: skip


def check_batch_size(recipe: Recipe, ranks: Ranks) -> None:
    """Raise UserError for a batch that cannot be split evenly among ranks and parts, or is too small for batch norm.

    Raise it also for crops of a size that the backbone cannot take.
    """
    if recipe.batch_size % (ranks.world * recipe.accumulate):
        raise UserError(
            f"--batch_size {recipe.batch_size} cannot be split evenly among {ranks.world} ranks with --accumulate "
            f"{recipe.accumulate} parts each. Choose a multiple of {ranks.world * recipe.accumulate}."
        )
    for flag, (size, _) in zip(("--crops.global_size", "--crops.local_size"), recipe.crops.resolutions, strict=False):
        positions = count_positions(recipe.backbone, size, flag)
        # Views of one size are one batch to batch norm.
        if positions and recipe.batch_size // recipe.accumulate * recipe.crops.sizes.count(size) * positions == 1:
            raise UserError(
                f"--batch_size {recipe.batch_size} with --accumulate {recipe.accumulate} gives batch norm a single "
                f"value: the last feature map of one view of {size} pixels is one pixel. Pass more images, "
                "--crops.locals 2, or larger crops."
            )


def compile_if_useful(recipe: Recipe, ranks: Ranks, step: TrainStep) -> list[str]:
    """Have the backbones compiled if the recipe says so and it is possible. Returns lines to print."""
    needless = step.fused_norms or ranks.device.type == "cpu"
    if recipe.compile == "never" or (recipe.compile == "auto" and needless):
        return []
    if problem := find_compile_problem(ranks.device):
        return [f"The backbones are not compiled, which costs speed: {problem}"]
    compile_backbones(step)
    return ["The backbones are compiled at the first step, which takes minutes. (--compile never: without.)"]


def should_record(recipe: Recipe, ranks: Ranks, step: TrainStep) -> bool:
    """Return whether steps are recorded as a CUDA graph.

    Raises UserError where the recipe asks for it and it is not possible.
    """
    possible = _can_record(step.kernels, ranks)
    if recipe.graph == "always" and not possible:
        raise UserError("--graph always takes one GPU, no other ranks, and Triton. Leave it out.")
    return possible and recipe.graph != "never"


def _can_record(kernels: bool, ranks: Ranks) -> bool:
    return kernels and ranks.device.type == "cuda" and ranks.world == 1


def warn_of_slow_precision(recipe: Recipe, ranks: Ranks) -> list[str]:
    """Return lines to print about the recipe's precision on this device."""
    if recipe.precision == "fp16" and ranks.device.type == "cpu":
        return ["fp16 is emulated on CPUs, many times slower than fp32. Pass --precision fp32."]
    return []


def warn_of_idle_gpus(ranks: Ranks) -> list[str]:
    """Return lines to print where a run leaves GPUs of its machine unused."""
    count = torch.cuda.device_count() if ranks.device.type == "cuda" else 0
    # Ranks that were not started by torchrun may have one GPU of a machine each.
    used = int(os.environ.get("LOCAL_WORLD_SIZE", "1" if ranks.world == 1 else count))
    if used >= count:
        return []
    return [
        f"This run uses {used} of the {count} GPUs of this machine. "
        f"To use all: torchrun --nproc_per_node {count} -m dino_fast.train ..."
    ]
