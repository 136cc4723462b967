"""The stages between the shards and the step, each as an endless generator that does its work alone."""

import contextlib
import os
import sys
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, cycle
from pathlib import Path

import numpy as np
import torch

from dino_fast.advise.verdict import AUGMENT, COLD, DALI_CPU, DALI_GPU, LOADER, STEP, TORCH, WARM
from dino_fast.config import Recipe
from dino_fast.distributed import Ranks
from dino_fast.run.schedules import Schedules
from dino_fast.train import DTYPES, build_step, compile_step, set_up_math
from pipelines.crops import windows
from pipelines.decode_torch import TorchDecoder
from pipelines.loader import Loader, augment_kernel, default_threads
from pipelines.order import ShardOrder
from pipelines.photometric import draw_colours
from pipelines.request import Decoder, Request, Undecodable
from shards.cache import readahead
from shards.errors import UserError
from shards.index import BadSample, ShardIndex

_HELD = 4  # batches of compressed pictures that are read or decoded over and over

Work = Generator[int, None, None]  # a stage at work: yields the images done since it last yielded


@dataclass(frozen=True)
class Run:
    """What one rank of a run is made of."""

    recipe: Recipe
    ranks: Ranks
    index: ShardIndex
    loader: Loader

    @property
    def share(self) -> int:
        """Images of a step for this rank."""
        return self.recipe.batch_size // self.ranks.world

    @property
    def threads(self) -> int:
        return self.recipe.data.threads or default_threads()

    @property
    def threads_named(self) -> str:
        return f"{self.threads} CPU thread{'s' if self.threads > 1 else ''}"


def stages(run: Run) -> Iterator[tuple[str, str, Work, int]]:
    """Every stage there is on this machine, where it runs, and how many of its items warm it up."""
    device, threads = run.ranks.device, run.threads_named
    if drop_page_cache(run.index):
        cold = whole_shards(run, run.loader.order) if isinstance(run.loader.order, ShardOrder) else reads(run, False)
        yield COLD, "1 CPU thread", cold, 0
    yield WARM, "1 CPU thread", reads(run, True), _HELD
    with ThreadPoolExecutor(run.threads, "pictures") as pool:
        yield TORCH, threads, decodes(run, TorchDecoder(run.recipe.crops, pool)), 1
        for stage, where, decoder in dali_decoders(run):
            yield stage, where, decodes(run, decoder), 1 + run.recipe.data.prefetch
        yield AUGMENT, str(device) if device.type == "cuda" else threads, augments(run, pool), 1
    drop_page_cache(run.index)
    # The queues fill while the first batch is made.
    yield LOADER, threads if device.type == "cpu" else f"{threads}, {device}", loads(run), 1 + run.recipe.data.prefetch
    yield STEP, str(device), steps(run), 1 if device.type == "cpu" else 3  # cuDNN tries its ways in the first


# Storage


