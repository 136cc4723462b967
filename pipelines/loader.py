"""Load training batches from a shard index: read, decode, crop and augment, ahead of the training step.

Two threads work ahead. One reads encoded images and draws crop windows. The other decodes, crops and augments. Which
images a batch holds, and which windows of them, depends only on the index, the recipe, the seed, the step, the rank and
the number of ranks: not on the decoder, nor on the step at which a run starts.
"""

import contextlib
import os
from collections.abc import Generator, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import Ge, Le

from pipelines.batch import Batch
from pipelines.crops import CropRecipe
from pipelines.decode_torch import TorchDecoder
from pipelines.decoder import Decoder, DecodeRequest
from pipelines.fetch import Fetcher, choose_cache
from pipelines.maker import BatchMaker, choose_augment
from pipelines.order import Order, SampleOrder, ShardOrder
from pipelines.photometric import MEAN, STD, Normalization, PerChannel, PhotometricRecipe
from pipelines.prefetch import Prefetcher
from pipelines.reader import SampleReader
from pipelines.stall import StallClock
from shards.cache.interface import Cache
from shards.cache.shard_cache import CACHE_BYTES
from shards.errors import UserError
from shards.index import ShardIndex

# The stages have different timeouts, so that the error names the stage that is stuck. The first to time out is the
# fetching of shards, after `timeout` seconds.
_READ_SECONDS = 5  # added to `timeout`: to read a request whose shards have been fetched
_MAKE_SECONDS = 60  # added to `timeout`: to make a batch whose images have been read
# With this many CPU threads for a GPU they decode more images than the GPU does beside a training step: on an H200 with
# 16, the step kept 0.96 of its speed when they decoded, and 0.81 when the GPU did (bench/LOG.md).
SPLIT_THREADS = 8
_IN_USE = 3  # batches beside those in the queue: at the step, just released by the step, and being made


@dataclass(frozen=True)
class DataRecipe:
    """Where the images are and how they are read."""

    train: str = "data/train"
    """folder that make-shards wrote"""
    order: Literal["global", "shards"] = "global"
    """global: shuffle all samples in each epoch; shards: shuffle the shards, and the samples of `shuffle_window` shards
    at a time, so that each shard is read once from end to end, for slow disks and object stores"""
    shuffle_window: Annotated[int, Ge(1)] = 8
    """number of shards whose samples are shuffled together; only with order: shards"""
    cache: str = ""
    """folder on this machine for whole copies of the shards, fetched ahead of use: for object stores; empty for none"""
    cache_bytes: Annotated[int, Ge(1)] = CACHE_BYTES
    """most bytes of shards in the cache"""
    decode: Literal["auto", "dali", "torch"] = "auto"
    """library that decodes and crops; auto: DALI on a GPU; on a CPU torch, which is faster there"""
    decode_device: Literal["auto", "gpu", "split", "cpu"] = "auto"
    """where images are decoded and cropped; split: CPU threads decode, and the GPU crops; auto: cpu if there is no GPU,
    or torch decodes; else gpu with fewer than 8 threads, and split with more. A run on a GPU always augments there"""
    threads: Annotated[int, Ge(0), Le(512)] = 0
    """CPU threads that decode, for each rank; 0: the machine's cores divided by its ranks"""
    prefetch: Annotated[int, Ge(1), Le(64)] = 2
    """length of each queue: requests read ahead, batches being decoded, and batches ready for the step"""
    max_bad_samples: Annotated[int, Ge(0)] = 100
    """unreadable samples that each rank replaces before it stops the run"""
    timeout: Annotated[int, Ge(1)] = 300
    """seconds without data from storage, or without a batch, after which the run stops"""
    hw_decoder_load: Annotated[float, Ge(-1), Le(1)] = -1.0
    """share of the images that the GPU's JPEG engines decode; its cores and the CPU threads decode the others; -1:
    choose by the number of threads. Only with decode_device: gpu"""
    preallocate_size: Annotated[int, Ge(0)] = 0
    """side in pixels of the images for which the GPU's decoder allocates memory at the start; 0: enough for 99 of 100
    images"""
    mean: PerChannel = MEAN
    """what is subtracted from red, green and blue, where black is 0 and white is 1; the default is ImageNet's; of your
    own images `make-shards stats` measures it"""
    std: PerChannel = STD
    """what red, green and blue are divided by after that, above 0; measured likewise"""

    @property
    def normalization(self) -> Normalization:
        """`mean` and `std`."""
        return Normalization(self.mean, self.std)


def open_index(data: DataRecipe) -> ShardIndex:
    """Open the index of the recipe's folder. Raises UserError if it is not a finished folder of shards."""
    return ShardIndex(data.train, data.cache or None, data.cache_bytes)


