"""Measure our loader with every combination of the given settings, and print the fastest first.

    python -m bench.sweep SHARDS --threads 4 8 16 --prefetch 2 4
    python -m bench.sweep SHARDS --decode dali --decode_device gpu --hw_decoder_load 0 0.2 0.4

The settings are those of `data` in a recipe. A setting that is not given has its default. Crops, augmentation and
figures are those of bench/loader.py. Memory is the main memory of a process that has run the earlier combinations, too.
The first combination runs once more than the others before anything is counted. A combination that fails is left out.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench.data_settings import add_data_settings, read_combinations
from bench.loader import UNITS, Arm, LoaderKind, Setup, load_ours, measure_round
from bench.records import add_run_arguments, make_records, report, save_partial
from bench.timing import Figures, attempt, run_interleaved
from pipelines.loader import DataRecipe, count_default_threads
from pipelines.photometric import PhotometricRecipe
from shards.index import ShardIndex


def measure_settings(index: ShardIndex, data: DataRecipe, batch: int, seconds: float, device: str) -> Figures:
    """Return the figures of a round of the loader with these settings."""
    arm = Arm(partial(load_ours, LoaderKind(data, device)), lambda _: 0.0)
    setup = Setup(index, Path(), batch, data.threads or count_default_threads())
    return measure_round(arm, setup, PhotometricRecipe(), seconds)


def sort_fastest_first(rounds: dict[str, list[Figures]]) -> dict[str, list[Figures]]:
    """Sort the arms by their best round."""
    return dict(sorted(rounds.items(), key=lambda arm: -max(figures["images"] for figures in arm[1])))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="folder that make-shards wrote")
    add_data_settings(parser)
    parser.add_argument("--batch", type=int, default=64, help="images in a batch (64)")
    parser.add_argument("--seconds", type=float, default=5, help="seconds of a round in which images are counted (5)")
    add_run_arguments(parser, rounds=1)
    return parser.parse_args()


def main() -> None:
    """Measure the combinations, and report their records."""
    options = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with ShardIndex(options.shards) as index:
        arms: dict[str, Callable[[], Figures]] = {
            name or "as it is": partial(measure_settings, index, data, options.batch, options.seconds, device)
            for name, data in read_combinations(options)
        }
        name, first = next(iter(arms.items()))
        attempt(name, first)  # compiles kernels, and reads files into memory
        save = partial(save_partial, "sweep", UNITS, options.json)
        rounds = run_interleaved(arms, options.rounds, save, uncounted=0)
    print(f"{options.shards}: 2×224 + 6×96, batches of {options.batch} on {device}")
    report(make_records("sweep", UNITS, sort_fastest_first(rounds)), options.json)


if __name__ == "__main__":
    main()
