"""Measure the augmentation alone: 2×224 + 6×96 crops that lie in memory become normalized batches.

    python -m bench.augment
    python -m bench.augment --only copy triton --json bench/results/augment.jsonl

The augmentation is the published one. On a GPU, in bfloat16, the arms are the Triton kernel, the torch reference, the
reference under torch.compile, and a plain copy within the GPU's memory for comparison. The copy moves as many bytes as
an ideal kernel of two passes: crops read twice, the batch written once. The figures of a round over --iterations steps:

- time: µs for an image as a loop sees it, with the launches;
- device: µs for an image that the GPU alone takes. The launches are made ahead, while the GPU is busy. An arm that
  waits for the GPU, or launches for longer than a fifth of a second, includes its launches here, too;
- copy share: the copy's device time over the arm's, in percent.

Without a GPU, in float32, the arms are the kernel for CPU cores, with all of this process's cores, and the torch
reference. The clock times them, and Triton is not measured. Inputs rotate, so that no cache holds them.
"""

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from bench.records import add_run_arguments, make_records, report, save_partial
from bench.timing import Figures, print_left_out, run_interleaved
from pipelines import photometric
from pipelines.crops import CropRecipe
from pipelines.photometric import AugmentParameters, PhotometricRecipe, draw_augment_parameters

CROPS = CropRecipe(global_scale=(0.14, 1.0), local_scale=(0.05, 0.14), locals=6)
INPUTS = 4  # different steps that take turns
BUSY_CYCLES = 400_000_000  # of a GPU's clock: a fifth of a second at 2 GHz
COPY, COMPILED = "copy", "torch.compile"
UNITS = {"time": "µs an image", "device": "µs an image", "copy share": "%"}


@dataclass(frozen=True)
class Views:
    """All views of one resolution of a step, and memory for half of what an ideal kernel reads and writes."""

    images: Tensor
    """crops, uint8 [B, V, S, S, 3]"""
    parameters: AugmentParameters
    """parameters, arrays [V, B]"""
    out: Tensor
    """memory for the batch, [V·B, 3, S, S]"""
    source: Tensor
    """bytes to be copied"""
    target: Tensor
    """memory for the copy"""


Step = list[Views]  # one for each resolution
Arm = Callable[[Views], None]


def make_steps(batch: int, device: torch.device, dtype: torch.dtype) -> list[Step]:
    """Return INPUTS different steps. They are noise, since no arm's time depends on what the images show."""
    steps = []
    for number in range(INPUTS):
        parameters = draw_augment_parameters(PhotometricRecipe(), 0, number, np.arange(batch), CROPS.views)
        steps.append([make_views(batch, size, parameters[views], device, dtype) for size, views in CROPS.resolutions])
    return steps


def make_views(
    batch: int, size: int, parameters: AugmentParameters, device: torch.device, dtype: torch.dtype
) -> Views:  # fmt: skip
    """Return views of `size` pixels a side, as many as `parameters` has."""
    count = len(parameters.flip)
    images = torch.randint(0, 256, (batch, count, size, size, 3), dtype=torch.uint8, device=device)
    out = torch.empty(batch * count, 3, size, size, dtype=dtype, device=device)
    half = (2 * images.nbytes + out.nbytes) // 2
    source = torch.randint(0, 256, (half,), dtype=torch.uint8, device=device)
    return Views(
        images, parameters, out.contiguous(memory_format=torch.channels_last), source, torch.empty_like(source)
    )


def augment_views(augment: Callable[[Tensor, AugmentParameters, Tensor], None], views: Views) -> None:
    """Augment views with one of the kernels."""
    augment(views.images, views.parameters, views.out)


def copy_views(views: Views) -> None:
    """Copy as many bytes as an ideal kernel reads and writes."""
    views.target.copy_(views.source)


