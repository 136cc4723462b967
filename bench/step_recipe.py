"""The recipe that the benchmarks of the step run: its arguments on the command line, its device, its description."""

import argparse

import torch

from bench.records import add_run_arguments
from dino_fast.config import Recipe
from dino_fast.model.backbones import BACKBONES, count_blocks
from dino_fast.model.flops import flops_an_image
from dino_fast.model.head import HeadRecipe
from dino_fast.run.schedules import scale_lr
from dino_fast.step.hyper import Hyper
from dino_fast.step.optimizers import OptimRecipe
from dino_fast.step.precision import DTYPES, Precision, set_up_math
from pipelines.crops import CropRecipe

# As published: configs/vit_small16_100ep.yaml.
VIT_OPTIM = OptimRecipe(name="adamw", lr=5e-4, weight_decay=0.04, weight_decay_end=0.4)


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that make the recipe, and those that say how often it is run."""
    gpu = torch.cuda.is_available()
    parser.add_argument("--batch", type=int, default=128 if gpu else 8, help="images in a step (default %(default)s)")
    parser.add_argument(
        "--precision", choices=DTYPES, default="fp16" if gpu else "bf16",
        help="of our arms and of the rooflines (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--backbone", choices=BACKBONES, default="resnet50", metavar="NAME", help="default %(default)s")
    parser.add_argument("--global_size", type=int, default=224, help="side of a global view in pixels (224)")
    parser.add_argument("--local_size", type=int, default=96, help="side of a local view in pixels (96)")
    parser.add_argument("--locals", type=int, default=6, help="number of local views, at least 1 (6)")
    parser.add_argument("--prototypes", type=int, default=65536, help="outputs of the head, K (65536)")
    parser.add_argument("--steps", type=int, default=20 if gpu else 1, help="steps in a round (default %(default)s)")
    add_run_arguments(parser, rounds=5)


def build_recipe(options: argparse.Namespace) -> Recipe:
    """Return the recipe of the arguments. ResNets have SGD, ViTs AdamW and drop path.

    Raises SystemExit without local views.
    """
    if options.locals < 1:
        raise SystemExit("--locals: expected at least 1")
    return Recipe(
        batch_size=options.batch,
        precision=options.precision,
        backbone=options.backbone,
        crops=CropRecipe(
            options.global_size, (0.14, 1.0), options.local_size, local_scale=(0.05, 0.14), locals=options.locals
        ),
        head=HeadRecipe(out_dim=options.prototypes),
        optim=VIT_OPTIM if count_blocks(options.backbone) else OptimRecipe(),
    )


def choose_device(precision: Precision = "fp16") -> torch.device:
    """Return the GPU where there is one, or else the CPU, set up for a precision as training sets it up."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    set_up_math(precision, device)
    return device


def describe_recipe(recipe: Recipe, device: torch.device) -> str:
    """Return the recipe in one line."""
    crops, where = recipe.crops, "the GPU" if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return (
        f"{recipe.backbone}, 2×{crops.global_size} + {crops.locals}×{crops.local_size}, K = {recipe.head.out_dim}, "
        f"batches of {recipe.batch_size}, {recipe.precision} on {where}: "
        f"{flops_an_image(recipe) / 1e9:.1f} GFLOP an image"
    )


def make_steady_hyper(recipe: Recipe) -> Hyper:
    """Return the hyper-parameters of a step after the warm-up and the first epoch."""
    optim = recipe.optim
    lr = scale_lr(optim, recipe.batch_size)
    return Hyper(lr, optim.weight_decay, optim.ema_momentum, recipe.loss.teacher_temp, freeze_last_layer=False)
