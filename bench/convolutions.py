"""Each convolution of a ResNet by itself: how near cuDNN's kernels come to what binds them.

    python -m bench.convolutions [--batch 128] [--backbone resnet50] [--side 224 96] [--rounds 3] [--iterations 10]
                                 [--json bench/results/X.jsonl]

Every distinct layer on the student's views of a batch, channels-last, in float16 (on a CPU float32): forward, by
weight, and by input. The stem is there with 4 and 8 input channels, too. Figures of a round, over --iterations:

- time: µs; on a GPU what it takes alone, the launches being made ahead;
- bound: in percent, over that time the larger of the operations at the rate of a large matrix product and of the bytes
  of input and output at the rate of a large copy, both of this run.

"step" sums up all layers of a step of both networks, each kernel as often as it runs in one.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.roofline import copy_bandwidth, gemm_rate
from bench.step import choose_device
from bench.timing import device_time, interleaved, keep_records, records, report
from dino_fast.model.backbones import build_backbone

UNITS = {"time": "µs", "bound": "%"}
KERNELS = ("forward", "by weight", "by input")
VIEWS = {0: 2, 1: 6}  # of an image, by the number of the resolution
TEACHER_VIEWS = 2  # of the first resolution, forward alone

Figures = dict[str, float]  # by the names of UNITS


@dataclass(frozen=True)
class Layer:
    """A convolution on one resolution."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    side: int  # of its input, in pixels
    resolution: int

    @property
    def name(self) -> str:
        return f"{self.inputs} to {self.outputs}, {self.kernel}×{self.kernel}/{self.stride} at {self.side}"

    @property
    def outer(self) -> int:
        """Pixels of a side of the output."""
        return (self.side - 1) // self.stride + 1

    def flops(self, images: int) -> float:
        return 2.0 * images * self.outer**2 * self.outputs * self.inputs * self.kernel**2

    def values(self, images: int) -> float:
        """Read and written, weights left out."""
        return float(images * (self.side**2 * self.inputs + self.outer**2 * self.outputs))


def layers(backbone: str, sides: list[int]) -> Counter[Layer]:
    """Those of a ResNet, and how often each is there."""
    found: Counter[Layer] = Counter()

    def count(resolution: int, conv: nn.Conv2d, inputs: tuple[Tensor], _: Tensor) -> None:
        shape = conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0]
        found[Layer(*shape, inputs[0].shape[-1], resolution)] += 1

    with torch.device("meta"):
        for resolution, side in enumerate(sides):
            network, _ = build_backbone(backbone)
            for module in network.modules():
                if isinstance(module, nn.Conv2d):
                    module.register_forward_hook(partial(count, resolution))
            network.eval()(torch.empty(1, 3, side, side))
    return found


def work_of(layer: Layer, kernel: str, images: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)

    x = made(images, layer.inputs, layer.side, layer.side)
    weight = made(layer.outputs, layer.inputs, layer.kernel, layer.kernel)
    stride, padding = [layer.stride] * 2, [layer.kernel // 2] * 2
    if kernel == "forward":
        return partial(torch.conv2d, x, weight, None, stride, padding)
    grad = made(images, layer.outputs, layer.outer, layer.outer)
    wanted = [kernel == "by input", kernel == "by weight", False]
    return partial(
        torch.ops.aten.convolution_backward, grad, x, weight, None, stride, padding, [1, 1], False, [0, 0], 1, wanted
    )


def one_round(
    layer: Layer, kernel: str, images: int, iterations: int, device: torch.device, dtype: torch.dtype
) -> Figures:
    work = work_of(layer, kernel, images, device, dtype)
    for _ in range(2):  # cuDNN tries its ways in the first
        work()
    return {"time": 1e6 * device_time(work, iterations, device)}


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128 if gpu else 1)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--side", type=int, nargs="+", default=[224, 96], help="pixels of global and local views")
    parser.add_argument("--iterations", type=int, default=10 if gpu else 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device, dtype = choose_device(), torch.float16 if gpu else torch.float32
    found = layers(options.backbone, options.side)
    stem = next(iter(found))
    arms: dict[str, Callable[[], Figures]] = {}
    bounds: dict[str, float] = {}  # µs
    bandwidth, rate = copy_bandwidth(device), gemm_rate(device, dtype)
    for layer in [*found, replace(stem, inputs=4), replace(stem, inputs=8)]:
        images = VIEWS[layer.resolution] * options.batch
        for kernel in KERNELS[:2] if layer.kernel == stem.kernel else KERNELS:
            name = f"{layer.name}: {kernel}"
            arms[name] = partial(one_round, layer, kernel, images, options.iterations, device, dtype)
            bounds[name] = 1e6 * max(layer.flops(images) / rate, layer.values(images) * dtype.itemsize / bandwidth)
    rounds = interleaved(arms, options.rounds, partial(keep_records, "convolutions", UNITS, options.json), uncounted=0)
    for name, figures in rounds.items():
        for figure in figures:
            figure["bound"] = 100 * bounds[name] / figure["time"]
    add_step(rounds, found, bounds)
    print(f"{options.backbone}, batches of {options.batch}, {dtype} on {device}")
    report(records("convolutions", UNITS, rounds), options.json)


def add_step(rounds: dict[str, list[Figures]], found: Counter[Layer], bounds: dict[str, float]) -> None:
    """Sums over a step, of the layers that were all measured."""
    times, bound = [0.0] * min(map(len, rounds.values())), 0.0
    for layer, count in found.items():
        for kernel in KERNELS:
            if (name := f"{layer.name}: {kernel}") not in rounds:
                continue
            often = float(count)
            if kernel == "forward" and layer.resolution == 0:
                often *= 1 + TEACHER_VIEWS / VIEWS[0]
            bound += often * bounds[name]
            times = [time + often * rounds[name][number]["time"] for number, time in enumerate(times)]
    rounds["step"] = [{"time": time, "bound": 100 * bound / time} for time in times]


if __name__ == "__main__":
    main()
