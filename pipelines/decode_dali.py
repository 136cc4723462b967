"""Decode and crop images with NVIDIA DALI, on the GPU or the CPU. Each image is decoded once for all of its views."""

import re
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
from pipelines.decoder import DecodeError, DecodeRequest, move_to_device
from shards.errors import UserError
from shards.index import ShardIndex

TINY_SIDE = 16  # pixels; windows with a shorter side are left to torchvision
_CUDA_ERROR = re.compile(r"CUDA (runtime|driver) API error|cudaError|CUDA_ERROR")

Input = tuple[list[npt.NDArray[np.uint8]], npt.NDArray[np.int32]]  # B encoded images; corners [B, views, 4]


@dataclass(frozen=True)
class HardwareDecoder:
    """How the JPEG engines of the GPU are used, and how much memory is allocated for decoding at the start."""

    load: float
    """share of the images that the engines decode, 0 to 1"""
    height: int
    """pixels; images up to this height need no further memory; 0 allocates nothing ahead"""
    width: int
    """pixels; images up to this width need no further memory; 0 allocates nothing ahead"""


def balance_hardware_load(threads: int) -> float:
    """Return the share of the images for the JPEG engines at which engines and other decoders finish together.

    It supposes that the engines decode 2,600 ImageNet images a second, and that a CPU thread prepares 270 for the GPU's
    cores. With 70 threads that gives 0.12, which NVIDIA's own ResNet-50 runs on Hopper found best. With 16 threads it
    gives 0.38, with which an H200's loader held its training step back less than with 1 (bench/LOG.md).
    """
    return 2600 / (2600 + 270 * threads)


def choose_hardware_decoder(load: float, size: int, threads: int, index: ShardIndex) -> HardwareDecoder:
    """Apply the settings `data.hw_decoder_load` and `data.preallocate_size`.

    A load below 0 is chosen by the number of threads, a size of 0 by the sizes of the images.
    """
    height, width = (size, size) if size else find_usual_size(index)
    return HardwareDecoder(balance_hardware_load(threads) if load < 0 else load, height, width)


def find_usual_size(index: ShardIndex) -> tuple[int, int]:
    """Return the height and the width in pixels that 99 of 100 images do not exceed.

    Memory for larger images is allocated when they come.
    """
    return int(np.percentile(index.heights, 99)), int(np.percentile(index.widths, 99))


def build_pipeline(
    recipe: CropRecipe,
    source: Callable[[], Input],
    batch: int,
    device: torch.device,
    threads: int,
    depth: int,
    hardware: HardwareDecoder | None = None,
) -> Pipeline:
    """Build a DALI graph with one output [B, V, S, S, 3] for each resolution.

    `device` crops. If it is a GPU and `hardware` is given, it decodes, too. Otherwise the CPU decodes. `source` returns
    encoded images, and top, left, bottom and right of every view. It is called `depth` batches ahead and ends the
    stream with StopIteration.

    EXIF rotation is off, as it is in Pillow and in the sizes of the index. Windows are sliced first and then resized.
    DALI could resize a region of interest at once, but then its filter sees pixels beyond the window's edges, which
    Pillow's crop and resize does not. The difference is 0.5/255 and more for windows under 24 pixels, where slicing
    stays at 0.24. Slicing costs 13 % of the speed on a CPU.
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
        images = _decode_node(encoded, on_gpu, hardware)
        views = [_crop_node(images, corners[view], size) for view, size in enumerate(recipe.sizes)]
        pipeline.set_outputs(*(fn.stack(*views[of_one_size]) for _, of_one_size in recipe.resolutions))
    pipeline.build()
    return pipeline


def _decode_node(encoded: Any, on_gpu: bool, hardware: HardwareDecoder | None) -> Any:
    """Return the graph's node with the decoded images, on the GPU or the CPU. With `hardware` the GPU decodes.

    Color channels of half the resolution are interpolated ("fancy upsampling") as libjpeg does it on the CPU. Without
    that, crops differ by 0.15 levels on average, and by 1.4 levels in some images.
    """
    decode = partial(fn.decoders.image, encoded, output_type=types.RGB, adjust_orientation=False)
    if not on_gpu:
        return decode(device="cpu")
    if hardware is None:
        return decode(device="cpu").gpu()
    return decode(
        device="mixed",
        jpeg_fancy_upsampling=True,
        hw_decoder_load=hardware.load,
        preallocate_height_hint=hardware.height,
        preallocate_width_hint=hardware.width,
    )


def _crop_node(images: Any, corners: Any, size: int) -> Any:
    """Return the graph's node that crops one view and resizes it. `corners`: top, left, bottom, right."""
    window = fn.slice(images, start=corners[0:2], end=corners[2:4], axes=(0, 1))
    return fn.resize(window, size=(size, size), interp_type=types.INTERP_CUBIC, antialias=True)


