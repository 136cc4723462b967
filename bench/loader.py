"""How fast the loader makes batches, without a step that takes them, beside other people's loaders.

    python -m bench.loader SHARDS [--cores 2] [--batch 64] [--seconds 20] [--rounds 3] [--only ARM ...]
                           [--json bench/results/X.jsonl]

Every arm makes 2×224 + 6×96 crops of the same pictures on the same cores, with the published colours and without any
("crops alone"). A round of an arm is a process of its own that can use no other cores; arms on the CPU leave their
batches there. An arm whose process fails is left out, and the end of what it said goes to stderr. `--arm ARM` measures
one round of one arm in this process. The figures of a round:

- images: pictures a second, counted after 2 batches a core, so that workers no longer march in step;
- images a core: the same over the cores;
- first batch: seconds from building the loader to its first batch; what is imported before is not counted;
- memory: MB of the process and its children after the measurement, pages that they share counted once;
- parity (crops alone): mean difference in 8-bit levels to Pillow's decode, crop and bicubic resize of the same windows:
  for ours of its batches, for the others of their decoder and resampler, since they draw windows of their own. How far
  their colours are from torchvision's is not measured here.

The other loaders read files: the shards are unpacked once into a temporary folder, or --pictures names one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.peers import Levels, Peer, Views, available, installed, left_out, pillow_crop, unpack
from bench.timing import interleaved, keep_records, records, report
from pipelines.crops import CropRecipe, windows
from pipelines.loader import DataRecipe, Loader
from pipelines.order import Order
from pipelines.photometric import MEAN, STD, PhotometricRecipe
from shards.index import ShardIndex

ROOT = Path(__file__).resolve().parents[1]
CROPS = CropRecipe(global_scale=(0.14, 1.0), local_scale=(0.05, 0.14), locals=6)
NO_COLOURS = PhotometricRecipe(
    flip=0, jitter=0, grey=0, blur_global_1=0, blur_global_2=0, blur_locals=0, solarize_global_2=0
)
ALONE = ", crops alone"
UNITS = {"images": "img/s", "images a core": "img/s", "first batch": "s", "memory": "MB", "parity": "levels"}
PARITY_PICTURES = 32
MEMORY_BATCHES = 4
LAST_LINES = 20  # of what a failed arm said

Figures = dict[str, float]  # by the names of UNITS


@dataclass(frozen=True)
class Setting:
    """What every arm is given."""

    index: ShardIndex
    pictures: Path  # the index's samples as files in class folders
    batch: int
    cores: int


@dataclass(frozen=True)
class Arm:
    """A loader under measurement."""

    batches: Callable[[Setting, PhotometricRecipe], Iterator[Views]]
    parity: Callable[[Setting], float]


def arms() -> dict[str, Arm]:
    """All that run on this machine, by name: ours first."""
    kinds = {"torch": (DataRecipe(decode="torch"), "cpu")}
    dali_cpu, dali_gpu = (DataRecipe(decode="dali", decode_device=device) for device in ("cpu", "gpu"))
    if installed("nvidia.dali"):
        kinds["dali-cpu"] = (dali_cpu, "cpu")
    if torch.cuda.is_available():
        kinds["hybrid, torch"] = (DataRecipe(decode="torch", decode_device="cpu"), "cuda")
    if installed("nvidia.dali") and torch.cuda.is_available():
        kinds["hybrid, dali"] = (dali_cpu, "cuda")  # decoded on the CPU, augmented on the GPU
        kinds["dali-gpu"] = (dali_gpu, "cuda")
    found = {name: Arm(partial(our_batches, kind), partial(our_parity, kind)) for name, kind in kinds.items()}
    for name, peer in available().items():
        found[name] = Arm(partial(their_batches, peer), partial(their_parity, peer))
    return found


# Ours


def our_loader(kind: tuple[DataRecipe, str], setting: Setting, colours: PhotometricRecipe) -> Loader:
    data, device = kind
    torch.set_num_threads(setting.cores)
    return Loader(
        setting.index,
        replace(data, threads=setting.cores),
        CROPS,
        colours,
        batch=setting.batch,
        seed=0,
        device=torch.device(device),
        dtype=torch.bfloat16 if device == "cuda" else torch.float32,
    )


def our_batches(kind: tuple[DataRecipe, str], setting: Setting, colours: PhotometricRecipe) -> Iterator[Views]:
    for made in our_loader(kind, setting, colours).batches(0, 10**9):
        assert made.locals is not None
        yield [made.globals, made.locals]


def our_parity(kind: tuple[DataRecipe, str], setting: Setting) -> float:
    count = parity_count(setting)
    [made] = our_loader(kind, replace(setting, batch=count), NO_COLOURS).batches(0, 1)
    assert made.locals is not None
    views = [*made.globals.split(count), *made.locals.split(count)]
    return parity(setting, lambda view, place, *_: levels(views[view][place]))


def levels(picture: Tensor) -> Levels:
    """Normalised [3, S, S] back to 8-bit levels [S, S, 3]."""
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    return (picture.permute(1, 2, 0).float().cpu() * std + mean).mul(255).round().clamp(0, 255).byte().numpy()


# The others


def their_batches(peer: Peer, setting: Setting, colours: PhotometricRecipe) -> Iterator[Views]:
    torch.set_num_threads(1)  # theirs are workers, one a core
    return peer.batches(setting.pictures, CROPS, colours, setting.batch, setting.cores)


def their_parity(peer: Peer, setting: Setting) -> float:
    return parity(setting, lambda view, place, sample, window, size: peer.crop(sample, window, size))


# Figures


def parity(setting: Setting, crop: Callable[[int, int, bytes, tuple[int, int, int, int], int], Levels]) -> float:
    """Mean absolute difference, in levels, of crop(view, place, sample, window, side) to Pillow's, over all crops of
    the pictures of our step 0."""
    index = setting.index
    ids = Order(len(index), parity_count(setting), seed=0).ids(0)
    places = windows(CROPS, 0, 0, ids, index.heights[ids], index.widths[ids])
    apart = []
    for place, sample in enumerate(index.read(ids)):
        for view, size in enumerate(CROPS.sizes):
            top, left, height, width = places[view, place].tolist()
            window = (top, left, height, width)
            exact = pillow_crop(sample, window, size).astype(np.int16)
            apart.append(float(np.abs(crop(view, place, sample, window, size) - exact).mean()))
    return float(np.mean(apart))


def parity_count(setting: Setting) -> int:
    """How many pictures parity looks at."""
    return min(PARITY_PICTURES, len(setting.index))


def measure(arm: Arm, setting: Setting, colours: PhotometricRecipe, seconds: float) -> Figures:
    """One round of an arm; `seconds` are those in which pictures are counted."""
    began = time.perf_counter()
    batches = arm.batches(setting, colours)
    next(batches)
    first = now() - began
    for _ in range(2 * setting.cores):
        next(batches)
    start, count = now(), 0
    while time.perf_counter() - start < seconds:
        next(batches)
        count += setting.batch
    rate = count / (now() - start)
    held = [memory() for _ in zip(range(MEMORY_BATCHES), batches, strict=False)]
    figures = {"images": rate, "images a core": rate / setting.cores, "first batch": first, "memory": max(held)}
    return figures | ({"parity": arm.parity(setting)} if colours == NO_COLOURS else {})


def now() -> float:
    """Seconds, when all that was begun on the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def memory() -> float:
    """MB of main memory that this process and its descendants hold: a page that n of them share counts 1/n for each
    (the kernel's Pss), so that the libraries of forked workers count once."""
    return sum(proportional_set(process) for process in family(os.getpid())) / 1e6


