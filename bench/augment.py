"""The photometric stage alone: 2×224 + 6×96 crops that lie in memory, to normalised batches. Published colours.

    python -m bench.augment [--batch 64] [--iterations 50] [--rounds 5] [--only ARM ...] [--json bench/results/X.jsonl]

On a GPU, in bfloat16: the Triton kernel, the torch reference, the same under torch.compile, and for comparison a plain
copy within the GPU's memory that moves as many bytes as an ideal kernel of two passes would: pictures read twice, the
batch written once. Figures of a round, over `iterations` steps between two CUDA events:

- time: µs an image as a loop sees it, launches included;
- device: the same while the launches are made ahead, behind a GPU kept busy: what the GPU alone takes. An arm that
  cannot be launched in SLEEP cycles, or that waits for the GPU, shows its launches here too;
- copy share: the copy's device time over the arm's, in percent.

Without a GPU, in float32: the kernel for CPU cores (with all of this process's cores) and the torch reference, timed by
the clock. Triton is then not measured. Inputs rotate, so that no cache holds them.
"""

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from bench.timing import interleaved, keep_records, records, report
from pipelines import photometric
from pipelines.crops import CropRecipe
from pipelines.photometric import Colours, PhotometricRecipe, draw_colours

CROPS = CropRecipe(global_scale=(0.14, 1.0), local_scale=(0.05, 0.14), locals=6)
SETS = 4  # of inputs
SLEEP = 400_000_000  # cycles of a GPU's clock: a fifth of a second at 2 GHz
COPY, COMPILED = "copy", "torch.compile"
UNITS = {"time": "µs an image", "device": "µs an image", "copy share": "%"}

Figures = dict[str, float]  # by the names of UNITS


@dataclass(frozen=True)
class Views:
    """All views of one resolution of a step, and room for a copy of half of what an ideal kernel reads and writes."""

    pictures: Tensor
    colours: Colours
    out: Tensor
    source: Tensor
    target: Tensor


Arm = Callable[[Views], None]


def steps(batch: int, device: torch.device, dtype: torch.dtype) -> list[list[Views]]:
    """SETS different steps: noise, since no arm's time depends on what the pictures show."""
    made = []
    for number in range(SETS):
        colours = draw_colours(PhotometricRecipe(), 0, number, np.arange(batch), CROPS.views)
        made.append([views_of(batch, size, views, colours, device, dtype) for size, views in CROPS.resolutions])
    return made


def views_of(
    batch: int, size: int, views: slice, colours: Colours, device: torch.device, dtype: torch.dtype
) -> Views:  # fmt: skip
    count = views.stop - views.start
    pictures = torch.randint(0, 256, (batch, count, size, size, 3), dtype=torch.uint8, device=device)
    out = torch.empty(batch * count, 3, size, size, dtype=dtype, device=device)
    half = (2 * pictures.nbytes + out.nbytes) // 2
    source = torch.randint(0, 256, (half,), dtype=torch.uint8, device=device)
    return Views(
        pictures, colours[views], out.contiguous(memory_format=torch.channels_last), source, torch.empty_like(source)
    )


def kernel(augment: Callable[[Tensor, Colours, Tensor], None], views: Views) -> None:
    augment(views.pictures, views.colours, views.out)


def copy(views: Views) -> None:
    views.target.copy_(views.source)


def gpu_arms() -> dict[str, Arm]:
    from pipelines import photometric_triton

    compiled = torch.compile(photometric.augment, dynamic=False)
    return {
        COPY: copy,
        "triton": partial(kernel, photometric_triton.augment),
        "torch": partial(kernel, photometric.augment),
        COMPILED: partial(kernel, compiled),
    }


def cpu_arms(cores: int) -> dict[str, Arm]:
    torch.set_num_threads(cores)
    arms: dict[str, Arm] = {"torch": partial(kernel, photometric.augment)}
    try:
        from pipelines import photometric_cpu
    except ImportError as error:
        print(f"cpu kernel: not measured ({error})")
    else:
        arms["cpu kernel"] = partial(kernel, partial(photometric_cpu.augment, pool=ThreadPoolExecutor(cores)))
    print("triton: not measured, there is no GPU")
    return arms


def gpu_round(arm: Arm, made: list[list[Views]], batch: int, iterations: int) -> Figures:
    for step in made:  # compiles what is not compiled yet, before anything is timed
        run(arm, [step], 1)
    return {
        "time": gpu_seconds(arm, made, iterations, sleep=0) / iterations / batch * 1e6,
        "device": gpu_seconds(arm, made, iterations, sleep=SLEEP) / iterations / batch * 1e6,
    }


def gpu_seconds(arm: Arm, made: list[list[Views]], iterations: int, sleep: int) -> float:
    """Between two events around all iterations, with the GPU kept busy before them for `sleep` cycles."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if sleep:
        torch.cuda._sleep(sleep)
    start.record()
    run(arm, made, iterations)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def cpu_round(arm: Arm, made: list[list[Views]], batch: int, iterations: int) -> Figures:
    start = time.perf_counter()
    run(arm, made, iterations)
    return {"time": (time.perf_counter() - start) / iterations / batch * 1e6}


def run(arm: Arm, made: list[list[Views]], iterations: int) -> None:
    for number in range(iterations):
        for views in made[number % len(made)]:
            arm(views)


def add_shares(rounds: dict[str, list[Figures]]) -> None:
    """Each round against the copy of the same round."""
    for figures in (found for name, found in rounds.items() if name != COPY and COPY in rounds):
        for figure, plain in zip(figures, rounds[COPY], strict=True):
            figure["copy share"] = 100 * plain["device"] / figure["device"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="ARM", help="the arms to run; all by default")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    gpu, cores = torch.cuda.is_available(), len(os.sched_getaffinity(0))
    device, dtype = (torch.device("cuda"), torch.bfloat16) if gpu else (torch.device("cpu"), torch.float32)
    found = gpu_arms() if gpu else cpu_arms(cores)
    made = steps(options.batch, device, dtype)
    one_round = gpu_round if gpu else cpu_round
    arms = {
        name: partial(one_round, arm, made, options.batch, options.iterations)
        for name, arm in found.items()
        if options.only is None or name in options.only
    }
    rounds = interleaved(arms, options.rounds, partial(keep_records, "augment", UNITS, options.json))
    add_shares(rounds)
    print(f"2×224 + 6×96, batches of {options.batch}, {dtype} on " + ("the GPU" if gpu else f"{cores} cores"))
    if COMPILED in rounds:
        breaks, graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
        print(f"{COMPILED}: {breaks} graph breaks, {graphs} graphs for {SETS} steps")
    report(records("augment", UNITS, rounds), options.json)


if __name__ == "__main__":
    main()
