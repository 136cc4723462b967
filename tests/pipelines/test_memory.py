"""Memory stays flat, however long the loader runs."""

import subprocess
import sys

import pytest

from shards.index import ShardIndex

SCRIPT = """
import sys
from pathlib import Path
import torch
from pipelines.crops import CropRecipe
from pipelines.loader import DataRecipe, Loader
from pipelines.photometric import PhotometricRecipe
from shards.index import ShardIndex

def resident():  # MB
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

index = ShardIndex(sys.argv[1])
loader = Loader(
    index, DataRecipe(decode=sys.argv[2], order=sys.argv[3], threads=2),
    CropRecipe(global_size=96, local_size=48, locals=4),
    PhotometricRecipe(), batch=16, seed=0, device=torch.device("cpu"), dtype=torch.bfloat16,
)
for batch in loader.batches(0, 2500):
    if batch.step in (499, 2499):
        print(resident())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("decode", "order"), [("torch", "global"), ("dali", "global"), ("torch", "shards")])
def test_memory_is_flat_over_2000_batches(index: ShardIndex, decode: str, order: str):
    run = [sys.executable, "-c", SCRIPT, str(index.folder), decode, order]
    before, after = map(float, subprocess.run(run, capture_output=True, text=True, check=True).stdout.split())
    print(f"{before:.0f} MB, 2,000 batches later {after:.0f} MB")
    assert after < before + 30
