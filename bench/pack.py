"""Measure how fast make-shards packs a folder of images, beside copying the same bytes and decoding the same images.

    python -m bench.pack SRC
    python -m bench.pack SRC --repeat 20 --workers 2 --json bench/results/pack.jsonl

--repeat packs every image so many times: class folders CLASS become CLASS-0, CLASS-1, …. They are hard links, so that
the page cache holds each image once.
"""

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image

from bench.records import add_run_arguments, make_record, report
from bench.timing import run_interleaved

ROOT = Path(__file__).resolve().parents[1]


def link_copies(source: Path, repeat: int, target: Path) -> list[Path]:
    """Link every image of the class folders of `source` `repeat` times below `target`. Return the new paths."""
    paths = []
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        for copy in range(repeat):
            label, _, rest = path.relative_to(source).as_posix().partition("/")
            paths.append(target / f"{label}-{copy}" / rest if rest else target / f"{copy}-{label}")
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            os.link(path, paths[-1])
    return paths


def measure_pack(source: Path, scratch: Path, workers: int, images: int, *options: str) -> float:
    """Return the images a second of the whole command: start, listing, checking, hashing, writing, syncing."""
    call = [sys.executable, "-m", "shards", "pack", str(source), "OUT", "--workers", str(workers), *options]
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        call[call.index("OUT")] = f"{folder}/shards"
        os.sync()  # so that this arm does not write what the arm before has left
        start = time.perf_counter()
        # A process of its own: workers that were spawned from here would import all that a benchmark imports.
        subprocess.run(call, check=True, cwd=ROOT, capture_output=True)
        seconds = time.perf_counter() - start
    return images / seconds


def measure_copy(source: Path, scratch: Path, images: int) -> float:
    """Return the images a second of ``cp -r``, and of ``tar`` of the copy."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        os.sync()
        start = time.perf_counter()
        subprocess.run(["cp", "-r", source, f"{folder}/copy"], check=True)
        subprocess.run(["tar", "-C", f"{folder}/copy", "-cf", f"{folder}/copy.tar", "."], check=True)
        return images / (time.perf_counter() - start)


def measure_decode(paths: list[Path], workers: int) -> float:
    """Return the images a second of reading, and decoding with Pillow, in processes that have already started."""
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(_do_nothing, range(workers)))
        os.sync()
        start = time.perf_counter()
        list(pool.map(_decode, paths, chunksize=64))
        return len(paths) / (time.perf_counter() - start)


def _do_nothing(_: int) -> None: ...


def _decode(path: Path) -> None:
    with contextlib.suppress(Exception), Image.open(io.BytesIO(path.read_bytes())) as image:
        image.load()


def build_arms(paths: list[Path], source: Path, scratch: Path, workers: int) -> dict[str, Callable[[], float]]:
    """Return the arms. They pack `source`, which holds `paths`, into folders below `scratch`."""
    pack = partial(measure_pack, source, scratch, workers, len(paths))
    return {
        "pack": pack,
        "pack, 16MB shards": partial(pack, "--shard-size", "16MB"),  # enough of them to share them evenly
        "bare decode": partial(measure_decode, paths, workers),
        "pack --check header": partial(pack, "--check", "header"),
        "cp -r and tar": partial(measure_copy, source, scratch, len(paths)),
    }


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of images in class folders")
    parser.add_argument("--repeat", type=int, default=1, help="how many times every image is packed (1)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (2)")
    add_run_arguments(parser, rounds=3)
    return parser.parse_args()


def main() -> None:
    """Measure the arms, and report their records."""
    options = parse_arguments()
    # Beside SRC: hard links need its file system, and all arms should write to the same one.
    with tempfile.TemporaryDirectory(dir=options.source.resolve().parent) as folder:
        scratch, source = Path(folder), Path(folder, "source")
        paths = link_copies(options.source, options.repeat, source)
        total = sum(path.stat().st_size for path in paths)
        rates = run_interleaved(build_arms(paths, source, scratch, options.workers), options.rounds)
    print(f"{len(paths)} images, {total} bytes, {options.workers} workers")
    report([make_record("pack", arm, "images", "img/s", figures) for arm, figures in rates.items()], options.json)


if __name__ == "__main__":
    main()