@dataclass(frozen=True)
class LoaderFigures:
    """What a loader did in some part of a run."""

    stall: float
    """seconds for which the step waited for batches"""
    read_bytes: int
    """bytes of encoded images that were read"""
    requests_ready: float
    """mean number of requests that were ready when the decoder asked for the next, up to `prefetch`"""
    batches_ready: float
    """mean number of batches that were ready when the step asked for the next, up to `prefetch`"""


class _Totals(NamedTuple):
    """What a loader did since it was built. The queues count since `batches` was called last."""

    stall: float
    """seconds"""
    read_bytes: int
    """bytes"""
    queues: list[tuple[int, int]]
    """for requests and for batches: items taken, and the queue's lengths at these moments, summed"""


_EMPTY_QUEUES = [(0, 0), (0, 0)]


class DecoderChoice(NamedTuple):
    """Which decoder a run uses."""

    dali: bool
    """whether DALI decodes, or else torch"""
    device: torch.device
    """where images are cropped"""
    on_gpu: bool
    """whether images are decoded on a GPU, too"""


class Loader:
    """Loads batches of `batch // world` images for a rank, in the asked dtype, on the device.

    `notes` are lines for the user that say what makes this loader slower than it could be.
    """

    def __init__(
        self,
        index: ShardIndex,
        data: DataRecipe,
        crops: CropRecipe,
        augment: PhotometricRecipe,
        *,
        batch: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """`batch` counts the images of all `world` ranks. Raises UserError for settings that do not fit together."""
        check_batch(index, batch, world)
        self._index, self._data, self._crops, self._share = index, data, crops, batch // world
        self._device = name_current_gpu(device)
        self._threads = data.threads or count_default_threads()
        self._choice = choose_decoder(data, self._device, self._threads)
        self.order = build_order(index, data, batch, seed)
        self._cache = choose_rank_cache(index, self.order)
        self._fetcher: Fetcher | None = None
        validate = needs_validation(index, self._choice)
        self._reader = SampleReader(index, self.order, crops, rank, world, data.max_bad_samples, validate)
        augment_function, notes = choose_augment(self._device, data.normalization)
        self.notes = [*notes, *list_slow_settings(index, data, self._choice)]
        spare = data.prefetch + _IN_USE
        self._maker = BatchMaker(self._reader, self.order, crops, augment, augment_function, self._device, dtype, spare)
        self._stall = StallClock(self._device)
        self._prefetchers: list[Prefetcher[Any]] = []
        self._last = _Totals(0.0, 0, _EMPTY_QUEUES)  # when `read_figures` was last called

    @property
    def bad_samples(self) -> dict[int, str]:
        """Reports of the samples that had to be replaced, one line each, by sample id."""
        return self._reader.bad_samples

    def batches(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """Yield the batches of steps start … stop − 1. Each stays valid while it is held. Close it to stop early."""
        depth, timeout = self._data.prefetch, self._data.timeout
        read_timeout = timeout + (_READ_SECONDS if isinstance(self.order, ShardOrder) else 0)
        make_timeout, progress = timeout + _MAKE_SECONDS, self._last_progress
        with (
            Prefetcher(self._read_requests(start, stop), depth, "reading shards", read_timeout, progress) as requests,
            Prefetcher(self._make_batches(requests), depth, "making batches", make_timeout, progress) as made,
        ):
            self._prefetchers = [requests, made]
            self._last = self._last._replace(queues=_EMPTY_QUEUES)
            try:
                while True:
                    self._stall.start_wait()
                    batch = next(made, None)
                    if batch is None:
                        return
                    batch.hand_over(self._device)
                    self._stall.end_wait()
                    yield batch
            finally:
                requests.stop()  # the thread that makes batches may be waiting for a request

    def read_figures(self) -> LoaderFigures:
        """Return what happened since this was last called."""
        queues = [(prefetcher.taken, prefetcher.queued) for prefetcher in self._prefetchers]
        now, last = _Totals(self._stall.read_seconds(), self._reader.read_bytes, queues), self._last
        self._last = now
        ready = [
            (queued - last_queued) / max(1, taken - last_taken)
            for (last_taken, last_queued), (taken, queued) in zip(last.queues, now.queues, strict=False)
        ]
        return LoaderFigures(now.stall - last.stall, now.read_bytes - last.read_bytes, *(ready or (0.0, 0.0)))

    def _read_requests(self, start: int, stop: int) -> Iterator[DecodeRequest]:
        with self._open_fetcher() as fetcher, ThreadPoolExecutor(self._threads, "validating") as pool:
            self._fetcher = fetcher
            for step in range(start, stop):
                if fetcher is not None:
                    fetcher.wait_for(step)
                yield self._reader.read_step(step, pool)

    def _open_fetcher(self) -> contextlib.AbstractContextManager[Fetcher | None]:
        """Return what fetches whole shards ahead of use, if the order goes by shards."""
        if self._cache is None or not isinstance(self.order, ShardOrder):
            return contextlib.nullcontext()
        return Fetcher(self.order, self._cache, timeout=self._data.timeout)

    def _last_progress(self) -> float:
        """Return when the last shard was fetched, by time.monotonic."""
        return 0.0 if self._fetcher is None else self._fetcher.progress

    def _make_batches(self, requests: Iterator[DecodeRequest]) -> Iterator[Batch]:
        """Yield the batch of each request. On a GPU all work goes to a stream of its own."""
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(self._device)
        stream = torch.cuda.stream(torch.cuda.Stream(self._device)) if on_gpu else contextlib.nullcontext()
        with stream, ThreadPoolExecutor(self._threads, "decoding") as pool:
            yield from self._maker.make_batches(requests, self._build_decoder(pool), pool)

    def _build_decoder(self, pool: Executor) -> Decoder:
        """Build the decoder that was chosen. Raises UserError if DALI does not import."""
        if not self._choice.dali:
            return TorchDecoder(self._crops, pool, pin_memory=self._device.type == "cuda")
        try:
            from pipelines.decode_dali import DaliDecoder, choose_hardware_decoder
        except ImportError as error:
            raise UserError(
                f"DALI does not import ({error}). Run pip install -e '.[dali]', or pass --data.decode torch"
            ) from error
        data, device, hardware = self._data, self._choice.device, None
        if self._choice.on_gpu:
            hardware = choose_hardware_decoder(data.hw_decoder_load, data.preallocate_size, self._threads, self._index)
        return DaliDecoder(self._crops, self._share, device, self._threads, data.prefetch, hardware)


def check_batch(index: ShardIndex, batch: int, world: int) -> None:
    """Raise UserError unless a batch divides evenly among `world` ranks and the index has enough samples for one."""
    if batch % world:
        raise UserError(f"--batch_size {batch} is not a multiple of the {world} ranks. Choose one that is")
    if len(index) < batch:
        raise UserError(f"--batch_size {batch} is larger than {index.folder} ({len(index)} samples). Lower it")


def name_current_gpu(device: torch.device) -> torch.device:
    """Return the device with its number, if it is a GPU without one."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def choose_decoder(data: DataRecipe, device: torch.device, threads: int) -> DecoderChoice:
    """Return the decoder for a run on `device`, with `threads` CPU threads.

    Raises UserError if it needs a GPU and the run has none.
    """
    if data.decode_device in ("gpu", "split") and device.type != "cuda":
        raise UserError(
            f"--data.decode_device {data.decode_device} needs a run on a GPU, and this one is not. Pass auto or cpu"
        )
    uses_gpu = device.type == "cuda" and data.decode_device != "cpu"
    dali = data.decode == "dali" or (data.decode == "auto" and uses_gpu)
    if not (dali and uses_gpu):
        return DecoderChoice(dali, torch.device("cpu"), on_gpu=False)
    split = data.decode_device == "split" or (data.decode_device == "auto" and threads >= SPLIT_THREADS)
    return DecoderChoice(dali, device, on_gpu=not split)


def build_order(index: ShardIndex, data: DataRecipe, batch: int, seed: int) -> Order:
    """Return the order of the samples that the recipe asks for."""
    if data.order == "global":
        return SampleOrder(len(index), batch, seed)
    return ShardOrder(index.count_samples_per_shard(), batch, seed, data.shuffle_window)


def choose_rank_cache(index: ShardIndex, order: Order) -> Cache | None:
    """Return where this rank keeps whole shards, or None if the order does not go by shards. Raises UserError."""
    return choose_cache(index, order, *read_local_rank_and_count()) if isinstance(order, ShardOrder) else None


def needs_validation(index: ShardIndex, choice: DecoderChoice) -> bool:
    """Return whether each image must be decoded once before DALI gets it, because nobody has checked it so far."""
    return choice.dali and not index.fully_decoded


def list_slow_settings(index: ShardIndex, data: DataRecipe, choice: DecoderChoice) -> list[str]:
    """Return a line for the user on each setting that makes loading slower than it could be."""
    notes = []
    if index.is_remote and data.order == "global":
        how = "whole shards are copied for single samples" if data.cache else "each sample is a request to the store"
        notes.append(f"{index.folder}: {how}. To read shards ahead, pass --data.order shards --data.cache FOLDER")
    if needs_validation(index, choice):
        notes.append(
            f"{index.folder} was made with --check header, so every image is decoded twice: DALI may crash on images "
            "that nobody has checked"
        )
    return notes


def read_local_rank_and_count() -> tuple[int, int]:
    """Return the number of this rank among those of its machine, and how many these are."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def count_default_threads() -> int:
    """Return this process's share of the CPU cores: those that it may use, divided by the ranks of its machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // read_local_rank_and_count()[1])
