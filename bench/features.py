"""Measure how fast features of images are computed, beside the network's forward alone, and how fast they are read.

    python -m bench.features SHARDS
    python -m bench.features SHARDS --backbone resnet50 --images 256 --json bench/results/features-cpu2.jsonl

- forward: the network alone, on batches that are in memory. It is the speed that nothing can exceed.
- features: `extract_features` from shards into an empty cache: read, decode, resize, forward, write.
- again: `extract_features` a second time, which reads the cache: seconds of a whole call, with the hash of the weights.
"""

import argparse
import shutil
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.records import add_run_arguments, make_records, report, save_partial
from bench.timing import Figures, read_clock, run_interleaved
from dino_fast.distributed import Ranks, choose_device
from dino_fast.evaluate.features import BATCH_SIZE, Extraction, choose_samples, extract_features
from dino_fast.model.backbones import build_backbone
from pipelines.labeled import CenterCrop, choose_resize, load_labeled_batches
from shards.index import ShardIndex

UNITS = {"images": "img/s", "call": "s"}


@torch.inference_mode()
def measure_forward(network: nn.Module, batches: list[Tensor], how: Extraction) -> Figures:
    """Return the images a second of the network alone."""
    device = how.ranks.device
    network.to(device).to(memory_format=torch.channels_last).eval()
    start = read_clock(device)
    with torch.autocast(device.type, torch.float16, enabled=how.half):
        for images in batches:
            network(images)
    return {"images": sum(map(len, batches)) / (read_clock(device) - start)}


def measure_features(network: nn.Module, index: ShardIndex, how: Extraction, keep: bool) -> Figures:
    """Return the images a second, and the seconds, of one call. `keep`: with what the last call left in the cache."""
    if not keep:
        shutil.rmtree(how.cache, ignore_errors=True)
    ids = choose_samples(index, how.limit)
    start = read_clock(how.ranks.device)
    extract_features(network, index, ids, how)
    seconds = read_clock(how.ranks.device) - start
    return {"call": seconds} if keep else {"images": len(ids) / seconds}


def main() -> None:
    """Measure all arms, and report their records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="folder that make-shards wrote")
    parser.add_argument("--backbone", default="resnet50", metavar="NAME", help="whose features (resnet50)")
    parser.add_argument("--crop", type=int, default=224, metavar="PIXELS", help="side of the center crop (224)")
    parser.add_argument("--images", type=int, default=256, metavar="N", help="images of a round (256)")
    add_run_arguments(parser, rounds=5)
    options = parser.parse_args()
    network, _ = build_backbone(options.backbone)
    center = CenterCrop(choose_resize(options.crop), options.crop)
    ranks = Ranks(0, 1, choose_device("auto", 0))
    with ShardIndex(options.shards) as index, tempfile.TemporaryDirectory() as cache:
        how = Extraction(options.backbone, center, ranks, Path(cache) / "features", options.images)
        loaded = load_labeled_batches(index, BATCH_SIZE, center, 2, choose_samples(index, options.images))
        batches = [images.to(ranks.device) for images, _ in loaded]
        arms = {
            "forward": partial(measure_forward, network, batches, how),
            "features": partial(measure_features, network, index, how, keep=False),
            "again": partial(measure_features, network, index, how, keep=True),
        }
        rounds = run_interleaved(arms, options.rounds, partial(save_partial, "features", UNITS, options.json))
    report(make_records("features", UNITS, rounds), options.json)


if __name__ == "__main__":
    main()
