"""The arithmetic of a step, counted from the layers, and the peak of GPUs by their data sheets.

Only convolutions and matrix products are counted, with two FLOPs for each multiplication and its addition. This is what
the model needs, whatever the machine does. Its share of the peak is the "model FLOPs utilization" of Chowdhery et al.
2022 (appendix B).
"""

import re
from collections.abc import Hashable
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dino_fast.model.backbones import build_backbone
from dino_fast.model.head import DinoHead, HeadRecipe
from pipelines.crops import CropRecipe

# FLOP/s in bfloat16 or float16 with sums in float32, dense, by torch's name of the GPU. The first match counts.
# The values are NVIDIA's, in whitepapers (H100: 989.4, H100 PCIe: 756; A100: 312; V100: 125 and 112; Ada: 165.2;
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
    """Return a device's FLOP/s in half precision by its data sheet. None for CPUs, parts of GPUs, and unknown ones."""
    return peak_by_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_by_name(name: str) -> float | None:
    """Return the same by torch's name of a GPU, such as "NVIDIA H200"."""
    if re.search(r"\bMIG\b", name):
        return None
    return next((peak for pattern, peak in PEAKS.items() if re.search(rf"\b{pattern}", name)), None)


class Architecture(Hashable, Protocol):
    """What the arithmetic of a step depends on. A recipe has all of it."""

    @property
    def backbone(self) -> str: ...
    @property
    def crops(self) -> CropRecipe: ...
    @property
    def head(self) -> HeadRecipe: ...


class Layer(NamedTuple):
    """A convolution, a linear layer, or one of the two products of an attention, for one image of one size."""

    flops: float
    """FLOPs of each of its kernels"""
    elements: int
    """values that each of its kernels reads and writes, without weights"""
    kernels: int
    """number of kernels: forward, by weight, and by input except in the first layer; three of an attention's product"""


@cache
def list_layers(backbone: str, side: int) -> tuple[Layer, ...]:
    """Return a backbone's layers at `side` pixels, in the order of its forward pass."""
    with torch.device("meta"):
        network, _ = build_backbone(backbone)
        # As two products: a kernel that fuses them has its own operation on each device.
        with _LayerNotes(network) as notes, sdpa_kernel(SDPBackend.MATH):
            network.eval()(torch.empty(1, 3, side, side))
    return tuple(notes.found)


class _LayerNotes(TorchDispatchMode):
    """Notes every convolution and matrix product that runs, whatever module asks for it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.found: list[Layer] = []
        self._weights = {identify_storage(weight) for weight in network.parameters()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func.overloadpacket):
            tensors = [
                value for value in args if isinstance(value, Tensor) and identify_storage(value) not in self._weights
            ]
            elements = sum(tensor.numel() for tensor in (*tensors, output))
            flops = float(count(*args, **(kwargs or {}), out_val=output))
            self.found.append(Layer(flops, elements, 3 if self.found else 2))
        return output


def identify_storage(tensor: Tensor) -> int:
    """Return a number that tensors have in common which share memory, as long as one of them exists."""
    return tensor.untyped_storage()._cdata


def list_step_layers(recipe: Architecture) -> list[tuple[int, Layer]]:
    """Return every layer at each resolution, and how many of its kernels run for one image.

    The student runs forward and backward, the teacher forward.
    """
    crops = recipe.crops
    layers = [(2 * layer.kernels + 2, layer) for layer in list_layers(recipe.backbone, crops.global_size)]
    if crops.locals:
        layers += [(crops.locals * layer.kernels, layer) for layer in list_layers(recipe.backbone, crops.local_size)]
    return layers


@cache
def head_flops(recipe: Architecture) -> float:
    """Return the FLOPs of the heads' matrix products for one image."""
    with torch.device("meta"):
        _, width = build_backbone(recipe.backbone)
        head = DinoHead(width, recipe.head)
    weights = sum(layer.weight.numel() for layer in head.mlp.modules() if isinstance(layer, nn.Linear))
    weights += head.last_layer.weight_v.numel()
    return 2.0 * weights * (3 * recipe.crops.views + 2)


@cache
def flops_an_image(recipe: Architecture) -> float:
    """Return the FLOPs of one image's step: student forward and backward, teacher forward."""
    return sum(count * layer.flops for count, layer in list_step_layers(recipe)) + head_flops(recipe)
