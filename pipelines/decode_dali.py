"""Compressed bytes and crop windows into 8-bit crops with NVIDIA DALI: one decode a picture, on the GPU or the CPU."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pipelines.crops import CropRecipe, Windows
from pipelines.decode_torch import decode_and_crop, empty_crops
from pipelines.request import Request, Undecodable
from shards.errors import UserError
from shards.index import ShardIndex

TINY = 16  # pixels

Input = tuple[list[npt.NDArray[np.uint8]], npt.NDArray[np.int32]]  # B encoded pictures; corners [B, views, 4]


@dataclass(frozen=True)
class Hardware:
    """How the GPU's JPEG engines are used, where pictures are decoded on a GPU."""

    load: float  # share of the pictures that go to them
    height: int  # pixels for which memory is set aside before the first picture, so that none has to be found later
    width: int


def hw_share(threads: int) -> float:
    """The share of the pictures for the GPU's JPEG engines at which they and the rest end together: they decode some
    2,600 ImageNet pictures a second on an H100, a CPU thread prepares some 270 for the GPU's cores (estimates: with 70
    threads this gives the 0.12 that NVIDIA's own ResNet-50 runs on Hopper found best; no GPU of ours measured it yet).
    """
    return 2600 / (2600 + 270 * threads)


def hardware_of(load: float, size_hint: int, threads: int, index: ShardIndex) -> Hardware:
    """What the settings `data.hw_decoder_load` and `data.size_hint` say, or leave to the threads and the index."""
    height, width = (size_hint, size_hint) if size_hint else largest_usual(index)
    return Hardware(hw_share(threads) if load < 0 else load, height, width)


def largest_usual(index: ShardIndex) -> tuple[int, int]:
    """Height and width in pixels that 99 of 100 pictures do not pass: what is larger has its memory found when it
    comes."""
    return int(np.percentile(index.heights, 99)), int(np.percentile(index.widths, 99))


def build_pipeline(
    recipe: CropRecipe,
    source: Callable[[], Input],
    batch: int,
    device: torch.device,
    threads: int,
    depth: int,
    hardware: Hardware | None = None,
) -> Pipeline:
    """A DALI graph from `source` (encoded pictures; top, left, bottom, right of every view) to one output
    [B, V, S, S, 3] a resolution. `source` ends the stream with StopIteration and is called `depth` batches ahead.

    EXIF rotation is off, as it is in Pillow and in the sizes of the index. Windows are sliced and then resized: a
    resize of a region of interest looks at pixels beyond the window's edges, which Pillow's crop and resize does not
    (0.5/255 and more in windows under 24 pixels, where slicing stays at 0.24; slicing costs 13 % of the CPU's speed).
    """
    on_gpu = device.type == "cuda"
    pipeline = Pipeline(
        batch_size=batch,
        num_threads=threads,
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=depth,
    )
    with pipeline:
        encoded, corners = fn.external_source(source, num_outputs=2, dtype=[types.UINT8, types.INT32], ndim=[1, 2])
        decode = partial(fn.decoders.image, encoded, output_type=types.RGB, adjust_orientation=False)
        if on_gpu:
            hardware = hardware or Hardware(0.0, 0, 0)
            pictures = decode(
                device="mixed",
                hw_decoder_load=hardware.load,
                preallocate_height_hint=hardware.height,
                preallocate_width_hint=hardware.width,
            )
        else:
            pictures = decode(device="cpu")
        views = [
            fn.resize(
                fn.slice(pictures, start=corners[view, 0:2], end=corners[view, 2:4], axes=(0, 1)),
                size=(size, size),
                interp_type=types.INTERP_CUBIC,
                antialias=True,
            )
            for view, size in enumerate(recipe.sizes)
        ]
        pipeline.set_outputs(*(fn.stack(*views[of_one_size]) for _, of_one_size in recipe.resolutions))
    pipeline.build()
    return pipeline


