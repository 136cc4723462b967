"""How a network is fine-tuned: one recipe for networks with batch norm, one for vision transformers.

The recipe for ResNets is short: SGD, random crops and flips. That of vision transformers is DeiT's (Touvron et al.
2021), with which the paper fine-tunes, without repeated augmentation and random erasing, and with two changes for
shorter runs: a layer decay, and a higher learning rate that goes with it (Bao et al. 2022, "BEiT").
"""

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.transforms.v2 import InterpolationMode

from dino_fast.evaluate.token_features import WIDTH_OF_BASE

RecipeName = Literal["resnet", "vit"]
LEAST_STEPS = 5000  # that a run has by default, however small the set is
MOST_EPOCHS = 1000  # that a run has by default; the paper's own runs on CIFAR have as many


@dataclass(frozen=True)
class FinetuneRecipe:
    """The settings of a training of the whole network."""

    optimizer: Literal["sgd", "adamw"]
    """sgd has momentum 0.9"""
    lrs: tuple[float, ...]
    """peak learning rates for a batch of 256, each of which is tried"""
    epochs: int
    """least number of epochs of a run by default"""
    warmup_epochs: int
    """epochs in which the learning rate rises from 0 to its peak; at most a quarter of a run"""
    weight_decay: float
    """not of biases, of 1-D parameters, of position embeddings and of [CLS] tokens"""
    layer_decay: float
    """the learning rate of a layer is this times that of the layer after it"""
    interpolation: InterpolationMode
    """how random crops are resized"""
    label_smoothing: float = 0.1
    """share of a label that is spread evenly over all classes"""
    mixup: float = 0.0
    """parameter α of mixup's Beta(α, α); 0: without it"""
    cutmix: float = 0.0
    """the same of CutMix. With both, each has half of the steps"""
    drop_path: float = 0.0
    """drop path rate of the last block; only for the published vision transformers"""
    rand_augment: float = 0.0
    """mean magnitude of RandAugment, from 0 to 10; 0: without it"""


RESNET = FinetuneRecipe(
    optimizer="sgd", lrs=(0.01, 0.03, 0.1), epochs=30, warmup_epochs=1, weight_decay=1e-4, layer_decay=1.0,
    interpolation=InterpolationMode.BILINEAR,
)  # fmt: skip
VIT = FinetuneRecipe(
    optimizer="adamw", lrs=(1e-4, 2.5e-4, 5e-4), epochs=100, warmup_epochs=5, weight_decay=0.05, layer_decay=0.75,
    interpolation=InterpolationMode.BICUBIC, mixup=0.8, cutmix=1.0, drop_path=0.1, rand_augment=9.0,
)  # fmt: skip
RECIPES: dict[RecipeName, FinetuneRecipe] = {"resnet": RESNET, "vit": VIT}
LAYER_DECAY_OF_BASE = 0.65  # BEiT's and MAE's of ViT-B: a larger network overfits its early layers sooner


def choose_recipe(backbone: nn.Module) -> RecipeName:
    """Return which recipe fits a backbone: that of ResNets where it has batch norms, else that of ViTs."""
    return "resnet" if any(isinstance(module, _BatchNorm) for module in backbone.modules()) else "vit"


def choose_layer_decay(recipe: FinetuneRecipe, width: int) -> float:
    """Return the layer decay for a backbone with features of this width: that of ViT-B is stronger."""
    return LAYER_DECAY_OF_BASE if recipe.layer_decay < 1 and width >= WIDTH_OF_BASE else recipe.layer_decay


def choose_epochs(recipe: FinetuneRecipe, steps_per_epoch: int) -> int:
    """Return how many epochs a run has by default: more on small sets, so that there are enough steps."""
    return max(recipe.epochs, min(MOST_EPOCHS, -(-LEAST_STEPS // steps_per_epoch)))


def scale_rate(step: int, steps: int, warmup: int) -> float:
    """Return the share of the peak learning rate at a step, from 0.

    It rises evenly through `warmup` steps, and then falls to 0 along a cosine.
    """
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
