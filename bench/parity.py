"""Measure what lower precision costs: the gradients of one step, and the loss at the end of a short run.

    python -m bench.parity SHARDS
    python -m bench.parity SHARDS --steps 0 --draws 1 --json bench/results/parity.jsonl

- gradient error: ‖g − g₃₂‖ / ‖g₃₂‖ over all gradients of a first step, in percent. g₃₂ are the gradients in float32 of
  the same networks and batch. "published fp16" is the step of bench/baselines.py under float16 autocast, compared with
  itself in float32. Ours is measured in bf16 and fp16, eager and compiled, as it runs on GPUs. Each of --draws networks
  and batches gives one figure.
- loss: the mean over the last tenth of a run of --steps steps over SHARDS, in each precision with the same seed. It is
  also measured in float32 with two more seeds: a curve may differ by as much as another seed changes it.

Crops have 64 and 32 pixels and K is 4096, so that it also runs on a CPU.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from bench.baselines import Published
from bench.records import make_record, report
from bench.step_arms import make_loader_views, make_plain_views
from bench.step_recipe import choose_device, make_steady_hyper
from dino_fast.config import Recipe
from dino_fast.distributed import Ranks
from dino_fast.model.head import HeadRecipe
from dino_fast.model.student_teacher import build_student_teacher
from dino_fast.run.build import build_train_step
from dino_fast.run.schedules import Schedules
from dino_fast.step.compiled import compile_backbones
from dino_fast.step.optimizers import OptimRecipe
from dino_fast.step.precision import DTYPES, Precision
from dino_fast.step.update import LossScale
from pipelines.crops import CropRecipe
from pipelines.loader import DataRecipe, Loader
from shards.index import ShardIndex

SCALE = 1024.0  # loss scale of float16
LOWER: tuple[Precision, ...] = ("bf16", "fp16")
COMPILE_MODES: dict[str, Literal["never", "always"]] = {"": "never", ", compiled": "always"}


# Gradients


def compute_our_gradients(recipe: Recipe, device: torch.device) -> Tensor:
    """Return all gradients of the first step in one float64 tensor. The step is compiled if the recipe says so."""
    step = build_train_step(replace(recipe, optim=OptimRecipe(clip_grad=0.0)), Ranks(0, 1, device), kernels=False)
    if recipe.compile == "always":
        compile_backbones(step)
    if step.loss_scale is not None:
        step.loss_scale = LossScale(device, SCALE)
    step(*make_loader_views(recipe, device), make_steady_hyper(recipe))
    return flatten_gradients(step.bare_student)


def compute_published_gradients(recipe: Recipe, device: torch.device) -> Tensor:
    """Return the same for the published step. It runs under float16 autocast if the recipe says fp16."""
    half = recipe.precision == "fp16"
    torch.manual_seed(recipe.seed)
    pair = build_student_teacher(recipe.backbone, recipe.head)
    step = Published(recipe, pair, make_steady_hyper(recipe), device)
    crops = [crop for views in make_plain_views(recipe, device) for crop in views.split(recipe.batch_size)]
    with torch.autocast(device.type, torch.float16, enabled=half):
        loss = step.loss(step.student(crops), step.teacher(crops[:2]), len(crops))
    scale = SCALE if half else 1.0
    (loss * scale).backward()
    return flatten_gradients(step.student) / scale


def flatten_gradients(network: nn.Module) -> Tensor:
    """Return all gradients of a network in one float64 tensor [numbers]."""
    return torch.cat([p.grad.flatten().double() for p in network.parameters() if p.grad is not None])


def compute_error(
    compute_gradients: Callable[[Recipe, torch.device], Tensor], recipe: Recipe, device: torch.device
) -> float:
    """Return the gradient error of a recipe in percent of the norm of what the eager step gives in float32."""
    exact = compute_gradients(replace(recipe, precision="fp32", compile="never"), device)
    return 100 * float((compute_gradients(recipe, device) - exact).norm() / exact.norm())


def measure_errors(recipe: Recipe, device: torch.device, draws: int) -> dict[str, list[float]]:
    """Return the gradient errors of each arm, one for each draw."""
    arms: dict[str, list[float]] = {}
    for seed in range(draws):
        fp16 = replace(recipe, seed=seed, precision="fp16")
        arms.setdefault("published fp16", []).append(compute_error(compute_published_gradients, fp16, device))
        for precision in LOWER:
            for ending, mode in COMPILE_MODES.items():
                ours = replace(fp16, precision=precision, compile=mode)
                arms.setdefault(f"ours {precision}{ending}", []).append(
                    compute_error(compute_our_gradients, ours, device)
                )
    return arms


# Curves


def train(recipe: Recipe, index: ShardIndex, device: torch.device, steps: int) -> list[float]:
    """Run `steps` steps as training runs them, and return the losses of the last tenth."""
    loader = Loader(
        index, DataRecipe(), recipe.crops, recipe.augment, batch=recipe.batch_size, seed=recipe.seed, device=device,
        dtype=DTYPES[recipe.precision],
    )  # fmt: skip
    step = build_train_step(recipe, Ranks(0, 1, device))
    schedules = Schedules(replace(recipe, epochs=f"{steps} steps"), loader.order.steps_per_epoch)
    losses = [step(batch.globals, batch.locals, schedules.at(batch.step)).loss for batch in loader.batches(0, steps)]
    return torch.stack(losses[-max(1, steps // 10) :]).tolist()


def measure_losses(recipe: Recipe, index: ShardIndex, device: torch.device, steps: int) -> dict[str, list[float]]:
    """Return the mean loss of each arm at the end of its run."""
    precisions: tuple[Precision, ...] = ("fp32", *LOWER)
    arms: dict[str, list[float]] = {
        precision: train(replace(recipe, precision=precision), index, device, steps) for precision in precisions
    }
    for seed in (1, 2):
        exact = replace(recipe, precision="fp32", seed=seed)
        arms[f"fp32, seed {seed}"] = train(exact, index, device, steps)
    return {name: [sum(losses) / len(losses)] for name, losses in arms.items()}


# The command


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="folder that make-shards wrote")
    parser.add_argument("--steps", type=int, default=300, help="steps of a run; 0 leaves out the losses (300)")
    parser.add_argument("--batch", type=int, default=32, help="images in a step (32)")
    parser.add_argument("--backbone", default="resnet18", metavar="NAME", help="default %(default)s")
    parser.add_argument("--draws", type=int, default=3, help="networks and batches for the gradients (3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the records to this file, as JSON lines")
    return parser.parse_args()


def main() -> None:
    """Measure the gradient errors and the losses, and report their records."""
    options = parse_arguments()
    device = choose_device()
    recipe = Recipe(
        batch_size=options.batch, backbone=options.backbone, crops=CropRecipe(64, local_size=32, locals=4),
        head=HeadRecipe(out_dim=4096), optim=OptimRecipe(warmup_epochs=1),
    )  # fmt: skip
    errors = measure_errors(recipe, device, options.draws)
    rows = [make_record("parity", arm, "gradient error", "%", figures) for arm, figures in errors.items()]
    if options.steps:
        with ShardIndex(options.shards) as index:
            losses = measure_losses(recipe, index, device, options.steps)
        rows += [make_record("parity", arm, "loss", "nats", figures) for arm, figures in losses.items()]
    print(f"{options.backbone}, batches of {options.batch}, {options.steps} steps on {device}")
    report(rows, options.json)


if __name__ == "__main__":
    main()