def proportional_set(process: int) -> int:
    """Bytes."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def family(process: int) -> Iterator[int]:
    """The ids of a process and its descendants."""
    yield process
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from family(int(child))


# The run


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=Path, help="the shards' pictures as files in class folders")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="the arms to run; all by default")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--arm", help="run one round of this arm here, and print its figures as JSON; --json keeps them"
    )
    return parser.parse_args()


def main() -> None:
    options = arguments()
    keep_to(options.cores)
    with ShardIndex(options.shards) as index, folder_of(index, options.pictures) as folder:
        if options.arm:
            figures = one_here(options, Setting(index, Path(folder), options.batch, options.cores))
            if options.json is not None:
                report(records("loader", UNITS, {options.arm: [figures]}), options.json)
            print(json.dumps(figures))
        else:
            compare(options, folder)


def one_here(options: argparse.Namespace, setting: Setting) -> Figures:
    """The figures of one round of --arm. Raises SystemExit where there is no such arm on this machine."""
    name, found = options.arm.removesuffix(ALONE), arms()
    if name not in found:
        raise SystemExit(f"--arm {name}: not on this machine, which has: {'; '.join(found)}")
    colours = NO_COLOURS if options.arm.endswith(ALONE) else PhotometricRecipe()
    return measure(found[name], setting, colours, options.seconds)


def keep_to(cores: int) -> None:
    """Let this process and those that it starts use no more than `cores` of the machine's."""
    mine = sorted(os.sched_getaffinity(0))
    if not 1 <= cores <= len(mine):
        raise SystemExit(f"--cores {cores}: this process may use {len(mine)}")
    os.sched_setaffinity(0, mine[:cores])


def folder_of(index: ShardIndex, pictures: Path | None) -> "nullcontext[str] | tempfile.TemporaryDirectory[str]":
    """The folder of files, unpacked from the shards where none was named."""
    if pictures is not None:
        return nullcontext(str(pictures))
    folder = tempfile.TemporaryDirectory()
    unpack(index, Path(folder.name))
    return folder


def compare(options: argparse.Namespace, folder: str) -> None:
    """Rounds of all arms in turn, and their records."""
    for line in left_out():
        print(line)
    names = options.only or [name + ending for name in arms() for ending in ("", ALONE)]
    rounds = interleaved(
        {name: partial(one_round, name, options, folder) for name in names},
        options.rounds,
        partial(keep_records, "loader", UNITS, options.json),
    )
    print(f"{options.shards}: 2×224 + 6×96, batches of {options.batch}, {options.cores} cores")
    report(records("loader", UNITS, rounds), options.json)


def one_round(name: str, options: argparse.Namespace, folder: str) -> Figures:
    """The figures of an arm from a process of its own. Raises RuntimeError with the end of its stderr if it fails."""
    call = [sys.executable, "-m", "bench.loader", str(options.shards.resolve()), "--arm", name, "--pictures", folder]
    call += ["--cores", str(options.cores), "--batch", str(options.batch), "--seconds", str(options.seconds)]
    done = subprocess.run(call, check=False, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-LAST_LINES:]
        said = "\n".join([*last[-1:], *last])  # its last line first: that one names the error
        raise RuntimeError(f"status {done.returncode}: {said}")
    sys.stderr.write(done.stderr)
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


if __name__ == "__main__":
    main()
