"""The stages between the shards and the training step, each as an endless generator that does its work alone."""

import contextlib
import os
import sys
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dino_fast.advise.advice import AUGMENT, DALI_CPU, DALI_GPU, DALI_SPLIT, LOADER, MEMORY, STEP, STORAGE, TORCH
from dino_fast.config import Recipe
from dino_fast.distributed import Ranks
from dino_fast.run.build import build_train_step, compile_if_useful
from dino_fast.run.schedules import Schedules
from dino_fast.step.precision import DTYPES, set_up_math
from pipelines.crops import draw_windows
from pipelines.decode_torch import TorchDecoder
from pipelines.decoder import DecodeError, Decoder, DecodeRequest
from pipelines.loader import Loader, count_default_threads
from pipelines.maker import choose_augment
from pipelines.order import ShardOrder
from pipelines.photometric import draw_augment_parameters
from shards.cache.page_cache import read_ahead
from shards.errors import UserError
from shards.index import BadSample, ShardIndex

_REPEATED = 4  # batches of encoded images that are read or decoded over and over

Work = Generator[int, None, None]  # a stage at work; it yields how many images it did since it last yielded


@dataclass(frozen=True)
class RankParts:
    """The parts of one rank of a run."""

    recipe: Recipe
    """recipe of the run"""
    ranks: Ranks
    """this rank among the others"""
    index: ShardIndex
    """shards of the training set"""
    loader: Loader
    """loader of this rank's share of the batches"""

    @property
    def share(self) -> int:
        """Images of a step for this rank."""
        return self.recipe.batch_size // self.ranks.world

    @property
    def threads(self) -> int:
        """CPU threads that decode."""
        return self.recipe.data.threads or count_default_threads()

    @property
    def threads_text(self) -> str:
        """The threads in words, such as "2 CPU threads"."""
        return f"{self.threads} CPU thread{'s' if self.threads > 1 else ''}"


class Stage(NamedTuple):
    """A stage that can be measured."""

    name: str
    """one of the constants in `advice.py`"""
    where: str
    """what it runs on, such as "2 CPU threads" or "cuda:0" """
    work: Work
    """the stage at work"""
    warm_up: int
    """how many items of `work` come before the measurement"""


def make_stages(parts: RankParts) -> Iterator[Stage]:
    """Yield every stage that exists on this machine. A stage must be measured before the next one is asked for."""
    device, threads, prefetch = parts.ranks.device, parts.threads_text, parts.recipe.data.prefetch
    if drop_page_cache(parts.index):
        order = parts.loader.order
        cold = read_whole_shards(parts, order) if isinstance(order, ShardOrder) else read_samples(parts, repeat=False)
        yield Stage(STORAGE, "1 CPU thread", cold, 0)
    yield Stage(MEMORY, "1 CPU thread", read_samples(parts, repeat=True), _REPEATED)
    with ThreadPoolExecutor(parts.threads, "images") as pool:
        yield Stage(TORCH, threads, decode_batches(parts, TorchDecoder(parts.recipe.crops, pool)), 1)
        for name, where, decoder in make_dali_decoders(parts):
            yield Stage(name, where, decode_batches(parts, decoder), 1 + prefetch)
        yield Stage(AUGMENT, str(device) if device.type == "cuda" else threads, augment_batches(parts, pool), 1)
    drop_page_cache(parts.index)
    # The loader's queues fill while it makes the first batch.
    where = threads if device.type == "cpu" else f"{threads}, {device}"
    yield Stage(LOADER, where, load_batches(parts), 1 + prefetch)
    # On a GPU cuDNN tries its algorithms in the first step.
    yield Stage(STEP, str(device), take_steps(parts), 1 if device.type == "cpu" else 3)


# Storage


