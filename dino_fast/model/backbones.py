"""The backbones: torchvision's ResNets without their classifier, the published vision transformers, and timm's models.

torchvision's and the published ones are named here. Those of timm are in `timm_backbones.py`.
"""

import contextlib
import difflib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision import models

from dino_fast.model.timm_backbones import PREFIX, build_timm_backbone, check_timm_name
from dino_fast.model.vit import DEPTH, VisionTransformer
from shards.errors import UserError

_RESNETS = {
    "resnet18": models.resnet18,
    "resnet34": models.resnet34,
    "resnet50": models.resnet50,
    "resnet101": models.resnet101,
}
# Patch in pixels, width and heads, by the published names and sizes.
_VITS = {
    "vit_tiny_patch16": (16, 192, 3),
    "vit_small_patch16": (16, 384, 6),
    "vit_small_patch8": (8, 384, 6),
    "vit_base_patch16": (16, 768, 12),
    "vit_base_patch8": (8, 768, 12),
}
BACKBONES = (*_RESNETS, *_VITS)
BackboneName = (
    Literal[
        "resnet18", "resnet34", "resnet50", "resnet101", "vit_tiny_patch16", "vit_small_patch16", "vit_small_patch8",
        "vit_base_patch16", "vit_base_patch8",
    ]
    | str
)  # fmt: skip
"""one of BACKBONES, or the name of a model of timm behind `timm/`"""


class GlobalAveragePool(nn.Module):
    """Does what nn.AdaptiveAvgPool2d(1) does, with a gradient that keeps the channels-last layout."""

    def forward(self, x: Tensor) -> Tensor:
        mean: Tensor = _Mean.apply(x)
        return mean


class _Mean(torch.autograd.Function):
    """The mean over height and width. avg_pool2d keeps the layout, too, but its gradient is ten times as slow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.mean(dim=(2, 3), keepdim=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        pixels = ctx.shape[2] * ctx.shape[3]
        return (grad / pixels).expand(ctx.shape).contiguous(memory_format=torch.channels_last)


def build_backbone(name: str) -> tuple[nn.Module, int]:
    """Build a new backbone, which maps [N, 3, H, W] to [N, D]. Returns it and its D.

    The last batch norm of a residual block starts at 1 (torchvision's default), as published. Weights are drawn from
    torch's global generator. Raises what `check_name` does.
    """
    if name in _VITS:
        patch, width, heads = _VITS[name]
        return VisionTransformer(patch, width, heads), width
    check_name(name)
    if name.startswith(PREFIX):
        return build_timm_backbone(name)
    backbone = _RESNETS[name](weights=None)
    features = backbone.fc.in_features
    backbone.fc = nn.Identity()
    backbone.avgpool = GlobalAveragePool()
    return backbone, features


def check_name(name: str) -> None:
    """Raise UserError, with the nearest name, for a name that no backbone has, and for one of timm without timm."""
    if name in BACKBONES:
        return
    if name.startswith(PREFIX):
        check_timm_name(name)
        return
    near = difflib.get_close_matches(name, BACKBONES, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise UserError(
        f"unknown backbone {name!r}. {hint}The choices are {', '.join(BACKBONES)}, or {PREFIX}NAME for a model of timm."
    )


def count_blocks(name: str) -> int:
    """Return the number of blocks with drop path: those of a published vision transformer, 0 for other backbones."""
    return DEPTH if name in _VITS else 0


def checkpoint_activations(backbone: nn.Module, name: str) -> None:
    """Have the backward pass compute each block again. Raises UserError for a backbone that has no blocks."""
    if not isinstance(backbone, VisionTransformer):
        raise UserError(
            f"--activation_checkpointing is for the vision transformers {', '.join(_VITS)}, not for {name}. Leave it "
            "out. To need less memory, pass --accumulate with a number of parts."
        )
    backbone.activation_checkpointing = True


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put `network` into evaluation mode inside. After it, every module is in its own mode again."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
