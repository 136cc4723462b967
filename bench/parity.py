"""What lower precision costs: gradients of one step against float32's, and loss curves against those of other seeds.

    python -m bench.parity SHARDS [--steps 300] [--batch 32] [--backbone resnet18] [--json bench/results/X.jsonl]

- gradient error: ‖g − g₃₂‖ / ‖g₃₂‖ over all gradients of a first step, in percent; g₃₂ is float32's of the same
  networks and batch. "published fp16" is the step of `bench/baselines.py` under float16 autocast against itself in
  float32; ours is in bf16 and fp16, eager and compiled as it is on GPUs. Each of --draws networks and batches is one
  figure.
- loss: the mean over the last tenth of a run of --steps steps over SHARDS, in each precision from one seed, and in
  float32 from two more: what another seed changes is what a curve may differ by.

Crops are of 64 and 32 pixels and K is 4096, so that it runs on a CPU, too.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from bench.baselines import Published
from bench.step import choose_device, loader_views, plain_views, steady
from bench.timing import record, report
from dino_fast.config import Recipe
from dino_fast.distributed import Ranks
from dino_fast.model.head import HeadRecipe
from dino_fast.run.schedules import Schedules
from dino_fast.step.compiled import compile_backbones
from dino_fast.step.optimizers import OptimRecipe
from dino_fast.step.train_step import Precision, build_student_teacher
from dino_fast.step.update import LossScale
from dino_fast.train import DTYPES, build_step
from pipelines.crops import CropRecipe
from pipelines.loader import DataRecipe, Loader
from shards.index import ShardIndex

SCALE = 1024.0  # of float16's losses
LOWER: tuple[Precision, ...] = ("bf16", "fp16")
COMPILING: dict[str, Literal["never", "always"]] = {"": "never", ", compiled": "always"}


# Gradients


def our_gradients(recipe: Recipe, device: torch.device) -> Tensor:
    """Of the first step, in float32: [all parameters]. Compiled where the recipe says so."""
    step = build_step(replace(recipe, optim=OptimRecipe(clip_grad=0.0)), Ranks(0, 1, device), kernels=False)
    if recipe.compile == "always":
        compile_backbones(step)
    if step.loss_scale is not None:
        step.loss_scale = LossScale(device, SCALE)
    step(*loader_views(recipe, device), steady(recipe))
    return flat(step.bare_student)


def published_gradients(recipe: Recipe, device: torch.device) -> Tensor:
    """The same of the published step, under float16 autocast where the recipe says fp16."""
    half = recipe.precision == "fp16"
    torch.manual_seed(recipe.seed)
    step = Published(recipe, build_student_teacher(recipe.backbone, recipe.head), steady(recipe), device)
    crops = [crop for views in plain_views(recipe, device) for crop in views.split(recipe.batch_size)]
    with torch.autocast(device.type, torch.float16, enabled=half):
        loss = step.loss(step.student(crops), step.teacher(crops[:2]), len(crops))
    scale = SCALE if half else 1.0
    (loss * scale).backward()
    return flat(step.student) / scale


def flat(network: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in network.parameters() if p.grad is not None])


def error(gradients: Callable[[Recipe, torch.device], Tensor], recipe: Recipe, device: torch.device) -> float:
    """In percent, of what the eager step gives in float32."""
    exact = gradients(replace(recipe, precision="fp32", compile="never"), device)
    return 100 * float((gradients(recipe, device) - exact).norm() / exact.norm())


def gradient_errors(recipe: Recipe, device: torch.device, draws: int) -> dict[str, list[float]]:
    """By arm, a figure a draw."""
    arms: dict[str, list[float]] = {}
    for seed in range(draws):
        fp16 = replace(recipe, seed=seed, precision="fp16")
        arms.setdefault("published fp16", []).append(error(published_gradients, fp16, device))
        for precision in LOWER:
            for arm, compiling in COMPILING.items():
                mine = replace(fp16, precision=precision, compile=compiling)
                arms.setdefault(f"ours {precision}{arm}", []).append(error(our_gradients, mine, device))
    return arms


# Curves


def last_losses(recipe: Recipe, index: ShardIndex, device: torch.device, steps: int) -> list[float]:
    """The losses of the last tenth of a run, as train.py runs it."""
    loader = Loader(
        index, DataRecipe(), recipe.crops, recipe.augment, batch=recipe.batch_size, seed=recipe.seed, device=device,
        dtype=DTYPES[recipe.precision],
    )  # fmt: skip
    step = build_step(recipe, Ranks(0, 1, device))
    schedules = Schedules(replace(recipe, epochs=f"{steps} steps"), loader.order.steps_per_epoch)
    losses = [step(made.globals, made.locals, schedules.at(made.step)).loss for made in loader.batches(0, steps)]
    return torch.stack(losses[-max(1, steps // 10) :]).tolist()


def curves(recipe: Recipe, index: ShardIndex, device: torch.device, steps: int) -> dict[str, list[float]]:
    """By arm, the mean loss at the end."""
    precisions: tuple[Precision, ...] = ("fp32", *LOWER)
    arms: dict[str, list[float]] = {
        precision: last_losses(replace(recipe, precision=precision), index, device, steps) for precision in precisions
    }
    for seed in (1, 2):
        exact = replace(recipe, precision="fp32", seed=seed)
        arms[f"fp32, seed {seed}"] = last_losses(exact, index, device, steps)
    return {name: [sum(losses) / len(losses)] for name, losses in arms.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = choose_device()
    recipe = Recipe(
        batch_size=options.batch, backbone=options.backbone, crops=CropRecipe(64, local_size=32, locals=4),
        head=HeadRecipe(out_dim=4096), optim=OptimRecipe(warmup_epochs=1),
    )  # fmt: skip
    errors = gradient_errors(recipe, device, options.draws)
    rows = [record("parity", arm, "gradient error", "%", found) for arm, found in errors.items()]
    if options.steps:
        with ShardIndex(options.shards) as index:
            found = curves(recipe, index, device, options.steps)
        rows += [record("parity", arm, "loss", "nats", losses) for arm, losses in found.items()]
    print(f"{options.backbone}, batches of {options.batch}, {options.steps} steps on {device}")
    report(rows, options.json)


if __name__ == "__main__":
    main()
