"""Estimate how fast ResNet-50's step could be on this machine, as arithmetic or memory limits each part of it.

    python -m bench.roofline
    python -m bench.roofline --precision fp16 --json bench/results/roofline.jsonl

Two probes measure the machine: the bandwidth of a large copy within the device's memory, in bytes read and written a
second, and the rate of a large matrix product. They give three bounds in images a second, for crops of 2×224 + 6×96:

- eager: each operation reads and writes its tensors, as PyTorch runs it;
- pointwise-fused: the application of batch norm, ReLU and addition are one pass, as a compiler makes them;
- conv-fused: a convolution also computes the statistics of the batch norm after it, and applies the one before it.

The time of an image is

    traffic / bandwidth + Σ max(0, FLOPs / rate − bytes / bandwidth) over convolution kernels + heads' FLOPs / rate

So each pointwise kernel takes as long as its traffic. Each convolution kernel (forward, by input, by weight) takes as
long as its traffic or its arithmetic, whichever is longer. The bytes of a convolution are those of its input and its
output. TRAFFIC has the traffic of an image of 224 pixels; other sizes have it by their share of pixels. The teacher's
views count only the forward pass. Weights, the loss, the update and launches are left out.

The bounds were first derived elsewhere, as 2,110, 2,750 and 3,970 images a second for an H200 of 790 TFLOP/s and
4.3 TB/s, by a formula that was not written down. This one gives 2,113, 2,756 and 4,073 for it: 0.1, 0.2 and 2.6 % more.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from bench.records import add_run_arguments, make_records, report, save_partial
from bench.timing import Figures, read_clock, run_interleaved
from dino_fast.config import Recipe
from dino_fast.model.flops import flops_an_image, head_flops, list_step_layers
from dino_fast.step.precision import DTYPES
from pipelines.crops import CropRecipe

BACKBONE = "resnet50"  # the only one whose traffic is known
SIDE = 224  # pixels of a side of the image that TRAFFIC is for


class Traffic(NamedTuple):
    """Bytes that an image's activations and their gradients move, in 16 bits."""

    both: float
    """bytes of the forward and the backward pass together"""
    forward: float
    """bytes of the forward pass"""


# Both passes together are the sums of an earlier count, layer by layer. The forward pass is counted here. At 224 pixels
# a ResNet-50's convolutions have 11.1 M outputs, 22.2 MB, and read and write 2.0 times that. In the same unit, batch
# norm, ReLU and addition move: eager 3.0 + 1.7 + 1.5; pointwise-fused 1.0 for the statistics and 2.2 for the rest;
# conv-fused 1.0, for the sums at the ends of blocks. Pooling moves 0.1.
TRAFFIC = {
    "eager": Traffic(474e6, 184e6),
    "pointwise-fused": Traffic(364e6, 117e6),
    "conv-fused": Traffic(233e6, 68e6),
}
UNITS = {"bandwidth": "GB/s", "compute": "TFLOP/s", "images": "img/s"}


def compute_rooflines(bandwidth: float, rate: float, recipe: Recipe) -> Figures:
    """Return the three bounds in images a second, from bytes and FLOPs a second.

    Raises ValueError for another backbone than BACKBONE.
    """
    if recipe.backbone != BACKBONE:
        raise ValueError(f"the memory traffic of {recipe.backbone} is not known, only that of {BACKBONE}")
    width = DTYPES[recipe.precision].itemsize
    arithmetic = head_flops(recipe) / rate
    for count, layer in list_step_layers(recipe):
        arithmetic += count * max(0.0, layer.flops / rate - width * layer.elements / bandwidth)
    return {name: 1 / (bytes_ / bandwidth + arithmetic) for name, bytes_ in count_traffic(recipe).items()}


def count_traffic(recipe: Recipe) -> Figures:
    """Return the bytes of activations and gradients that a step moves for each image, by the names of TRAFFIC."""
    student, teacher = count_full_images(recipe.crops)
    width = DTYPES[recipe.precision].itemsize
    return {name: (student * traffic.both + teacher * traffic.forward) * width / 2 for name, traffic in TRAFFIC.items()}


def count_full_images(crops: CropRecipe) -> tuple[float, float]:
    """Return to how many images of SIDE pixels the views of one image amount, for the student and for the teacher."""
    globals_ = 2 * (crops.global_size / SIDE) ** 2
    return globals_ + crops.locals * (crops.local_size / SIDE) ** 2, globals_


def measure_copy_bandwidth(device: torch.device) -> float:
    """Return the bytes a second that a copy far larger than any cache reads and writes."""
    size = 2**31 if device.type == "cuda" else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / time_call(partial(target.copy_, source), device)


def measure_gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOPs a second of a large square matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / time_call(partial(torch.mm, left, right), device)


def time_call(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call. One is not counted, then it is called for about half a second."""
    calls = 0
    work()
    start = read_clock(device)
    while (seconds := read_clock(device) - start) < 0.5:
        for _ in range(10 if device.type == "cuda" else 1):  # so that the GPU does not wait for the host
            work()
            calls += 1
    return seconds / calls


def run_probes(device: torch.device, dtype: torch.dtype) -> Figures:
    """Return the figures of both probes, in the units of UNITS."""
    return {"bandwidth": measure_copy_bandwidth(device) / 1e9, "compute": measure_gemm_rate(device, dtype) / 1e12}


def make_rooflines(probed: Figures, recipe: Recipe) -> Figures:
    """Return the bounds from the figures of `run_probes`, in images a second."""
    return compute_rooflines(probed["bandwidth"] * 1e9, probed["compute"] * 1e12, recipe)


def make_roofline_arms(probed: list[Figures], recipe: Recipe) -> dict[str, list[Figures]]:
    """Return the bounds of each round, in the form of arms."""
    rounds = [make_rooflines(figures, recipe) for figures in probed]
    return {f"{name} roofline": [{"images": bounds[name]} for bounds in rounds] for name in TRAFFIC}


def main() -> None:
    """Run the probes, and report their records and the bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "fp16" if torch.cuda.is_available() else "bf16"
    parser.add_argument("--precision", choices=DTYPES, default=default, help="of the matrix product (%(default)s)")
    add_run_arguments(parser, rounds=5)
    options = parser.parse_args()
    recipe = Recipe(precision=options.precision, crops=CropRecipe(locals=6))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    save = partial(save_partial, "roofline", UNITS, options.json)
    rounds = run_interleaved({"probes": partial(run_probes, device, DTYPES[recipe.precision])}, options.rounds, save)
    print(
        f"{BACKBONE}, 2×224 + 6×96, {options.precision} on {device}: {flops_an_image(recipe) / 1e9:.1f} GFLOP an image"
    )
    report(make_records("roofline", UNITS, rounds | make_roofline_arms(rounds["probes"], recipe)), options.json)


if __name__ == "__main__":
    main()
