"""Measure how fast the loader makes batches, beside other people's loaders. No training step takes the batches.

    python -m bench.loader SHARDS
    python -m bench.loader SHARDS --cores 2 --seconds 5 --only torch published --json bench/results/loader.jsonl

All arms make 2×224 + 6×96 crops of the same images on the same cores. Each loader is an arm with the published
augmentation, and a second arm without it ("crops alone"). A round of an arm is a process of its own, which can use no
other cores. Arms on the CPU leave their batches there. An arm whose process fails is left out, and the end of its
output goes to stderr. --arm measures one round of one arm in this process. The figures of a round:

- images: images a second, counted after 2 batches a core, when the workers no longer run in step with each other;
- images a core: the same, divided by the number of cores;
- busy cores: seconds of CPU cores for each second, in the process and its children;
- first batch: seconds from building the loader to its first batch, without the imports before that;
- memory: MB of the process and its children after the measurement. Pages that they share count once;
- parity (crops alone): mean difference in 8-bit levels to Pillow's decode, crop and bicubic resize of the same windows.
  For ours it is measured on its batches. The others draw their own windows, so for them it is measured on their decoder
  and resize. How far their color jitter is from torchvision's is not measured.

The other loaders read files. The shards are unpacked once into a temporary folder, unless --images names one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.peer_views import Levels, Views, Window, crop_pillow
from bench.peers import Peer, find_peers, is_installed, print_missing_peers, unpack
from bench.records import add_run_arguments, make_records, report, save_partial
from bench.timing import Figures, run_interleaved
from pipelines.crops import CropRecipe, draw_windows
from pipelines.loader import DataRecipe, Loader
from pipelines.order import SampleOrder
from pipelines.photometric import MEAN, STD, PhotometricRecipe
from shards.index import ShardIndex

ROOT = Path(__file__).resolve().parents[1]
CROPS = CropRecipe(global_scale=(0.14, 1.0), local_scale=(0.05, 0.14), locals=6)
NO_AUGMENT = PhotometricRecipe(
    flip=0, jitter=0, grayscale=0, blur_global_1=0, blur_global_2=0, blur_locals=0, solarize_global_2=0
)
ALONE = ", crops alone"
UNITS = {"images": "img/s", "images a core": "img/s", "busy cores": "cores", "first batch": "s", "memory": "MB"}
UNITS |= {"parity": "levels"}
PARITY_IMAGES = 32
MEMORY_BATCHES = 4
LAST_LINES = 20  # of the output of an arm that failed


@dataclass(frozen=True)
class Setup:
    """What every arm is given."""

    index: ShardIndex
    """the shards"""
    images: Path
    """folder with the same samples as files in class folders"""
    batch: int
    """images in a batch"""
    cores: int
    """CPU cores that an arm may use"""


@dataclass(frozen=True)
class Arm:
    """A loader under measurement."""

    batches: Callable[[Setup, PhotometricRecipe], Iterator[Views]]
    """yields batches without end"""
    parity: Callable[[Setup], float]
    """returns the parity to Pillow in levels"""


@dataclass(frozen=True)
class LoaderKind:
    """How one of our loaders is built."""

    data: DataRecipe
    """where and by which library it decodes"""
    device: str
    """cpu or cuda: where it augments, and leaves its batches"""


def find_arms() -> dict[str, Arm]:
    """Return all arms that run on this machine by name, ours first."""
    arms = {name: Arm(partial(load_ours, kind), partial(our_parity, kind)) for name, kind in find_our_kinds().items()}
    for name, peer in find_peers().items():
        arms[name] = Arm(partial(load_theirs, peer), partial(their_parity, peer))
    return arms


def find_our_kinds() -> dict[str, LoaderKind]:
    """Return our loaders that run on this machine.

    "hybrid" ones decode and crop on the CPU and augment on the GPU, and "dali-split" decodes on the CPU alone.
    """
    gpu, dali = torch.cuda.is_available(), is_installed("nvidia.dali")
    dali_cpu, dali_gpu = (DataRecipe(decode="dali", decode_device=device) for device in ("cpu", "gpu"))
    kinds = {"torch": LoaderKind(DataRecipe(decode="torch"), "cpu")}
    if dali:
        kinds["dali-cpu"] = LoaderKind(dali_cpu, "cpu")
    if gpu:
        kinds["hybrid, torch"] = LoaderKind(DataRecipe(decode="torch", decode_device="cpu"), "cuda")
    if dali and gpu:
        kinds["hybrid, dali"] = LoaderKind(dali_cpu, "cuda")
        kinds["dali-split"] = LoaderKind(DataRecipe(decode="dali", decode_device="split"), "cuda")
        kinds["dali-gpu"] = LoaderKind(dali_gpu, "cuda")
    return kinds


# Ours


def build_ours(kind: LoaderKind, setup: Setup, augment: PhotometricRecipe) -> Loader:
    """Build our loader with a thread for each core."""
    torch.set_num_threads(setup.cores)
    return Loader(
        setup.index,
        replace(kind.data, threads=setup.cores),
        CROPS,
        augment,
        batch=setup.batch,
        seed=0,
        device=torch.device(kind.device),
        dtype=torch.bfloat16 if kind.device == "cuda" else torch.float32,
    )


def load_ours(kind: LoaderKind, setup: Setup, augment: PhotometricRecipe) -> Iterator[Views]:
    """Yield batches of our loader."""
    for batch in build_ours(kind, setup, augment).batches(0, 10**9):
        assert batch.locals is not None
        yield [batch.globals, batch.locals]


def our_parity(kind: LoaderKind, setup: Setup) -> float:
    """Return the parity of our loader's first batch."""
    count = count_parity_images(setup)
    [batch] = build_ours(kind, replace(setup, batch=count), NO_AUGMENT).batches(0, 1)
    assert batch.locals is not None
    views = [*batch.globals.split(count), *batch.locals.split(count)]
    return measure_parity(setup, lambda view, place, *_: to_levels(views[view][place]))


