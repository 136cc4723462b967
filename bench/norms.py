"""A ResNet's batch norms with the ReLU, addition or pooling after them, forward and backward: ours beside torch's.

    python -m bench.norms [--batch 128] [--backbone resnet50] [--rounds 3] [--iterations 10] [--sweep]
                          [--json bench/results/X.jsonl]

Every distinct layer of the backbone on the two global views of a batch, channels-last, in float16 (on a CPU float32).
"triton" is `dino_fast.model.kernels.batch_norm`, "torch" the operations of torchvision's ResNet one after another, as
cuDNN and ATen run them. "join" is an addition whose residual has a norm of its own. "network" sums all layers, each as
often as it is there. Figures of a round:

- time: µs of a forward and a backward pass; on a GPU what it takes alone, the launches being made ahead;
- copy share: in percent, the time of a copy within the device's memory of as many bytes as two passes in each direction
  take (PASSES), over the arm's.

--sweep takes the kernels with other sizes of tiles, numbers of programs and of warps, instead of torch's.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.roofline import copy_bandwidth
from bench.step import choose_device
from bench.timing import device_time, interleaved, keep_records, records, report
from dino_fast.model.backbones import build_backbone

UNITS = {"time": "µs", "copy share": "%"}
SIDE = 224
# Full tensors that two passes in each direction read and write, in units of the norm's input. Forward: the input twice
# and the output; behind an addition the residual, too, and where that has a norm of its own once more. Backward:
# gradient and input twice, and the gradient's result; behind an addition first both gradients, the output, and the
# gradient of the sum. The stem's pooled tensors are a quarter, and its places half of that.
PASSES = {"relu": 3 + 5, "add": 4 + 8, "join": 5 + 12, "pool": 2.375 + 4.25}
WARPS = [{"num_warps": warps, "enable_fp_fusion": True} for warps in (4, 8)]
SWEEP: list[dict[str, Any]] = [
    {"TILE_BYTES": size, "LAUNCH": launch} for size in (4096, 8192, 16384) for launch in WARPS
]
SWEEP += [
    {"VALUE_PROGRAMS": 2},
    {"VALUE_PROGRAMS": 8},
    {"GRADIENT_PROGRAMS": 2},
    {"GRADIENT_PROGRAMS": 6},
    {"QUAD_BYTES": 1024},
]

Figures = dict[str, float]  # by the names of UNITS


@dataclass(frozen=True)
class Layer:
    """A batch norm and what follows it."""

    kind: str
    """a key of PASSES"""
    channels: int
    side: int

    @property
    def name(self) -> str:
        return f"{self.kind} {self.channels} at {self.side}"


def layers(backbone: str, side: int) -> Counter[Layer]:
    """Those of a ResNet on images of `side` pixels, and how often each is there."""
    found: Counter[Layer] = Counter()
    with torch.device("meta"):
        network, _ = build_backbone(backbone)
        for name, module in network.named_modules():
            if isinstance(module, nn.BatchNorm2d) and "downsample" not in name:  # that belongs to its block's last
                module.register_forward_hook(partial(_count_layer, found, _kind(name, network)))
        network(torch.empty(1, 3, side, side))
    return found


def _kind(name: str, network: nn.Module) -> str:
    if name == "bn1":
        return "pool"
    block = network.get_submodule(name.rpartition(".")[0])
    if not name.endswith("bn3" if hasattr(block, "bn3") else "bn2"):
        return "relu"
    return "add" if block.downsample is None else "join"


def _count_layer(found: Counter[Layer], kind: str, _: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
    found[Layer(kind, output.shape[1], output.shape[2])] += 1


# Work


# (x, its norm, residual, the residual's norm) to the output, for as many uses as it has
Operation = Callable[[Tensor, nn.BatchNorm2d, Tensor, nn.BatchNorm2d], tuple[Tensor, ...]]


def by_torch(kind: str) -> Operation:
    def operate(x: Tensor, norm: nn.BatchNorm2d, residual: Tensor, around: nn.BatchNorm2d) -> tuple[Tensor, ...]:
        y = norm(x)
        if kind in ("add", "join"):
            y += around(residual) if kind == "join" else residual
        y = F.relu(y, inplace=True)
        return (F.max_pool2d(y, 3, 2, 1) if kind == "pool" else y,)

    return operate


def by_kernels(kind: str) -> Operation:
    from dino_fast.model.kernels import batch_norm as fused

    def operate(x: Tensor, norm: nn.BatchNorm2d, residual: Tensor, around: nn.BatchNorm2d) -> tuple[Tensor, ...]:
        if kind in ("add", "join"):
            return fused.norm_add_relu(x, norm, residual, around if kind == "join" else None)
        return fused.norm_relu_pool(x, norm) if kind == "pool" else (fused.norm_relu(x, norm),)

    return operate


def one_round(
    operate: Operation, layer: Layer, batch: int, iterations: int, device: torch.device, dtype: torch.dtype
) -> Figures:
    """The layer's tensors are made here: no two layers' have to be in memory at once."""
    x, residual = (_tensor(batch, layer, device, dtype).requires_grad_() for _ in range(2))
    norm, around = (nn.BatchNorm2d(layer.channels).to(device) for _ in range(2))
    grads = [torch.randn_like(y) for y in operate(x, norm, residual, around)]

    def work() -> None:
        torch.autograd.backward(list(operate(x, norm, residual, around)), grads)
        norm.zero_grad()
        around.zero_grad()
        x.grad = residual.grad = None

    for _ in range(2):
        work()
    return {"time": 1e6 * device_time(work, iterations, device)}


def _tensor(batch: int, layer: Layer, device: torch.device, dtype: torch.dtype) -> Tensor:
    made = torch.randn(2 * batch, layer.channels, layer.side, layer.side, device=device, dtype=dtype)
    return made.contiguous(memory_format=torch.channels_last)


def with_sizes(sizes: Mapping[str, Any], work: Callable[[], Figures]) -> Figures:
    """A round with other constants of the kernels' module."""
    from dino_fast.model.kernels import batch_norm as fused

    before = {name: getattr(fused, name) for name in sizes}
    try:
        for name, value in sizes.items():
            setattr(fused, name, value)
        return work()
    finally:
        for name, value in before.items():
            setattr(fused, name, value)


