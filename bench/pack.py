"""How fast make-shards packs a folder of pictures, beside copying the same bytes and beside decoding the same pictures.

python -m bench.pack SRC [--repeat 20] [--workers 2] [--rounds 3] [--json bench/results/pack.jsonl]

`--repeat` packs every picture so many times over (hard links, so that the page cache holds them once): class folders
CLASS become CLASS-0, CLASS-1, ….
"""

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image

from bench.timing import interleaved, record, report

ROOT = Path(__file__).resolve().parents[1]


def repeated(source: Path, repeat: int, target: Path) -> list[Path]:
    """The pictures of the class folders of `source`, `repeat` times below `target`; their paths."""
    paths = []
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        for copy in range(repeat):
            label, _, rest = path.relative_to(source).as_posix().partition("/")
            paths.append(target / f"{label}-{copy}" / rest if rest else target / f"{copy}-{label}")
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            os.link(path, paths[-1])
    return paths


def pack(source: Path, scratch: Path, workers: int, pictures: int, *options: str) -> float:
    """Images a second of the whole command: start, listing, judging, hashing, writing, syncing."""
    call = [sys.executable, "-m", "shards", "pack", str(source), "OUT", "--workers", str(workers), *options]
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        call[call.index("OUT")] = f"{folder}/shards"
        os.sync()  # what the arm before has left to write is not this one's
        start = time.perf_counter()
        # A process of its own: workers that were spawned from here would import all that a benchmark imports.
        subprocess.run(call, check=True, cwd=ROOT, capture_output=True)
        seconds = time.perf_counter() - start
    return pictures / seconds


def copy_and_tar(source: Path, scratch: Path, pictures: int) -> float:
    """Images a second of ``cp -r`` and ``tar`` of the copy."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        os.sync()
        start = time.perf_counter()
        subprocess.run(["cp", "-r", source, f"{folder}/copy"], check=True)
        subprocess.run(["tar", "-C", f"{folder}/copy", "-cf", f"{folder}/copy.tar", "."], check=True)
        return pictures / (time.perf_counter() - start)


def bare_decode(paths: list[Path], workers: int) -> float:
    """Images a second of reading and decoding with Pillow alone, in processes that have started already."""
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(_nothing, range(workers)))
        os.sync()
        start = time.perf_counter()
        list(pool.map(_decode, paths, chunksize=64))
        return len(paths) / (time.perf_counter() - start)


def _nothing(_: int) -> None: ...


def _decode(path: Path) -> None:
    with contextlib.suppress(Exception), Image.open(io.BytesIO(path.read_bytes())) as image:
        image.load()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # Beside SRC: hard links need its file system, and all arms should write to the same one.
    with tempfile.TemporaryDirectory(dir=options.source.resolve().parent) as folder:
        scratch, source = Path(folder), Path(folder, "source")
        paths = repeated(options.source, options.repeat, source)
        total = sum(path.stat().st_size for path in paths)
        packing = partial(pack, source, scratch, options.workers, len(paths))
        arms = {
            "pack": packing,
            "pack, 16MB shards": partial(packing, "--shard-size", "16MB"),  # enough of them to share them evenly
            "bare decode": partial(bare_decode, paths, options.workers),
            "pack --check header": partial(packing, "--check", "header"),
            "cp -r and tar": partial(copy_and_tar, source, scratch, len(paths)),
        }
        figures = interleaved(arms, options.rounds)
    print(f"{len(paths)} pictures, {total} bytes, {options.workers} workers")
    report([record("pack", arm, "images", "img/s", rates) for arm, rates in figures.items()], options.json)


if __name__ == "__main__":
    main()
