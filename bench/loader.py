"""How fast the loader makes batches, without a step that takes them: DALI and torch, with and without the colours.

python -m bench.loader SHARDS [--batch 64] [--seconds 20] [--rounds 3] [--json bench/results/loader.jsonl]
"""

import argparse
import time
from functools import partial
from pathlib import Path

import torch

from bench.timing import interleaved, record, report
from dino_fast.distributed import choose_device
from pipelines.crops import CropRecipe
from pipelines.loader import DataRecipe, Loader
from pipelines.photometric import PhotometricRecipe
from shards.index import ShardIndex

CROPS = CropRecipe(global_scale=(0.14, 1.0), local_scale=(0.05, 0.14), locals=6)
NO_COLOURS = PhotometricRecipe(
    flip=0, jitter=0, grey=0, blur_global_1=0, blur_global_2=0, blur_locals=0, solarize_global_2=0
)


def rate(index: ShardIndex, data: DataRecipe, colours: PhotometricRecipe, batch: int, seconds: float) -> float:
    """Images a second over `seconds`, counted from the first batch."""
    device = choose_device("auto", 0)
    loader = Loader(
        index, data, CROPS, colours, batch=batch, seed=0, device=device,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
    )  # fmt: skip
    batches = loader.batches(0, 10**9)
    next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(batches)
        count += batch
    if device.type == "cuda":
        torch.cuda.synchronize()
    spent = time.perf_counter() - start
    batches.close()
    return count / spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    kinds = [DataRecipe(decode="dali", decode_device="cpu"), DataRecipe(decode="torch")]
    kinds += [DataRecipe(decode="dali", decode_device="gpu")] if torch.cuda.is_available() else []
    with ShardIndex(options.shards) as index:
        arms = {
            f"{data.decode}-{data.decode_device.replace('auto', 'cpu')}{name}": partial(
                rate, index, data, colours, options.batch, options.seconds
            )
            for data in kinds
            for name, colours in (("", PhotometricRecipe()), (", crops alone", NO_COLOURS))
        }
        figures = interleaved(arms, options.rounds)
    print(f"{options.shards}: 2×224 + 6×96, batches of {options.batch}")
    report([record("loader", arm, "images", "img/s", rates) for arm, rates in figures.items()], options.json)


if __name__ == "__main__":
    main()