# The run


def arms(
    found: Counter[Layer], options: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], Figures]]:
    made: dict[str, Callable[[], Figures]] = {}
    for layer in found:
        size = options.batch, options.iterations, device, dtype
        if device.type == "cuda":
            ours = partial(one_round, by_kernels(layer.kind), layer, *size)
            made[f"{layer.name}: triton"] = ours
            for sizes in SWEEP if options.sweep else []:
                named = ", ".join(f"{name} {value}" for name, value in _flat(sizes).items())
                made[f"{layer.name}: triton, {named}"] = partial(with_sizes, sizes, ours)
        if not options.sweep:
            made[f"{layer.name}: torch"] = partial(one_round, by_torch(layer.kind), layer, *size)
    return made


def _flat(sizes: Mapping[str, Any]) -> Mapping[str, Any]:
    launch = sizes.get("LAUNCH")
    rest = {name: value for name, value in sizes.items() if name != "LAUNCH"}
    return rest | ({"warps": launch["num_warps"]} if isinstance(launch, dict) else {})


def add_shares(
    rounds: dict[str, list[Figures]], found: Counter[Layer], batch: int, dtype: torch.dtype, bandwidth: float
) -> None:
    """bandwidth: bytes read + written a second."""
    for layer in found:
        bytes_ = 2 * batch * layer.channels * layer.side**2 * dtype.itemsize * PASSES[layer.kind]
        for name, figures in rounds.items():
            if name.startswith(f"{layer.name}: "):
                for figure in figures:
                    figure["copy share"] = 100 * (1e6 * bytes_ / bandwidth) / figure["time"]


def add_network(rounds: dict[str, list[Figures]], found: Counter[Layer]) -> None:
    """Sums over all layers of each arm that has them all."""
    count = min(map(len, rounds.values()))
    for arm in dict.fromkeys(name.partition(": ")[2] for name in rounds):
        times = [
            sum(n * rounds[f"{layer.name}: {arm}"][number]["time"] for layer, n in found.items())
            for number in range(count)
        ]
        rounds[f"network: {arm}"] = [{"time": time} for time in times]


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128 if gpu else 1)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--side", type=int, default=SIDE, help="pixels of an image")
    parser.add_argument("--iterations", type=int, default=10 if gpu else 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sweep", action="store_true", help="the kernels with other sizes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device, dtype = choose_device(), torch.float16 if gpu else torch.float32
    found = layers(options.backbone, options.side)
    if not gpu:
        print("triton: not measured, there is no GPU")
    keep = partial(keep_records, "norms", UNITS, options.json)
    rounds = interleaved(arms(found, options, device, dtype), options.rounds, keep, uncounted=0)
    add_shares(rounds, found, options.batch, dtype, copy_bandwidth(device))
    add_network(rounds, found)
    print(f"{options.backbone} on 2 × {options.batch} images of {options.side} pixels, {dtype} on {device}")
    report(records("norms", UNITS, rounds), options.json)


if __name__ == "__main__":
    main()
