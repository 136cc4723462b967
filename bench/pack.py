"""How fast make-shards packs a folder of pictures, beside bare decoding of the same pictures with the same library.

python -m bench.pack SRC [--workers 2] [--rounds 3] [--json bench/results/pack.jsonl]
"""

import argparse
import contextlib
import io
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from bench.timing import interleaved, record, report
from shards.__main__ import main as make_shards
from shards.picture import UndecodableError, decode
from shards.sources import scan


def pack(source: Path, workers: int, shard_size: str, pictures: int) -> float:
    """Images a second of the whole command: listing, decoding, hashing, writing, syncing."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        out = os.path.join(folder, "shards")
        start = time.perf_counter()
        status = make_shards(["pack", str(source), out, "--workers", str(workers), "--shard-size", shard_size])
        seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"bench.pack: packing {source} failed")
    return pictures / seconds


def bare_decode(paths: list[Path], workers: int) -> float:
    """Images a second of reading and decoding alone, without start-up."""
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(_nothing, range(workers)))
        start = time.perf_counter()
        list(pool.map(_decode, paths, chunksize=64))
        return len(paths) / (time.perf_counter() - start)


def _nothing(_: int) -> None: ...


def _decode(path: Path) -> None:
    with contextlib.suppress(UndecodableError):
        decode(path.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pictures = len(scan(options.source).sources)
    paths = [path for path in sorted(options.source.rglob("*")) if path.is_file()]
    arms = {
        "pack, 256MB shards": partial(pack, options.source, options.workers, "256MB", pictures),
        "pack, 16MB shards": partial(pack, options.source, options.workers, "16MB", pictures),
        "bare decode": partial(bare_decode, paths, options.workers),
    }
    figures = interleaved(arms, options.rounds)
    print(f"{pictures} pictures, {options.workers} workers")
    report([record("pack", arm, "images", "img/s", rates) for arm, rates in figures.items()], options.json)


if __name__ == "__main__":
    main()
