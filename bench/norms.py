"""Measure a ResNet's batch norms with the ReLU, the addition or the pooling after them: ours beside torch's.

    python -m bench.norms
    python -m bench.norms --backbone resnet18 --rounds 5 --json bench/results/norms.jsonl

Every distinct layer of the backbone runs forward and backward on the two global views of a batch, channels-last, in
float16 (on a CPU in float32). "triton" is dino_fast.model.kernels.batch_norm. "torch" runs the operations of
torchvision's ResNet one after another, as cuDNN and ATen have them. "join" is an addition whose residual has a norm of
its own. "network" sums up all layers, each as often as it is there. The figures of a round over --iterations:

- time: µs of a forward and a backward pass; on a GPU what they take alone, since the launches are made ahead;
- copy share: the time of a copy within the device's memory over the arm's, in percent. The copy has as many bytes as
  two passes in each direction move.

--sweep measures the kernels with other sizes of tiles and other numbers of programs and warps, instead of torch.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.records import add_layer_arguments, add_run_arguments, make_records, report, save_partial
from bench.roofline import measure_copy_bandwidth
from bench.step_recipe import choose_device
from bench.timing import Figures, measure_device_time, print_left_out, run_interleaved
from dino_fast.model.backbones import build_backbone

UNITS = {"time": "µs", "copy share": "%"}
SIDE = 224
# How many full tensors two passes in each direction read and write, in units of the norm's input. Forward, they read
# the input twice and write the output. With an addition they also read the residual, and once more if it has a norm of
# its own. Backward, they read gradient and input twice, and write the gradient of the input. With an addition they
# first read both gradients and the output, and write the gradient of the sum. The stem's pooled tensors are a quarter
# of its input, and the places of their maxima half of that.
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


@dataclass(frozen=True)
class Layer:
    """A batch norm and what follows it."""

    kind: str
    """a key of PASSES"""
    channels: int
    """channels of its input"""
    side: int
    """side of its input in pixels"""

    @property
    def name(self) -> str:
        """The first part of the names of its arms."""
        return f"{self.kind} {self.channels} at {self.side}"


def count_layers(backbone: str, side: int) -> Counter[Layer]:
    """Return the layers of a ResNet on images of `side` pixels, and how often each is there."""
    layers: Counter[Layer] = Counter()
    with torch.device("meta"):
        network, _ = build_backbone(backbone)
        for name, module in network.named_modules():
            if isinstance(module, nn.BatchNorm2d) and "downsample" not in name:  # counted with its block's last norm
                module.register_forward_hook(partial(_count_layer, layers, _find_kind(name, network)))
        network(torch.empty(1, 3, side, side))
    return layers


def _find_kind(name: str, network: nn.Module) -> str:
    if name == "bn1":
        return "pool"
    block = network.get_submodule(name.rpartition(".")[0])
    if not name.endswith("bn3" if hasattr(block, "bn3") else "bn2"):
        return "relu"
    return "add" if block.downsample is None else "join"


def _count_layer(layers: Counter[Layer], kind: str, _: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
    layers[Layer(kind, output.shape[1], output.shape[2])] += 1


# Maps (x, its norm, residual, the residual's norm) to the output, once for each later use of it.
Operation = Callable[[Tensor, nn.BatchNorm2d, Tensor, nn.BatchNorm2d], tuple[Tensor, ...]]


def make_torch_operation(kind: str) -> Operation:
    """Return a layer as torch's operations."""

    def operate(x: Tensor, norm: nn.BatchNorm2d, residual: Tensor, around: nn.BatchNorm2d) -> tuple[Tensor, ...]:
        y = norm(x)
        if kind in ("add", "join"):
            y += around(residual) if kind == "join" else residual
        y = F.relu(y, inplace=True)
        return (F.max_pool2d(y, 3, 2, 1) if kind == "pool" else y,)

    return operate


def make_kernel_operation(kind: str) -> Operation:
    """Return a layer as our kernels."""
    from dino_fast.model.kernels import batch_norm as fused

    def operate(x: Tensor, norm: nn.BatchNorm2d, residual: Tensor, around: nn.BatchNorm2d) -> tuple[Tensor, ...]:
        if kind in ("add", "join"):
            return fused.norm_add_relu(x, norm, residual, around if kind == "join" else None)
        return fused.norm_relu_pool(x, norm) if kind == "pool" else (fused.norm_relu(x, norm),)

    return operate