def drop_page_cache(index: ShardIndex) -> bool:
    """Ask the kernel to drop the shards from memory. Return whether it can be asked."""
    if index.is_remote or index.cache is not None or not hasattr(os, "posix_fadvise"):
        return False
    for shard in index.manifest.shards:
        descriptor = os.open(Path(index.folder) / shard.file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return True


def make_requests(parts: RankParts, steps: Iterable[int]) -> Iterator[DecodeRequest]:
    """Read the samples of these steps and draw their crop windows, as the loader does. Raises UserError."""
    recipe, index, order = parts.recipe, parts.index, parts.loader.order
    for step in steps:
        ids = order.ids(step, parts.ranks.rank, parts.ranks.world)
        try:
            samples = index.read(ids)
        except BadSample as bad:
            raise UserError(f"{bad}. Run `make-shards check {index.folder}`.") from bad
        sizes = index.heights[ids], index.widths[ids]
        yield DecodeRequest(step, ids, samples, draw_windows(recipe.crops, recipe.seed, order.epoch(step), ids, *sizes))


def read_samples(parts: RankParts, *, repeat: bool) -> Work:
    """Read single samples as the run does: those of a few steps over and over, or else those of one epoch once."""
    steps = range(parts.loader.order.steps_per_epoch)
    for request in make_requests(parts, cycle(steps[:_REPEATED]) if repeat else steps):
        yield len(request.ids)


def read_whole_shards(parts: RankParts, order: ShardOrder) -> Work:
    """Read this rank's part of the shards of one epoch, each from its first byte to its last."""
    shards = [shard for window in range(order.windows_per_epoch) for shard in order.shards_in_window(window).tolist()]
    for shard in shards[parts.ranks.rank :: parts.ranks.world] or shards:
        read_ahead(Path(parts.index.folder) / parts.index.manifest.shards[shard].file)
        yield parts.index.manifest.shards[shard].samples


# Decoding, augmentation, the loader, the step


def make_dali_decoders(parts: RankParts) -> Iterator[tuple[str, str, Decoder]]:
    """Yield name, place and decoder of DALI on the CPU, and those that use the GPU if there is one.

    DALI may not be installed.
    """
    try:
        from pipelines.decode_dali import DaliDecoder, choose_hardware_decoder
    except ImportError:
        return
    crops, data, device = parts.recipe.crops, parts.recipe.data, parts.ranks.device
    settings = (parts.threads, data.prefetch)
    yield DALI_CPU, parts.threads_text, DaliDecoder(crops, parts.share, torch.device("cpu"), *settings)
    if device.type == "cuda":
        hardware = choose_hardware_decoder(data.hw_decoder_load, data.preallocate_size, parts.threads, parts.index)
        where = f"{parts.threads_text}, {device}"
        yield DALI_SPLIT, where, DaliDecoder(crops, parts.share, device, *settings)
        yield DALI_GPU, where, DaliDecoder(crops, parts.share, device, *settings, hardware)


def decode_batches(parts: RankParts, decoder: Decoder) -> Work:
    """Decode and crop a few batches over and over. Raises UserError for an image that does not decode."""
    requests = list(make_requests(parts, range(min(_REPEATED, parts.loader.order.steps_per_epoch))))
    for request, crops in decoder.decode_requests(cycle(requests)):
        if isinstance(crops, DecodeError):
            raise UserError(f"an image does not decode ({crops}). Run `make-shards check {parts.index.folder}`.")
        yield len(request.ids)


def augment_batches(parts: RankParts, pool: ThreadPoolExecutor) -> Work:
    """Augment random crops that lie on the device."""
    recipe, device = parts.recipe, parts.ranks.device
    augment, _ = choose_augment(device, recipe.data.normalization)
    crops = [
        torch.randint(256, (parts.share, views.stop - views.start, size, size, 3), dtype=torch.uint8, device=device)
        for size, views in recipe.crops.resolutions
    ]
    for epoch in count():
        ids = np.arange(parts.share)
        parameters = draw_augment_parameters(recipe.augment, recipe.seed, epoch, ids, recipe.crops.views)
        outs = _allocate_views(parts)  # new memory for each batch, as in the loader
        for (_, views), images, out in zip(recipe.crops.resolutions, crops, outs, strict=True):
            augment(images, parameters[views], out, pool)
        yield parts.share


def load_batches(parts: RankParts) -> Work:
    """Let the loader of the recipe make batches."""
    with contextlib.closing(parts.loader.batches(0, sys.maxsize)) as batches:
        for batch in batches:
            yield len(batch.ids)


def take_steps(parts: RankParts) -> Work:
    """Take the recipe's training step on one random batch. The networks are thrown away."""
    recipe = parts.recipe
    set_up_math(recipe.precision, parts.ranks.device)  # this and the next two lines as in train
    step = build_train_step(recipe, parts.ranks)
    compile_if_useful(recipe, parts.ranks, step)
    hyper = Schedules(recipe, parts.loader.order.steps_per_epoch).at(0)
    globals_, *locals_ = (views.normal_() for views in _allocate_views(parts))
    while True:
        step(globals_, locals_[0] if locals_ else None, hyper)
        yield parts.share


def _allocate_views(parts: RankParts) -> list[torch.Tensor]:
    """Allocate a batch on the device: [V·B, 3, S, S] for each resolution, channels-last."""
    dtype, device, crops = DTYPES[parts.recipe.precision], parts.ranks.device, parts.recipe.crops
    shapes = [(parts.share * (views.stop - views.start), 3, size, size) for size, views in crops.resolutions]
    return [torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last) for shape in shapes]
