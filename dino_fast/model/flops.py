"""The arithmetic of a step, counted from the layers, and what a GPU's data sheet promises: for the share of it in use.

FLOPs are of convolutions and matrix products alone, two for each multiplication with its addition: what the model asks
for, whatever the machine makes of it. The share is then the "model FLOPs utilization" of Chowdhery et al. 2022
(appendix B).
"""

import re
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dino_fast.config import Recipe
from dino_fast.model.backbones import build_backbone
from dino_fast.model.head import DinoHead

# FLOP/s in bfloat16 or float16 with sums in float32, dense, by torch's name of the GPU; the first match counts.
# As NVIDIA publishes them, in whitepapers (H100: 989.4, H100 PCIe: 756; A100: 312; V100: 125 and 112; Ada: 165.2;
# GA102: 71) and in the products' data sheets, halved where those count half of a matrix as zeros (B200: 4,500; H100 NVL
# and H200 NVL: 1,671; L40: 362; L4: 242).
PEAKS = {
    r"B200\b": 2250e12,
    r"H[12]00 NVL\b": 835.5e12,
    r"H100 PCIe\b": 756e12,
    r"(H100|G?H200)\b": 989.4e12,
    r"A100\b": 312e12,
    r"A40\b": 149.7e12,
    r"A30\b": 165e12,
    r"A10\b": 125e12,
    r"L40S\b": 362e12,
    r"L40\b": 181e12,
    r"L4\b": 121e12,
    r"V100-SXM2\b": 125e12,
    r"V100-PCIE\b": 112e12,
    r"T4\b": 65e12,
    r"RTX 4090$": 165.2e12,
    r"RTX 3090$": 71e12,
}


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of a device in half precision by its data sheet. None for processors, parts of GPUs, and unknown ones."""
    return peak_by_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_by_name(name: str) -> float | None:
    """As `peak_flops`, by torch's name of a GPU, such as "NVIDIA H200"."""
    if re.search(r"\bMIG\b", name):
        return None
    return next((peak for pattern, peak in PEAKS.items() if re.search(rf"\b{pattern}", name)), None)


class Convolution(NamedTuple):
    """One layer, for one picture of one size."""

    flops: float  # of each of its kernels
    elements: int  # read and written by each
    kernels: int  # forward, by weight and by input: the first layer's input needs no gradient


@cache
def convolutions(backbone: str, side: int) -> tuple[Convolution, ...]:
    """A backbone's layers at `side` pixels, in the order of its forward."""
    found: list[Convolution] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        flops = 2.0 * output.numel() * layer.get_parameter("weight")[0].numel()
        found.append(Convolution(flops, inputs[0].numel() + output.numel(), 3 if found else 2))

    with torch.device("meta"):
        network, _ = build_backbone(backbone)
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(note)
        network.eval()(torch.empty(1, 3, side, side))
    return tuple(found)


def step_convolutions(recipe: Recipe) -> list[tuple[int, Convolution]]:
    """Every layer at each resolution, and how many of its kernels run for one image: of the student forward and
    backward, of the teacher forward."""
    crops = recipe.crops
    layers = [(2 * layer.kernels + 2, layer) for layer in convolutions(recipe.backbone, crops.global_size)]
    if crops.locals:
        layers += [(crops.locals * layer.kernels, layer) for layer in convolutions(recipe.backbone, crops.local_size)]
    return layers


@cache
def head_flops(recipe: Recipe) -> float:
    """Of the heads' matrix products for one image."""
    with torch.device("meta"):
        _, width = build_backbone(recipe.backbone)
        head = DinoHead(width, recipe.head)
    weights = sum(layer.weight.numel() for layer in head.mlp.modules() if isinstance(layer, nn.Linear))
    weights += head.last_layer.weight_v.numel()
    return 2.0 * weights * (3 * recipe.crops.views + 2)


@cache
def flops_an_image(recipe: Recipe) -> float:
    """Of one image's step: student forward and backward, teacher forward. Of convolutions and matrix products alone."""
    return sum(count * layer.flops for count, layer in step_convolutions(recipe)) + head_flops(recipe)
