"""From a shard index to training batches: read, decode, crop, augment, ahead of the step.

Two threads work ahead: one reads bytes and computes windows, the other decodes, crops and augments. A batch depends
on (index, recipes, seed, step, rank) alone, whichever decoder makes it and wherever a run starts.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import Ge, Le
from torch import Tensor

from pipelines.buffers import Buffers
from pipelines.crops import CropRecipe, windows
from pipelines.decode_torch import TorchDecoder
from pipelines.fetch import Fetcher, shelf_of
from pipelines.order import AnyOrder, Order, ShardOrder
from pipelines.photometric import Colours, PhotometricRecipe, draw_colours
from pipelines.photometric import augment as reference_augment
from pipelines.prefetch import Prefetcher
from pipelines.request import Decoder, Request, Undecodable
from pipelines.stall import StallClock
from shards.cache import CACHE_BYTES, Shelf
from shards.errors import UserError
from shards.images.decode import UndecodableError, decode
from shards.index import BadSample, ShardIndex

_READING = 5  # seconds for a request once its shards are at hand, and
_MAKING = 60  # for a batch once its pictures are read, beyond `timeout`
_IN_HAND = 3  # batches beside those queued: at the step, just given up by it, being made

# As `photometric.augment`, and threads for it.
Augment: TypeAlias = Callable[[Tensor, Colours, Tensor, Executor], None]


@dataclass(frozen=True)
class DataRecipe:
    """Where the pictures are and how they are read."""

    train: str = "data/train"
    """folder that make-shards wrote"""
    order: Literal["global", "shards"] = "global"
    """global: each epoch permutes all samples; shards: the shards, and the samples of `window` shards at a time, each
    shard being read once from end to end: for slow disks and object stores"""
    window: Annotated[int, Ge(1)] = 8
    """shards that are mixed with one another, where order is shards"""
    cache: str = ""
    """folder on this machine for whole copies of the shards, fetched ahead of use: for object stores; empty for none"""
    cache_bytes: Annotated[int, Ge(1)] = CACHE_BYTES
    """bytes of shards in the cache at most"""
    decode: Literal["auto", "dali", "torch"] = "auto"
    """library that decodes and crops; auto: DALI on a GPU, torch on CPU cores, where it is faster"""
    decode_device: Literal["auto", "gpu", "cpu"] = "auto"
    """where pictures are decoded and cropped; auto: the GPU where there is one. They are augmented there in any case"""
    threads: Annotated[int, Ge(0), Le(512)] = 0
    """CPU threads that decode, for each rank; 0: the machine's cores over its ranks"""
    prefetch: Annotated[int, Ge(1), Le(64)] = 2
    """length of the queues: requests read ahead, batches being decoded, and batches ready for the step"""
    max_bad_samples: Annotated[int, Ge(0)] = 100
    """unreadable samples that each rank replaces before it stops the run"""
    timeout: Annotated[int, Ge(1)] = 300
    """seconds after which the run stops when nothing came from storage, or no batch: something is stuck"""
    hw_decoder_load: Annotated[float, Ge(-1), Le(1)] = -1.0
    """share of the pictures that the GPU's JPEG engines decode, the rest being left to its cores and the CPU threads;
    -1: by the number of threads"""
    size_hint: Annotated[int, Ge(0)] = 0
    """pixels a side for which the GPU's decoder sets memory aside at the start; 0: what 99 of 100 pictures need"""


def open_index(data: DataRecipe) -> ShardIndex:
    """The samples of the recipe's folder. Raises UserError where that is not a finished one."""
    return ShardIndex(data.train, data.cache or None, data.cache_bytes)


@dataclass
class Batch:
    """One rank's share of a step. Views are stacked view by view: all pictures' view 0, then view 1, and so on."""

    step: int
    ids: npt.NDArray[np.int64]  # [B]
    globals: Tensor  # [2·B, 3, G, G], normalised, channels-last
    locals: Tensor | None  # [n·B, 3, L, L]; None where the recipe has no local views
    ready: torch.cuda.Event | None = None  # recorded behind the batch on the stream that made it