def drop_page_cache(index: ShardIndex) -> bool:
    """Ask the kernel to forget the shards; whether it can be asked."""
    if index.remote or index.cache is not None or not hasattr(os, "posix_fadvise"):
        return False
    for shard in index.manifest.shards:
        descriptor = os.open(Path(index.folder) / shard.file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return True


def requests(run: Run, steps: Iterable[int]) -> Iterator[Request]:
    """What the loader's reader makes for these steps. Raises UserError for a bad sample."""
    recipe, index, order = run.recipe, run.index, run.loader.order
    for step in steps:
        ids = order.ids(step, run.ranks.rank, run.ranks.world)
        try:
            samples = index.read(ids)
        except BadSample as bad:
            raise UserError(f"{bad}; run `make-shards check {index.folder}`") from bad
        places = windows(recipe.crops, recipe.seed, order.epoch(step), ids, index.heights[ids], index.widths[ids])
        yield Request(step, ids, samples, places)


def reads(run: Run, again: bool) -> Work:
    """Single samples as the run reads them: those of one epoch once, or those of a few steps over and over."""
    steps = range(run.loader.order.steps_per_epoch)
    for request in requests(run, cycle(steps[:_HELD]) if again else steps):
        yield len(request.ids)


def whole_shards(run: Run, order: ShardOrder) -> Work:
    """This rank's part of the shards of one epoch, from end to end."""
    shards = [shard for window in range(order.windows_per_epoch) for shard in order.shards_of(window).tolist()]
    for shard in shards[run.ranks.rank :: run.ranks.world] or shards:
        readahead(Path(run.index.folder) / run.index.manifest.shards[shard].file)
        yield run.index.manifest.shards[shard].samples


# Decoding, colours, the loader, the step


def dali_decoders(run: Run) -> Iterator[tuple[str, str, Decoder]]:
    """DALI on the CPU, and on the GPU where there is one; none where it is not installed."""
    try:
        from pipelines.decode_dali import DaliDecoder, hardware_of
    except ImportError:
        return
    data, threads, device = run.recipe.data, run.threads_named, run.ranks.device
    common = (run.threads, data.prefetch)
    yield DALI_CPU, threads, DaliDecoder(run.recipe.crops, run.share, torch.device("cpu"), *common)
    if device.type == "cuda":
        hardware = hardware_of(data.hw_decoder_load, data.size_hint, run.threads, run.index)
        yield DALI_GPU, f"{threads}, {device}", DaliDecoder(run.recipe.crops, run.share, device, *common, hardware)


def decodes(run: Run, decoder: Decoder) -> Work:
    """Decode and crop a few batches over and over. Raises UserError for a picture that does not decode."""
    held = list(requests(run, range(min(_HELD, run.loader.order.steps_per_epoch))))
    for request, crops in decoder.stream(cycle(held)):
        if isinstance(crops, Undecodable):
            raise UserError(f"a picture does not decode ({crops}); run `make-shards check {run.index.folder}`")
        yield len(request.ids)


def augments(run: Run, pool: ThreadPoolExecutor) -> Work:
    """Colours for random crops that lie on the device."""
    recipe, device = run.recipe, run.ranks.device
    augment, _ = augment_kernel(device)
    crops = [
        torch.randint(256, (run.share, views.stop - views.start, size, size, 3), dtype=torch.uint8, device=device)
        for size, views in recipe.crops.resolutions
    ]
    for epoch in count():
        colours = draw_colours(recipe.augment, recipe.seed, epoch, np.arange(run.share), recipe.crops.views)
        outs = _empty_views(run)  # new ones for each batch, as in the loader
        for (_, views), pictures, out in zip(recipe.crops.resolutions, crops, outs, strict=True):
            augment(pictures, colours[views], out, pool)
        yield run.share


def loads(run: Run) -> Work:
    """All of it, as the recipe has it."""
    with contextlib.closing(run.loader.batches(0, sys.maxsize)) as batches:
        for batch in batches:
            yield len(batch.ids)


def steps(run: Run) -> Work:
    """The recipe's training step on one random batch, with networks that are thrown away."""
    recipe = run.recipe
    set_up_math(recipe.precision, run.ranks.device)  # this and what follows as in train
    step = build_step(recipe, run.ranks)
    compile_step(recipe, run.ranks, step)
    at = Schedules(recipe, run.loader.order.steps_per_epoch).at(0)
    globals_, *locals_ = (views.normal_() for views in _empty_views(run))
    while True:
        step(globals_, locals_[0] if locals_ else None, at)
        yield run.share


def _empty_views(run: Run) -> list[torch.Tensor]:
    """Room for a batch: [V·B, 3, S, S] a resolution, channels-last, on the device."""
    dtype, device = DTYPES[run.recipe.precision], run.ranks.device
    shapes = [(run.share * (views.stop - views.start), 3, size, size) for size, views in run.recipe.crops.resolutions]
    return [torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last) for shape in shapes]