def to_levels(image: Tensor) -> Levels:
    """Turn a normalized image [3, S, S] back into 8-bit levels [S, S, 3]."""
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    return (image.permute(1, 2, 0).float().cpu() * std + mean).mul(255).round().clamp(0, 255).byte().numpy()


# The others


def load_theirs(peer: Peer, setup: Setup, augment: PhotometricRecipe) -> Iterator[Views]:
    """Yield batches of another loader."""
    torch.set_num_threads(1)  # it has a worker for each core
    return peer.batches(setup.images, CROPS, augment, setup.batch, setup.cores)


def their_parity(peer: Peer, setup: Setup) -> float:
    """Return the parity of another loader's decoder and resize."""
    return measure_parity(setup, lambda view, place, sample, window, size: peer.crop(sample, window, size))


# Figures


def measure_parity(setup: Setup, crop: Callable[[int, int, bytes, Window, int], Levels]) -> float:
    """Return the mean absolute difference to Pillow's crops, in levels, over all crops of our first step's images.

    `crop` returns a crop from (view, place in the batch, encoded image, window, side).
    """
    index = setup.index
    ids = SampleOrder(len(index), count_parity_images(setup), seed=0).ids(0)
    windows = draw_windows(CROPS, 0, 0, ids, index.heights[ids], index.widths[ids])
    differences = []
    for place, sample in enumerate(index.read(ids)):
        for view, size in enumerate(CROPS.sizes):
            top, left, height, width = windows[view, place].tolist()
            window = (top, left, height, width)
            exact = crop_pillow(sample, window, size).astype(np.int16)
            differences.append(float(np.abs(crop(view, place, sample, window, size) - exact).mean()))
    return float(np.mean(differences))


def count_parity_images(setup: Setup) -> int:
    """Return how many images the parity is measured on."""
    return min(PARITY_IMAGES, len(setup.index))


def measure_round(arm: Arm, setup: Setup, augment: PhotometricRecipe, seconds: float) -> Figures:
    """Return the figures of one round of an arm. Images are counted for `seconds` seconds."""
    built = read_gpu_clock()
    batches = arm.batches(setup, augment)
    next(batches)
    first = read_gpu_clock() - built
    for _ in range(2 * setup.cores):
        next(batches)
    start, cpu, count = read_gpu_clock(), measure_cpu_seconds(), 0
    while time.perf_counter() - start < seconds:
        next(batches)
        count += setup.batch
    passed = read_gpu_clock() - start
    busy = (measure_cpu_seconds() - cpu) / passed
    rate = count / passed
    memory = max(measure_memory() for _ in zip(range(MEMORY_BATCHES), batches, strict=False))
    figures = {"images": rate, "images a core": rate / setup.cores, "busy cores": busy}
    figures |= {"first batch": first, "memory": memory}
    return figures | ({"parity": arm.parity(setup)} if augment == NO_AUGMENT else {})