@dataclass(frozen=True)
class Figures:
    """What a loader did in some stretch of a run."""

    stall: float  # seconds that the step stood waiting for batches
    read_bytes: int  # of compressed pictures
    requests_ready: float  # read ahead when the decoder asked for the next, on average; up to `prefetch`
    batches_ready: float  # made ahead when the step asked for the next, on average; up to `prefetch`


class Loader:
    """Batches of `batch // world` pictures a rank, in the asked dtype, on the device.

    `bad` lists the reports of samples that had to be replaced; `notes` says what makes it slower than it could be.
    """

    def __init__(
        self,
        index: ShardIndex,
        data: DataRecipe,
        crops: CropRecipe,
        colours: PhotometricRecipe,
        *,
        batch: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch % world:
            raise UserError(f"--batch_size {batch} is not a multiple of the {world} ranks: choose one that is")
        if len(index) < batch:
            raise UserError(f"--batch_size {batch} is larger than {index.folder} ({len(index)} samples): lower it")
        self._index, self._data, self._crops, self._colours = index, data, crops, colours
        if device == torch.device("cuda"):
            device = torch.device("cuda", torch.cuda.current_device())
        if data.decode_device == "gpu" and device.type != "cuda":
            raise UserError("--data.decode_device gpu: this run is not on a GPU; pass auto or cpu")
        self._seed, self._device, self._dtype = seed, device, dtype
        self._threads = data.threads or default_threads()
        self._on_gpu = device.type == "cuda" and data.decode_device != "cpu"  # are pictures decoded
        self._uses_dali = data.decode == "dali" or (data.decode == "auto" and self._on_gpu)
        self._rank, self._world, self._share = rank, world, batch // world
        self.order: AnyOrder = (
            Order(len(index), batch, seed)
            if data.order == "global"
            else ShardOrder(index.shard_sizes(), batch, seed, data.window)
        )
        self._shelf: Shelf | None = None
        if isinstance(self.order, ShardOrder):
            here = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            self._shelf = shelf_of(index, self.order, *here)
        self._buffers = Buffers(data.prefetch + _IN_HAND)
        self.bad: dict[int, str] = {}
        self._augment, self.notes = augment_kernel(device)
        if index.remote and data.order == "global":
            how = (
                "whole shards are copied for single samples"
                if data.cache
                else "samples are asked of a store one by one"
            )
            self.notes.append(f"{index.folder}: {how}; --data.order shards --data.cache FOLDER reads shards ahead")
        if self._uses_dali and not index.decoded:
            self.notes.append(
                f"{index.folder} was packed with --check header: every picture is decoded twice, once for DALI's safety"
            )
        self._stall = StallClock(device)
        self._read_bytes = 0
        self._fetched: Fetcher | None = None
        self._prefetchers: list[Prefetcher[Any]] = []
        self._before = (0.0, 0, [(0, 0), (0, 0)])  # the totals when `figures` was last called

    def batches(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """The batches of steps start … stop − 1. Each stays valid for as long as it is held. Close it to stop early."""
        depth, limit = self._data.prefetch, self._data.timeout
        # The limits differ so that the error names the stage that is stuck; a fetcher's is `limit`.
        reading, making = limit + (_READING if isinstance(self.order, ShardOrder) else 0), limit + _MAKING
        with (
            Prefetcher(self._requests(start, stop), depth, "reading shards", reading, self._progress) as requests,
            Prefetcher(self._make(requests), depth, "making batches", making, self._progress) as made,
        ):
            self._prefetchers = [requests, made]
            self._before = (*self._before[:2], [(0, 0), (0, 0)])
            try:
                while True:
                    self._stall.ask()
                    batch = next(made, None)
                    if batch is None:
                        return
                    self._hand_over(batch)
                    self._stall.get()
                    yield batch
            finally:
                requests.stop()  # `made` may be waiting for it

    def _progress(self) -> float:
        """When a shard last came near, by time.monotonic."""
        return 0.0 if self._fetched is None else self._fetched.progress

    def figures(self) -> Figures:
        """Since this was last called."""
        stall, read, queues = self._before
        now = self._stall.read(), self._read_bytes, [(made.taken, made.queued) for made in self._prefetchers]
        self._before = now
        ready = [
            (now_queued - queued) / max(1, now_taken - taken)
            for (taken, queued), (now_taken, now_queued) in zip(queues, now[2], strict=False)
        ]
        return Figures(now[0] - stall, now[1] - read, *(ready or (0.0, 0.0)))

    # Reading: bytes and windows

    def _requests(self, start: int, stop: int) -> Iterator[Request]:
        with self._fetcher() as fetched, ThreadPoolExecutor(self._threads, "judging") as pool:
            self._fetched = fetched
            for step in range(start, stop):
                if fetched is not None:
                    fetched.need(step)
                yield self._read(step, pool)

    def _fetcher(self) -> contextlib.AbstractContextManager[Fetcher | None]:
        """What brings whole shards near ahead of use, where the order goes by shards."""
        if self._shelf is None or not isinstance(self.order, ShardOrder):
            return contextlib.nullcontext()
        return Fetcher(self.order, self._shelf, limit=self._data.timeout)

    def _read(self, step: int, pool: Executor) -> Request:
        ids = self.order.ids(step, self._rank, self._world)
        attempts = np.zeros(len(ids), np.int64)
        while True:
            try:
                samples = self._index.read(ids)
                self._read_bytes += sum(map(len, samples))
                if self._uses_dali and not self._index.decoded:
                    self._judge(ids, samples, pool)
                return Request(step, ids, samples, self._windows(step, ids))
            except BadSample as bad:
                place = int(np.flatnonzero(ids == bad.id)[0])
                self._replace(step, ids, attempts, place, str(bad))

    def _judge(self, ids: npt.NDArray[np.int64], samples: list[bytes], pool: Executor) -> None:
        """Raises BadSample for the first picture that does not decode: in large batches DALI 2.4 may crash on one."""
        for id, reason in zip(ids.tolist(), pool.map(_why_undecodable, samples), strict=True):
            if reason is not None:
                raise self._index.bad(id, reason)

    def _windows(self, step: int, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        epoch = self.order.epoch(step)
        return windows(self._crops, self._seed, epoch, ids, self._index.heights[ids], self._index.widths[ids])

    def _replace(
        self, step: int, ids: npt.NDArray[np.int64], attempts: npt.NDArray[np.int64], place: int, report: str
    ) -> None:
        """Put a substitute at `place` of this rank's `ids`, and note why; UserError when there were too many."""
        self.bad[int(ids[place])] = report
        if len(self.bad) > self._data.max_bad_samples:
            raise UserError(
                f"{len(self.bad)} bad samples in {self._index.folder}, more than --data.max_bad_samples; the last: "
                f"{report}. Run `make-shards check {self._index.folder}`"
            )
        attempts[place] += 1
        if attempts[place] > self._data.max_bad_samples:
            raise UserError(f"{self._index.folder}: no readable substitute for a bad sample; the last: {report}")
        ids[place] = self.order.substitute(step, self._rank * self._share + place, int(attempts[place]))

    # Making: crops and colours

    def _make(self, requests: Iterator[Request]) -> Iterator[Batch]:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            with torch.cuda.stream(torch.cuda.Stream(self._device)):
                yield from self._made(requests)
        else:
            yield from self._made(requests)

    def _made(self, requests: Iterator[Request]) -> Iterator[Batch]:
        with ThreadPoolExecutor(self._threads, "pictures") as pool:
            decoder = self._decoder(pool)
            for request, crops in decoder.stream(requests):
                if isinstance(crops, Undecodable):
                    crops = self._mended(decoder, request, crops)
                yield self._augmented(request, crops, pool)

    def _decoder(self, pool: Executor) -> Decoder:
        if not self._uses_dali:
            return TorchDecoder(self._crops, pool)
        try:
            from pipelines.decode_dali import DaliDecoder, hardware_of
        except ImportError as error:
            raise UserError(
                f"DALI does not import ({error}): pip install -e '.[dali]', or pass --data.decode torch"
            ) from error
        if not self._on_gpu:
            return DaliDecoder(self._crops, self._share, torch.device("cpu"), self._threads, self._data.prefetch)
        hardware = hardware_of(self._data.hw_decoder_load, self._data.size_hint, self._threads, self._index)
        return DaliDecoder(self._crops, self._share, self._device, self._threads, self._data.prefetch, hardware)

    def _mended(self, decoder: Decoder, request: Request, error: Undecodable) -> list[Tensor]:
        """The crops of a request with an undecodable picture: each picture alone, and a substitute for the bad ones."""
        attempts = np.zeros(len(request.ids), np.int64)
        pictures = [self._mended_one(decoder, request, attempts, place) for place in range(len(request.ids))]
        if not attempts.any():
            raise UserError(
                f"decoding step {request.step} failed, though each of its pictures decodes alone ({error}): lower "
                "--batch_size, or pass --data.decode torch"
            )
        return [torch.stack(views) for views in zip(*pictures, strict=True)]

    def _mended_one(
        self, decoder: Decoder, request: Request, attempts: npt.NDArray[np.int64], place: int
    ) -> list[Tensor]:
        while True:
            sample, at = request.ids[place : place + 1], request.windows[:, place : place + 1]
            try:
                return decoder.one(self._index.read(sample)[0], at)
            except (Undecodable, BadSample) as error:
                report = f"{self._index.describe(int(sample[0]))}: {error}"
                self._replace(request.step, request.ids, attempts, place, report)
                request.windows[:, place : place + 1] = self._windows(request.step, request.ids[place : place + 1])

    def _augmented(self, request: Request, crops: list[Tensor], pool: Executor) -> Batch:
        epoch = self.order.epoch(request.step)
        colours = draw_colours(self._colours, self._seed, epoch, request.ids, self._crops.views)
        batches = []
        for (size, views), pictures in zip(self._crops.resolutions, crops, strict=True):
            batches.append(self._empty(len(request.ids) * (views.stop - views.start), size))
            self._augment(self._on_device(pictures), colours[views], batches[-1], pool)
        ready = None
        if self._device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record()
        return Batch(request.step, request.ids, batches[0], batches[1] if self._crops.locals else None, ready)

    def _on_device(self, pictures: Tensor) -> Tensor:
        """Crops made on the CPU to the GPU, through pinned memory, so that the host need not wait for the copy."""
        if pictures.device.type == self._device.type:
            return pictures
        return pictures.pin_memory().to(self._device, non_blocking=True)

    def _empty(self, pictures: int, side: int) -> Tensor:
        shape = (pictures, side, side, 3)
        if self._device.type == "cpu":
            return self._buffers.empty(shape, self._dtype).permute(0, 3, 1, 2)
        return torch.empty(shape, dtype=self._dtype, device=self._device).permute(0, 3, 1, 2)

    def _hand_over(self, batch: Batch) -> None:
        """Let the step's stream wait for the batch, not the host; and keep its memory until that stream is done."""
        if batch.ready is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(batch.ready)
            for views in (batch.globals, batch.locals):
                if views is not None:
                    views.record_stream(stream)


def augment_kernel(device: torch.device) -> tuple[Augment, list[str]]:
    """The fastest way to augment on a device, and what to tell where that is not installed. All ways agree to a level;
    the reference is what they agree with."""
    try:
        if device.type == "cpu":
            from pipelines import photometric_cpu

            return photometric_cpu.augment, []
        from pipelines import photometric_triton

        return lambda pictures, colours, out, _: photometric_triton.augment(pictures, colours, out), []
    except ImportError as error:
        note = f"{error}: colours take several times as long without it"
        return lambda pictures, colours, out, _: reference_augment(pictures, colours, out), [note]


def _why_undecodable(sample: bytes) -> str | None:
    try:
        decode(sample, max_pixels=sys.maxsize)  # packing had a limit of its own
    except UndecodableError as error:
        return str(error)
    return None


def default_threads() -> int:
    """The cores that this process may use, shared with the other ranks of its machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
