"""Measure how long it takes to start in the middle of a run, and to find samples.

    python -m bench.resume SHARDS
    python -m bench.resume SHARDS --samples 1281167 --step 4000000 --json bench/results/resume.jsonl

The first must not depend on the step, the second not on the number of samples. The images are those of SHARDS, numbered
over and over until there are --samples of them.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench.records import add_run_arguments, make_record, report
from bench.timing import run_interleaved
from pipelines.crops import CropRecipe
from pipelines.loader import DataRecipe, Loader
from pipelines.order import SampleOrder
from pipelines.photometric import PhotometricRecipe
from shards.index import ShardIndex


class RepeatedIndex(ShardIndex):
    """A shard folder whose samples are numbered over and over until there are `samples` of them."""

    def __init__(self, folder: Path, samples: int) -> None:
        super().__init__(folder)
        self.records = np.resize(self.records, samples)
        self.heights, self.widths = self.records["height"], self.records["width"]


def time_first_batch(index: ShardIndex, step: int, batch: int) -> float:
    """Return the seconds from an open index to the batch of `step`."""
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


def time_order(samples: int, batch: int = 512, steps: int = 50) -> float:
    """Return the microseconds that the order needs for one sample, with `samples` of them in an epoch."""
    order = SampleOrder(samples, batch, seed=0)
    start = time.perf_counter()
    for step in range(steps):
        order.ids(step)
    return (time.perf_counter() - start) / steps / batch * 1e6


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="folder that make-shards wrote")
    parser.add_argument("--samples", type=int, default=1_281_167, help="samples in an epoch (%(default)s)")
    parser.add_argument("--step", type=int, default=4_000_000, help="step to start at (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images in a batch (64)")
    add_run_arguments(parser, rounds=5)
    return parser.parse_args()


def main() -> None:
    """Measure both, and report their records."""
    options = parse_arguments()
    with RepeatedIndex(options.shards, options.samples) as index:
        arms = {f"step {step}": partial(time_first_batch, index, step, options.batch) for step in (0, options.step)}
        first = run_interleaved(arms, options.rounds)
    orders = {f"{samples:.0e} samples": partial(time_order, samples) for samples in (10**4, 10**9)}
    costs = run_interleaved(orders, options.rounds)
    report(
        [make_record("resume", arm, "first batch", "s", figures) for arm, figures in first.items()]
        + [make_record("order", arm, "cost a sample", "µs", figures) for arm, figures in costs.items()],
        options.json,
    )


if __name__ == "__main__":
    main()
