"""Measure each convolution of a ResNet alone: how close cuDNN's kernels come to what limits them.

    python -m bench.convolutions
    python -m bench.convolutions --backbone resnet18 --side 224 --json bench/results/convolutions.jsonl

Every distinct layer runs on the student's views of a batch, channels-last, in float16 (on a CPU in float32). It is
measured forward, by weight and by input. The stem is also measured with 4 and with 8 input channels. The figures of a
round over --iterations:

- time: µs; on a GPU what it takes alone, since the launches are made ahead;
- bound: the share of that time that is necessary, in percent. Necessary is the arithmetic at the rate of a large matrix
  product, or the bytes of input and output at the rate of a large copy, whichever takes longer. Both rates are measured
  in this run.

The arm "step" sums up all layers of a step of both networks, each kernel as often as it runs in one.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from bench.records import add_layer_arguments, add_run_arguments, make_records, report, save_partial
from bench.roofline import measure_copy_bandwidth, measure_gemm_rate
from bench.step_recipe import choose_device
from bench.timing import Figures, measure_device_time, run_interleaved
from dino_fast.model.backbones import build_backbone

UNITS = {"time": "µs", "bound": "%"}
KERNELS = ("forward", "by weight", "by input")
VIEWS = {0: 2, 1: 6}  # views of an image by the number of their resolution
TEACHER_VIEWS = 2  # of the first resolution, only forward


@dataclass(frozen=True)
class Layer:
    """A convolution on one resolution."""

    inputs: int
    """channels of the input"""
    outputs: int
    """channels of the output"""
    kernel: int
    """side of the kernel, pixels"""
    stride: int
    """stride, pixels"""
    side: int
    """side of the input, pixels"""
    resolution: int
    """number of the resolution"""

    @property
    def name(self) -> str:
        """The name of its arms, without the kernel."""
        return f"{self.inputs} to {self.outputs}, {self.kernel}×{self.kernel}/{self.stride} at {self.side}"

    @property
    def output_side(self) -> int:
        """The side of the output in pixels."""
        return (self.side - 1) // self.stride + 1

    def count_flops(self, images: int) -> float:
        """Return the FLOPs of one of its kernels."""
        return 2.0 * images * self.output_side**2 * self.outputs * self.inputs * self.kernel**2

    def count_values(self, images: int) -> float:
        """Return how many numbers of input and output are read or written, without the weights."""
        return float(images * (self.side**2 * self.inputs + self.output_side**2 * self.outputs))


def count_layers(backbone: str, sides: list[int]) -> Counter[Layer]:
    """Return the layers of a ResNet, and how often each is there."""
    layers: Counter[Layer] = Counter()

    def count(resolution: int, conv: nn.Conv2d, inputs: tuple[Tensor], _: Tensor) -> None:
        shape = conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0]
        layers[Layer(*shape, inputs[0].shape[-1], resolution)] += 1

    with torch.device("meta"):
        for resolution, side in enumerate(sides):
            network, _ = build_backbone(backbone)
            for module in network.modules():
                if isinstance(module, nn.Conv2d):
                    module.register_forward_hook(partial(count, resolution))
            network.eval()(torch.empty(1, 3, side, side))
    return layers


def make_work(layer: Layer, kernel: str, images: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """Return a function that runs one of KERNELS."""

    def make_tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)

    x = make_tensor(images, layer.inputs, layer.side, layer.side)
    weight = make_tensor(layer.outputs, layer.inputs, layer.kernel, layer.kernel)
    stride, padding = [layer.stride] * 2, [layer.kernel // 2] * 2
    if kernel == "forward":
        return partial(torch.conv2d, x, weight, None, stride, padding)
    grad = make_tensor(images, layer.outputs, layer.output_side, layer.output_side)
    wanted = [kernel == "by input", kernel == "by weight", False]
    return partial(
        torch.ops.aten.convolution_backward, grad, x, weight, None, stride, padding, [1, 1], False, [0, 0], 1, wanted
    )


def measure_round(
    layer: Layer, kernel: str, images: int, iterations: int, device: torch.device, dtype: torch.dtype
) -> Figures:
    """Return the time of one kernel of a layer."""
    work = make_work(layer, kernel, images, device, dtype)
    for _ in range(2):  # in the first, cuDNN tries its algorithms
        work()
    return {"time": 1e6 * measure_device_time(work, iterations, device)}


def build_arms(
    layers: Counter[Layer], options: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Callable[[], Figures]], dict[str, float]]:
    """Return the arms, and the necessary time of each in µs."""
    stem = next(iter(layers))
    arms: dict[str, Callable[[], Figures]] = {}
    bounds: dict[str, float] = {}
    bandwidth, rate = measure_copy_bandwidth(device), measure_gemm_rate(device, dtype)
    for layer in [*layers, replace(stem, inputs=4), replace(stem, inputs=8)]:
        images = VIEWS[layer.resolution] * options.batch
        for kernel in KERNELS[:2] if layer.kernel == stem.kernel else KERNELS:
            name = f"{layer.name}: {kernel}"
            arms[name] = partial(measure_round, layer, kernel, images, options.iterations, device, dtype)
            arithmetic, traffic = (
                layer.count_flops(images) / rate,
                layer.count_values(images) * dtype.itemsize / bandwidth,
            )
            bounds[name] = 1e6 * max(arithmetic, traffic)
    return arms, bounds


def add_bounds(rounds: dict[str, list[Figures]], bounds: dict[str, float]) -> None:
    """Add to each arm's figures the share of its time that is necessary."""
    for name, figures in rounds.items():
        for figure in figures:
            figure["bound"] = 100 * bounds[name] / figure["time"]


def add_step(rounds: dict[str, list[Figures]], layers: Counter[Layer], bounds: dict[str, float]) -> None:
    """Add an arm with the sums over a step, of the layers that were measured."""
    times, bound = [0.0] * min(map(len, rounds.values())), 0.0
    for layer, count in layers.items():
        for kernel in KERNELS:
            if (name := f"{layer.name}: {kernel}") not in rounds:
                continue
            often = float(count)
            if kernel == "forward" and layer.resolution == 0:
                often *= 1 + TEACHER_VIEWS / VIEWS[0]
            bound += often * bounds[name]
            times = [time + often * rounds[name][number]["time"] for number, time in enumerate(times)]
    rounds["step"] = [{"time": time, "bound": 100 * bound / time} for time in times]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_layer_arguments(parser)
    parser.add_argument(
        "--side", type=int, nargs="+", default=[224, 96], help="sides of global and local views in pixels (224 96)"
    )
    add_run_arguments(parser, rounds=3)
    return parser.parse_args()


def main() -> None:
    """Measure all layers, and report their records."""
    options = parse_arguments()
    device = choose_device()
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    layers = count_layers(options.backbone, options.side)
    arms, bounds = build_arms(layers, options, device, dtype)
    save = partial(save_partial, "convolutions", UNITS, options.json)
    rounds = run_interleaved(arms, options.rounds, save, uncounted=0)
    add_bounds(rounds, bounds)
    add_step(rounds, layers, bounds)
    print(f"{options.backbone}, batches of {options.batch}, {dtype} on {device}")
    report(make_records("convolutions", UNITS, rounds), options.json)


if __name__ == "__main__":
    main()