def encode_input(samples: list[bytes], windows: Windows) -> Input:
    """What the graph takes: from bytes of B pictures and windows [views, B, 4] (top, left, height, width)."""
    corners = np.ascontiguousarray(windows.transpose(1, 0, 2), np.int32)
    corners[..., 2:] += corners[..., :2]
    return [np.frombuffer(sample, np.uint8) for sample in samples], corners


def tiny(windows: Windows) -> npt.NDArray[np.bool_]:
    """Which pictures [B] have a window under TINY pixels high or wide, from windows [views, B, 4]."""
    return np.asarray((windows[..., 2:] < TINY).any((0, 2)))


class DaliDecoder:
    """Decodes requests of at most `batch` pictures in order, `depth` of them in flight, with `threads` CPU threads.

    Pictures with a window of fewer than TINY pixels a side are left to torchvision: at the edges DALI's filter repeats
    the last pixel where Pillow's leaves it out, and tiny windows are all edge.
    """

    def __init__(
        self,
        recipe: CropRecipe,
        batch: int,
        device: torch.device,
        threads: int,
        depth: int = 2,
        hardware: Hardware | None = None,
    ) -> None:
        self._recipe, self._batch, self._device = recipe, batch, device
        self._threads, self._depth, self._hardware = threads, depth, hardware
        self._waiting: list[Input] = []
        self._single: Pipeline | None = None

    def stream(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Tensor] | Undecodable]]:
        """Each request with its crops, one uint8 tensor [B, V, S, S, 3] a resolution, valid until the next is asked
        for; or with the error where some picture of it does not decode."""
        flying: deque[Request] = deque()
        waiting = iter(requests)

        def source() -> Input:
            request = next(waiting)
            flying.append(request)
            return encode_input(request.samples, request.windows)

        try:
            pipeline = build_pipeline(
                self._recipe, source, self._batch, self._device, self._threads, self._depth, self._hardware
            )
        except RuntimeError as error:
            raise UserError(f"DALI does not start here ({_reason(error)}): pass --data.decode torch") from error
        while True:
            try:
                crops = self._run(pipeline)
            except StopIteration:
                return
            except Undecodable as error:
                if not flying:  # not a picture's fault
                    raise UserError(f"DALI does not run here ({error}): pass --data.decode torch") from error
                yield flying.popleft(), error
                continue
            request = flying.popleft()
            yield request, self._with_tiny(request, crops)

    def _with_tiny(self, request: Request, crops: list[Tensor]) -> list[Tensor] | Undecodable:
        places = np.flatnonzero(tiny(request.windows))
        if not len(places):
            return crops
        crops = [views.clone() for views in crops]
        try:
            for place in places.tolist():
                alone = self.one(request.samples[place], request.windows[:, [place]])
                for views, picture in zip(crops, alone, strict=True):
                    views[place] = picture
        except Undecodable as error:
            return error
        return crops

    def one(self, sample: bytes, windows: Windows) -> list[Tensor]:
        """The crops of one picture, uint8 [V, S, S, 3] a resolution; Undecodable if it does not decode."""
        if tiny(windows)[0]:
            crops = empty_crops(self._recipe)
            decode_and_crop(sample, windows, self._recipe, crops)
            return [views.to(self._device) for views in crops]
        self._waiting.append(encode_input([sample], windows))
        if self._single is None:
            self._single = build_pipeline(
                self._recipe, lambda: self._waiting.pop(), 1, self._device, threads=1, depth=1
            )
        return [views[0].clone() for views in self._run(self._single)]

    def _run(self, pipeline: Pipeline) -> list[Tensor]:
        stream: Any = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            outputs = pipeline.run(stream)
        except RuntimeError as error:
            raise Undecodable(_reason(error)) from error
        return [from_dlpack(output.as_tensor()) for output in outputs]


def _reason(error: RuntimeError) -> str:
    """DALI's own words for it, in one line: they stand after "encountered:", or at the end."""
    text = str(error)
    lines = [line.strip(" :") for line in (text.partition("encountered:")[2] or text).splitlines() if line.strip(" :")]
    return (lines[0] if "encountered:" in text else lines[-1]) if lines else type(error).__name__
