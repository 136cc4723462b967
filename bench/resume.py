"""What it costs to start in the middle of a run and to find samples; neither should depend on how far or how many.

python -m bench.resume SHARDS [--samples 1281167] [--step 4000000] [--rounds 5] [--json bench/results/resume.jsonl]

SHARDS lends its pictures: they are numbered over and over, up to `--samples`.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench.timing import interleaved, record, report
from pipelines.crops import CropRecipe
from pipelines.loader import DataRecipe, Loader
from pipelines.order import Order
from pipelines.photometric import PhotometricRecipe
from shards.index import ShardIndex


class Repeated(ShardIndex):
    """A shard folder whose samples are numbered over and over, up to `samples`."""

    def __init__(self, folder: Path, samples: int) -> None:
        super().__init__(folder)
        self.records = np.resize(self.records, samples)
        self.heights, self.widths = self.records["height"], self.records["width"]


def first_batch(index: ShardIndex, step: int, batch: int) -> float:
    """Seconds from an open index to the batch of `step`."""
    start = time.perf_counter()
    loader = Loader(
        index, DataRecipe(decode="torch"), CropRecipe(), PhotometricRecipe(), batch=batch, seed=0,
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    batches = loader.batches(step, step + 1)
    next(batches)
    seconds = time.perf_counter() - start
    batches.close()
    return seconds


def order_cost(samples: int, batch: int = 512, steps: int = 50) -> float:
    """Microseconds a sample."""
    order = Order(samples, batch, seed=0)
    start = time.perf_counter()
    for step in range(steps):
        order.ids(step)
    return (time.perf_counter() - start) / steps / batch * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--samples", type=int, default=1_281_167)
    parser.add_argument("--step", type=int, default=4_000_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with Repeated(options.shards, options.samples) as index:
        arms = {f"step {step}": partial(first_batch, index, step, options.batch) for step in (0, options.step)}
        first = interleaved(arms, options.rounds)
    cost = interleaved(
        {f"{samples:.0e} samples": partial(order_cost, samples) for samples in (10**4, 10**9)}, options.rounds
    )
    report(
        [record("resume", arm, "first batch", "s", figures) for arm, figures in first.items()]
        + [record("order", arm, "cost a sample", "µs", figures) for arm, figures in cost.items()],
        options.json,
    )


if __name__ == "__main__":
    main()
