"""Our loader by its settings: every combination of those given, in turn, the fastest first.

    python -m bench.sweep SHARDS [--decode dali torch] [--decode_device gpu cpu] [--threads 4 8 16] [--prefetch 2 4]
                          [--hw_decoder_load 0 0.2 0.4] [--batch 128] [--seconds 5] [--rounds 1]
                          [--json bench/results/X.jsonl]

The settings are those of `data` in a recipe; what is not given has one value, the default. Crops, colours and figures
are those of `bench/loader.py`; memory is the main memory of a process that has run the combinations before, too. The
first combination runs once more than the others, before anything is counted. One that fails is left out.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench.loader import UNITS, Arm, Figures, Setting, measure, our_batches
from bench.timing import attempt, interleaved, keep_records, records, report
from pipelines.loader import DataRecipe, default_threads
from pipelines.photometric import PhotometricRecipe
from shards.index import ShardIndex

SWEPT = ("decode", "decode_device", "threads", "prefetch", "hw_decoder_load")


def combinations(values: dict[str, list[Any]]) -> Iterator[tuple[str, DataRecipe]]:
    """Of the values of each setting: a name that says those of which there are several, and the recipe."""
    for chosen in product(*values.values()):
        settings = dict(zip(values, chosen, strict=True))
        told = [f"{name} {value}" for name, value in settings.items() if len(values[name]) > 1]
        yield ", ".join(told) or "as it is", DataRecipe(**settings)


def one_round(index: ShardIndex, data: DataRecipe, batch: int, seconds: float, device: str) -> Figures:
    """The figures of a loader with these settings."""
    arm = Arm(partial(our_batches, (data, device)), lambda _: 0.0)
    setting = Setting(index, Path(), batch, data.threads or default_threads())
    return measure(arm, setting, PhotometricRecipe(), seconds)


def fastest_first(rounds: dict[str, list[Figures]]) -> dict[str, list[Figures]]:
    return dict(sorted(rounds.items(), key=lambda arm: -max(figures["images"] for figures in arm[1])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--decode", nargs="+", choices=("auto", "dali", "torch"), default=["auto"])
    parser.add_argument("--decode_device", nargs="+", choices=("auto", "gpu", "cpu"), default=["auto"])
    parser.add_argument("--threads", nargs="+", type=int, default=[0])
    parser.add_argument("--prefetch", nargs="+", type=int, default=[2])
    parser.add_argument("--hw_decoder_load", nargs="+", type=float, default=[-1.0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with ShardIndex(options.shards) as index:
        arms: dict[str, Callable[[], Figures]] = {}
        for name, data in combinations({name: getattr(options, name) for name in SWEPT}):
            arms[name] = partial(one_round, index, data, options.batch, options.seconds, device)
        name, first = next(iter(arms.items()))
        attempt(name, first)  # kernels are compiled, files come into memory
        keep = partial(keep_records, "sweep", UNITS, options.json)
        rounds = interleaved(arms, options.rounds, keep, uncounted=0)
    print(f"{options.shards}: 2×224 + 6×96, batches of {options.batch} on {device}")
    report(records("sweep", UNITS, fastest_first(rounds)), options.json)


if __name__ == "__main__":
    main()
