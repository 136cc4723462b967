"""How fast ResNet-50's step could be on this machine, by what binds each part of it: arithmetic or memory.

    python -m bench.roofline [--precision P] [--rounds 5] [--json bench/results/X.jsonl]

Two probes: the bandwidth of a large copy within the device's memory, bytes read + written a second, and the rate of a
large matrix product in the precision. From them three bounds, in images a second, 2×224 + 6×96 unless asked otherwise:

- eager: each operation reads and writes its tensors, as PyTorch runs it;
- pointwise-fused: batch norm's application, ReLU and addition are one pass, as a compiler makes them;
- conv-fused: batch norm's statistics come out of a convolution's epilogue, its application goes into the next one's
  prologue.

An image's time is

    traffic / bandwidth + Σ max(0, FLOPs / rate − bytes / bandwidth) over convolution kernels + heads' FLOPs / rate

that is, each pointwise kernel takes as long as its traffic, each convolution kernel (forward, by input, by weight) as
long as its traffic or its arithmetic, whichever is more. A convolution's bytes are its input's and its output's.
Traffic is that of TRAFFIC for a picture of 224 pixels, by the share of pixels for other sizes; teacher views count
forward alone.

The bounds were first derived elsewhere, as 2,110, 2,750 and 3,970 images a second for an H200 of 790 TFLOP/s and
4.3 TB/s, by a formula that was not written down. This one gives 2,113, 2,756 and 4,073 for that: 0.1, 0.2 and 2.6 %
more. Left out: weights, the loss, the update, launches.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from bench.timing import interleaved, keep_records, records, report
from dino_fast.config import Recipe
from dino_fast.model.flops import flops_an_image, head_flops, step_convolutions
from dino_fast.train import DTYPES
from pipelines.crops import CropRecipe

BACKBONE = "resnet50"  # whose traffic is known
SIDE = 224  # pixels, of the picture that TRAFFIC is for


class Traffic(NamedTuple):
    """Bytes that a picture's activations and their gradients move, in 16 bits."""

    both: float  # forward and backward
    forward: float


# Forward and backward together are sums of an earlier count, layer by layer. Forward alone is counted here: at 224
# pixels a ResNet-50's convolutions have 11.1 M outputs, 22.2 MB, and read and write 2.0 times that. Batch norm, ReLU
# and addition: eager 3.0 + 1.7 + 1.5 times; pointwise-fused 1.0 for the statistics and 2.2 for the rest; conv-fused
# 1.0, for the sums at the ends of blocks. Pooling: 0.1.
TRAFFIC = {
    "eager": Traffic(474e6, 184e6),
    "pointwise-fused": Traffic(364e6, 117e6),
    "conv-fused": Traffic(233e6, 68e6),
}
UNITS = {"bandwidth": "GB/s", "compute": "TFLOP/s", "images": "img/s"}

Figures = dict[str, float]  # by the names of UNITS


def rooflines(bandwidth: float, rate: float, recipe: Recipe) -> Figures:
    """The three bounds, images a second, from bytes and FLOPs a second. ValueError unless for BACKBONE."""
    if recipe.backbone != BACKBONE:
        raise ValueError(f"the traffic of {recipe.backbone} is not known, only that of {BACKBONE}")
    width = DTYPES[recipe.precision].itemsize
    arithmetic = head_flops(recipe) / rate
    for count, layer in step_convolutions(recipe):
        arithmetic += count * max(0.0, layer.flops / rate - width * layer.elements / bandwidth)
    return {name: 1 / (bytes_ / bandwidth + arithmetic) for name, bytes_ in moved(recipe).items()}


def moved(recipe: Recipe) -> Figures:
    """Bytes of activations and their gradients that a step moves for each image, by the names of TRAFFIC."""
    student, teacher = pictures(recipe.crops)
    width = DTYPES[recipe.precision].itemsize
    return {name: (student * traffic.both + teacher * traffic.forward) * width / 2 for name, traffic in TRAFFIC.items()}


def pictures(crops: CropRecipe) -> tuple[float, float]:
    """What one image's views are to the student and to the teacher, in pictures of SIDE pixels."""
    globals_ = 2 * (crops.global_size / SIDE) ** 2
    return globals_ + crops.locals * (crops.local_size / SIDE) ** 2, globals_


# The probes


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read + written a second by a copy far larger than any cache."""
    size = 2**31 if device.type == "cuda" else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / seconds_of(partial(target.copy_, source), device)


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large square matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / seconds_of(partial(torch.mm, left, right), device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Of one call, from as many as take about half a second, after one that is not counted."""
    calls = 0
    work()
    start = finished(device)
    while (seconds := finished(device) - start) < 0.5:
        for _ in range(10 if device.type == "cuda" else 1):  # so that the GPU does not wait for the host
            work()
            calls += 1
    return seconds / calls


def finished(device: torch.device) -> float:
    """Seconds by the clock, when all that was begun on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def probes(device: torch.device, dtype: torch.dtype) -> Figures:
    """Both, in the units of UNITS."""
    return {"bandwidth": copy_bandwidth(device) / 1e9, "compute": gemm_rate(device, dtype) / 1e12}


def lines(probed: Figures, recipe: Recipe) -> Figures:
    """The rooflines from figures of `probes`, images a second."""
    return rooflines(probed["bandwidth"] * 1e9, probed["compute"] * 1e12, recipe)


def as_arms(probed: list[Figures], recipe: Recipe) -> dict[str, list[Figures]]:
    """The rooflines of each round, in the form of arms beside others."""
    found = [lines(figures, recipe) for figures in probed]
    return {f"{name} roofline": [{"images": line[name]} for line in found] for name in TRAFFIC}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "fp16" if torch.cuda.is_available() else "bf16"
    parser.add_argument("--precision", choices=DTYPES, default=default)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    recipe = Recipe(precision=options.precision, crops=CropRecipe(locals=6))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep = partial(keep_records, "roofline", UNITS, options.json)
    rounds = interleaved({"probes": partial(probes, device, DTYPES[recipe.precision])}, options.rounds, keep)
    print(
        f"{BACKBONE}, 2×224 + 6×96, {options.precision} on {device}: {flops_an_image(recipe) / 1e9:.1f} GFLOP an image"
    )
    report(records("roofline", UNITS, rounds | as_arms(rounds["probes"], recipe)), options.json)


if __name__ == "__main__":
    main()