def make_input(samples: list[bytes], windows: Windows) -> Input:
    """Turn B encoded images and windows [views, B, 4] (top, left, height, width) into the input of the graph."""
    corners = np.ascontiguousarray(windows.transpose(1, 0, 2), np.int32)
    corners[..., 2:] += corners[..., :2]
    return [np.frombuffer(sample, np.uint8) for sample in samples], corners


def find_tiny(windows: Windows) -> npt.NDArray[np.bool_]:
    """Return which images [B] have a window under TINY_SIDE pixels high or wide. `windows` is [views, B, 4]."""
    return np.asarray((windows[..., 2:] < TINY_SIDE).any((0, 2)))


class DaliDecoder:
    """Decodes requests of at most `batch` images in order, with `depth` requests in flight and `threads` CPU threads.

    `device` crops. If it is a GPU and `hardware` is given, it decodes, too.

    Images that have a window with a side under TINY_SIDE pixels are left to torchvision. At the edges DALI's filter
    repeats the last pixel, where Pillow's leaves it out, and tiny windows consist of edges.
    """

    def __init__(
        self,
        recipe: CropRecipe,
        batch: int,
        device: torch.device,
        threads: int,
        depth: int = 2,
        hardware: HardwareDecoder | None = None,
    ) -> None:
        self._recipe, self._batch, self._device = recipe, batch, device
        self._threads, self._depth, self._hardware = threads, depth, hardware
        self._single_inputs: list[Input] = []
        self._single: Pipeline | None = None

    def decode_requests(
        self, requests: Iterable[DecodeRequest]
    ) -> Iterator[tuple[DecodeRequest, list[Tensor] | DecodeError]]:
        """Yield each request with its crops, one uint8 tensor [B, V, S, S, 3] for each resolution.

        They stay valid until the next request is asked for. If an image of a request does not decode, its error takes
        the place of the crops. Raises UserError where DALI itself does not run.
        """
        in_flight: deque[DecodeRequest] = deque()
        pipeline = self._start_pipeline(iter(requests), in_flight)
        while True:
            try:
                crops = self._run(pipeline)
            except StopIteration:
                return
            except DecodeError as error:
                if not in_flight:  # no image is to blame
                    raise UserError(f"DALI does not run here ({error}). Pass --data.decode torch") from error
                yield in_flight.popleft(), error
                continue
            request = in_flight.popleft()
            yield request, self._replace_tiny(request, crops)

    def _start_pipeline(self, requests: Iterator[DecodeRequest], in_flight: deque[DecodeRequest]) -> Pipeline:
        """Build the graph over `requests`. It appends each request that it has begun to `in_flight`."""

        def source() -> Input:
            request = next(requests)
            in_flight.append(request)
            return make_input(request.samples, request.windows)

        try:
            return build_pipeline(
                self._recipe, source, self._batch, self._device, self._threads, self._depth, self._hardware
            )
        except RuntimeError as error:
            raise UserError(f"DALI does not start here ({_find_reason(error)}). Pass --data.decode torch") from error

    def _replace_tiny(self, request: DecodeRequest, crops: list[Tensor]) -> list[Tensor] | DecodeError:
        """Replace the crops of images with tiny windows by torchvision's."""
        places = np.flatnonzero(find_tiny(request.windows))
        if not len(places):
            return crops
        crops = [views.clone() for views in crops]
        try:
            for place in places.tolist():
                alone = self.decode_one(request.samples[place], request.windows[:, [place]])
                for views, image in zip(crops, alone, strict=True):
                    views[place] = image
        except DecodeError as error:
            return error
        return crops

    def decode_one(self, sample: bytes, windows: Windows) -> list[Tensor]:
        """Return the crops of one encoded image, uint8 [V, S, S, 3] for each resolution.

        `windows` is [views, 1, 4]. Raises DecodeError if the image does not decode.
        """
        if find_tiny(windows)[0]:
            crops = empty_crops(self._recipe)
            decode_and_crop(sample, windows, self._recipe, crops)
            return [move_to_device(views, self._device) for views in crops]
        self._single_inputs.append(make_input([sample], windows))
        if self._single is None:
            hardware = None if self._hardware is None else HardwareDecoder(0.0, 0, 0)  # nothing is allocated ahead
            self._single = build_pipeline(
                self._recipe, lambda: self._single_inputs.pop(), 1, self._device, 1, 1, hardware
            )
        return [views[0].clone() for views in self._run(self._single)]

    def _run(self, pipeline: Pipeline) -> list[Tensor]:
        stream: Any = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            outputs = pipeline.run(stream)
        except RuntimeError as error:
            if _CUDA_ERROR.search(str(error)):
                raise  # no image is to blame, and the GPU may be lost
            raise DecodeError(_find_reason(error)) from error
        return [from_dlpack(output.as_tensor()) for output in outputs]


def _find_reason(error: RuntimeError) -> str:
    """Return the line of DALI's message that names the reason: the one after "encountered:", or else the last one."""
    text = str(error)
    lines = [line.strip(" :") for line in (text.partition("encountered:")[2] or text).splitlines() if line.strip(" :")]
    return (lines[0] if "encountered:" in text else lines[-1]) if lines else type(error).__name__