def read_gpu_clock() -> float:
    """Return the clock's time in seconds, once all work that was started on the GPU is done.

    A process that has not used the GPU so far does not begin to: that takes a second or more.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_memory() -> float:
    """Return the MB of main memory that this process and its descendants hold.

    A page that n of them share counts 1/n for each, which the kernel calls Pss. So the libraries of forked workers
    count once.
    """
    return sum(read_memory(process) for process in list_family(os.getpid())) / 1e6


def read_memory(process: int) -> int:
    """Return the Pss of a process in bytes."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def measure_cpu_seconds() -> float:
    """Return the seconds of CPU cores that this process and its descendants have used so far."""
    ticks = 0
    for process in list_family(os.getpid()):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()  # the name may hold spaces
        ticks += int(fields[11]) + int(fields[12])  # of the process itself, and of the kernel for it
    return ticks / os.sysconf("SC_CLK_TCK")


def list_family(process: int) -> Iterator[int]:
    """Yield the ids of a process and its descendants."""
    yield process
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from list_family(int(child))


# The command


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="folder that make-shards wrote")
    parser.add_argument("--cores", type=int, default=cores, help="CPU cores that an arm may use (default %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images in a batch (64)")
    parser.add_argument("--seconds", type=float, default=20, help="seconds of a round in which images are counted (20)")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="class folders with the shards' images as files")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="arms to measure; all by default")
    parser.add_argument("--arm", help="run one round of this arm in this process, and print its figures as JSON")
    add_run_arguments(parser, rounds=3)
    return parser.parse_args()


def main() -> None:
    """Compare all arms, or measure one round of --arm."""
    options = parse_arguments()
    limit_cores(options.cores)
    with ShardIndex(options.shards) as index, open_images(index, options.images) as folder:
        if options.arm:
            figures = measure_here(options, Setup(index, Path(folder), options.batch, options.cores))
            if options.json is not None:
                report(make_records("loader", UNITS, {options.arm: [figures]}), options.json)
            print(json.dumps(figures))
        else:
            compare(options, folder)


def measure_here(options: argparse.Namespace, setup: Setup) -> Figures:
    """Return the figures of one round of --arm. Raises SystemExit if this machine does not have that arm."""
    name, arms = options.arm.removesuffix(ALONE), find_arms()
    if name not in arms:
        raise SystemExit(f"--arm {name} is not on this machine. It has: {'; '.join(arms)}")
    augment = NO_AUGMENT if options.arm.endswith(ALONE) else PhotometricRecipe()
    return measure_round(arms[name], setup, augment, options.seconds)


def limit_cores(cores: int) -> None:
    """Let this process, and those that it starts, use only `cores` cores."""
    usable = sorted(os.sched_getaffinity(0))
    if not 1 <= cores <= len(usable):
        raise SystemExit(f"--cores {cores}: expected 1 to {len(usable)}, the number that this process may use")
    os.sched_setaffinity(0, usable[:cores])


def open_images(index: ShardIndex, images: Path | None) -> AbstractContextManager[str]:
    """Return the folder of image files. Without one, the shards are unpacked into a temporary folder."""
    if images is not None:
        return nullcontext(str(images))
    folder = tempfile.TemporaryDirectory()
    unpack(index, Path(folder.name))
    return folder


def compare(options: argparse.Namespace, folder: str) -> None:
    """Run rounds of all arms in turn, and report their records. `folder` has the images as files."""
    print_missing_peers()
    names = options.only or [name + ending for name in find_arms() for ending in ("", ALONE)]
    rounds = run_interleaved(
        {name: partial(measure_in_process, name, options, folder) for name in names},
        options.rounds,
        partial(save_partial, "loader", UNITS, options.json),
    )
    print(f"{options.shards}: 2×224 + 6×96, batches of {options.batch}, {options.cores} cores")
    report(make_records("loader", UNITS, rounds), options.json)


def measure_in_process(name: str, options: argparse.Namespace, folder: str) -> Figures:
    """Return the figures of a round that runs in a process of its own.

    Raises RuntimeError with the end of the process's stderr if it fails.
    """
    call = [sys.executable, "-m", "bench.loader", str(options.shards.resolve()), "--arm", name, "--images", folder]
    call += ["--cores", str(options.cores), "--batch", str(options.batch), "--seconds", str(options.seconds)]
    done = subprocess.run(call, check=False, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-LAST_LINES:]
        output = "\n".join([*last[-1:], *last])  # the last line comes first, since it names the error
        raise RuntimeError(f"status {done.returncode}: {output}")
    sys.stderr.write(done.stderr)
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


if __name__ == "__main__":
    main()