def measure_round(
    operate: Operation, layer: Layer, batch: int, iterations: int, device: torch.device, dtype: torch.dtype
) -> Figures:
    """Return the time of a layer. Its tensors are made here, so that memory holds those of one layer at a time."""
    x, residual = (_make_tensor(batch, layer, device, dtype).requires_grad_() for _ in range(2))
    norm, around = (nn.BatchNorm2d(layer.channels).to(device) for _ in range(2))
    grads = [torch.randn_like(y) for y in operate(x, norm, residual, around)]

    def work() -> None:
        torch.autograd.backward(list(operate(x, norm, residual, around)), grads)
        norm.zero_grad()
        around.zero_grad()
        x.grad = residual.grad = None

    for _ in range(2):
        work()
    return {"time": 1e6 * measure_device_time(work, iterations, device)}


def _make_tensor(batch: int, layer: Layer, device: torch.device, dtype: torch.dtype) -> Tensor:
    x = torch.randn(2 * batch, layer.channels, layer.side, layer.side, device=device, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def run_with_sizes(sizes: Mapping[str, Any], measure: Callable[[], Figures]) -> Figures:
    """Measure a round with other constants in the kernels' module."""
    from dino_fast.model.kernels import batch_norm as fused

    before = {name: getattr(fused, name) for name in sizes}
    try:
        for name, value in sizes.items():
            setattr(fused, name, value)
        return measure()
    finally:
        for name, value in before.items():
            setattr(fused, name, value)


def build_arms(
    layers: Counter[Layer], options: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], Figures]]:
    """Return the arms of all layers."""
    arms: dict[str, Callable[[], Figures]] = {}
    for layer in layers:
        size = options.batch, options.iterations, device, dtype
        if device.type == "cuda":
            ours = partial(measure_round, make_kernel_operation(layer.kind), layer, *size)
            arms[f"{layer.name}: triton"] = ours
            for sizes in SWEEP if options.sweep else []:
                arms[f"{layer.name}: triton, {_describe_sizes(sizes)}"] = partial(run_with_sizes, sizes, ours)
        if not options.sweep:
            arms[f"{layer.name}: torch"] = partial(measure_round, make_torch_operation(layer.kind), layer, *size)
    return arms


def _describe_sizes(sizes: Mapping[str, Any]) -> str:
    launch = sizes.get("LAUNCH")
    named = {name: value for name, value in sizes.items() if name != "LAUNCH"}
    named |= {"warps": launch["num_warps"]} if isinstance(launch, dict) else {}
    return ", ".join(f"{name} {value}" for name, value in named.items())


def add_shares(
    rounds: dict[str, list[Figures]], layers: Counter[Layer], batch: int, dtype: torch.dtype, bandwidth: float
) -> None:
    """Add each arm's share of a copy. `bandwidth` is in bytes read and written a second."""
    for layer in layers:
        bytes_ = 2 * batch * layer.channels * layer.side**2 * dtype.itemsize * PASSES[layer.kind]
        for name, figures in rounds.items():
            if name.startswith(f"{layer.name}: "):
                for figure in figures:
                    figure["copy share"] = 100 * (1e6 * bytes_ / bandwidth) / figure["time"]


def add_network(rounds: dict[str, list[Figures]], layers: Counter[Layer]) -> None:
    """Add arms with the sums over all layers. Each layer must have been measured."""
    count = min(map(len, rounds.values()))
    for arm in dict.fromkeys(name.partition(": ")[2] for name in rounds):
        times = [
            sum(n * rounds[f"{layer.name}: {arm}"][number]["time"] for layer, n in layers.items())
            for number in range(count)
        ]
        rounds[f"network: {arm}"] = [{"time": time} for time in times]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_layer_arguments(parser)
    parser.add_argument("--side", type=int, default=SIDE, help="side of an image in pixels (224)")
    parser.add_argument("--sweep", action="store_true", help="measure the kernels with other sizes, instead of torch")
    add_run_arguments(parser, rounds=3)
    return parser.parse_args()


def main() -> None:
    """Measure all layers, and report their records."""
    options = parse_arguments()
    device = choose_device()
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    layers = count_layers(options.backbone, options.side)
    if device.type != "cuda":
        print_left_out("triton", "there is no GPU")
    save = partial(save_partial, "norms", UNITS, options.json)
    rounds = run_interleaved(build_arms(layers, options, device, dtype), options.rounds, save, uncounted=0)
    add_shares(rounds, layers, options.batch, dtype, measure_copy_bandwidth(device))
    add_network(rounds, layers)
    print(f"{options.backbone} on 2 × {options.batch} images of {options.side} pixels, {dtype} on {device}")
    report(make_records("norms", UNITS, rounds), options.json)


if __name__ == "__main__":
    main()