def list_gpu_arms() -> dict[str, Arm]:
    """Return the arms on a GPU by name."""
    from pipelines import photometric_triton

    compiled = torch.compile(photometric.augment, dynamic=False)
    return {
        COPY: copy_views,
        "triton": partial(augment_views, photometric_triton.augment),
        "torch": partial(augment_views, photometric.augment),
        COMPILED: partial(augment_views, compiled),
    }


def list_cpu_arms(cores: int) -> dict[str, Arm]:
    """Return the arms on a CPU by name. Prints which are left out."""
    torch.set_num_threads(cores)
    arms: dict[str, Arm] = {"torch": partial(augment_views, photometric.augment)}
    try:
        from pipelines import photometric_cpu
    except ImportError as error:
        print_left_out("cpu kernel", str(error))
    else:
        arms["cpu kernel"] = partial(augment_views, partial(photometric_cpu.augment, pool=ThreadPoolExecutor(cores)))
    print_left_out("triton", "there is no GPU")
    return arms


def measure_on_gpu(arm: Arm, steps: list[Step], batch: int, iterations: int) -> Figures:
    """Return the figures of a round on a GPU."""
    for step in steps:  # compiles what is not compiled yet, before anything is timed
        run(arm, [step], 1)
    return {
        "time": time_on_gpu(arm, steps, iterations, busy=0) / iterations / batch * 1e6,
        "device": time_on_gpu(arm, steps, iterations, busy=BUSY_CYCLES) / iterations / batch * 1e6,
    }


def time_on_gpu(arm: Arm, steps: list[Step], iterations: int, busy: int) -> float:
    """Return the seconds between two events around all iterations. Before them the GPU is busy for `busy` cycles."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if busy:
        torch.cuda._sleep(busy)
    start.record()
    run(arm, steps, iterations)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure_on_cpu(arm: Arm, steps: list[Step], batch: int, iterations: int) -> Figures:
    """Return the figures of a round on a CPU."""
    start = time.perf_counter()
    run(arm, steps, iterations)
    return {"time": (time.perf_counter() - start) / iterations / batch * 1e6}


def run(arm: Arm, steps: list[Step], iterations: int) -> None:
    """Run an arm on the steps in turn."""
    for number in range(iterations):
        for views in steps[number % len(steps)]:
            arm(views)


def add_shares(rounds: dict[str, list[Figures]]) -> None:
    """Add each arm's share of the copy of the same round."""
    for figures in (of_arm for name, of_arm in rounds.items() if name != COPY and COPY in rounds):
        for figure, plain in zip(figures, rounds[COPY], strict=True):
            figure["copy share"] = 100 * plain["device"] / figure["device"]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64, help="images in a step (64)")
    parser.add_argument("--iterations", type=int, default=50, help="steps in a round (50)")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="arms to measure; all by default")
    add_run_arguments(parser, rounds=5)
    return parser.parse_args()


def main() -> None:
    """Measure the arms, and report their records."""
    options = parse_arguments()
    gpu, cores = torch.cuda.is_available(), len(os.sched_getaffinity(0))
    device, dtype = (torch.device("cuda"), torch.bfloat16) if gpu else (torch.device("cpu"), torch.float32)
    steps = make_steps(options.batch, device, dtype)
    measure = measure_on_gpu if gpu else measure_on_cpu
    arms = {
        name: partial(measure, arm, steps, options.batch, options.iterations)
        for name, arm in (list_gpu_arms() if gpu else list_cpu_arms(cores)).items()
        if options.only is None or name in options.only
    }
    rounds = run_interleaved(arms, options.rounds, partial(save_partial, "augment", UNITS, options.json))
    add_shares(rounds)
    print(f"2×224 + 6×96, batches of {options.batch}, {dtype} on " + ("the GPU" if gpu else f"{cores} cores"))
    if COMPILED in rounds:
        breaks, graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
        print(f"{COMPILED}: {breaks} graph breaks, {graphs} graphs for {INPUTS} steps")
    report(make_records("augment", UNITS, rounds), options.json)


if __name__ == "__main__":
    main()
