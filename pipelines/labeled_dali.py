"""Load evaluation images with NVIDIA DALI, decoded, resized and cropped as `labeled.py` does it, for a GPU.

Pixels differ from those of `labeled.py` by less than a third of a level on average, as in training.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pipelines.labeled import LONGEST, CenterCrop, explain_bad_sample, read_image
from pipelines.photometric import normalize
from shards.errors import UserError
from shards.index import BadSample, ShardIndex

_DEPTH = 2  # batches that are made ahead

Ids = npt.NDArray[np.int64]
Boxes = npt.NDArray[np.int32]


def load_dali_batches(
    index: ShardIndex, batch: int, center: CenterCrop, threads: int, ids: Ids, device: torch.device
) -> Iterator[Tensor]:
    """Yield images [B, 3, crop, crop] of the samples `ids`, float32, channels-last, on the device.

    CPU threads read and decode; the device resizes and crops. A batch stays valid until the next one is asked for. The
    last one may be smaller. Raises UserError, which names the sample, if a sample cannot be read.
    """
    parts = [ids[first : first + batch] for first in range(0, len(ids), batch)]
    with ThreadPoolExecutor(threads, thread_name_prefix="evaluate") as pool:
        pipeline = _build_pipeline(_make_inputs(index, parts, center, pool), batch, center.crop, device, threads)
        stream: Any = torch.cuda.current_stream(device) if device.type == "cuda" else None
        for part in parts:
            try:
                [images] = pipeline.run(stream)
            except RuntimeError as error:
                raise _name_sample(index, part, error) from error
            out = torch.empty(len(part), 3, center.crop, center.crop, device=device)
            out = out.contiguous(memory_format=torch.channels_last)
            normalize(from_dlpack(images.as_tensor()), out, center.normalization)
            yield out


def _make_inputs(
    index: ShardIndex, parts: list[Ids], center: CenterCrop, pool: ThreadPoolExecutor
) -> Iterator[tuple[list[npt.NDArray[np.uint8]], Boxes, Boxes, Boxes]]:
    """Yield, for each batch, the encoded images, and what `compute_geometry` returns for them."""

    def read(number: int) -> npt.NDArray[np.uint8]:
        try:
            return np.frombuffer(index.read([number])[0], np.uint8)
        except BadSample as error:
            raise explain_bad_sample(index, error) from error

    for ids in parts:
        sizes = np.stack([index.heights[ids], index.widths[ids]], 1).astype(np.int64)
        yield list(pool.map(read, ids.tolist())), *compute_geometry(sizes, center)


def compute_geometry(sizes: npt.NDArray[np.int64], center: CenterCrop) -> tuple[Boxes, Boxes, Boxes]:
    """Compute how images of `sizes` [B, 2] (height, width) become center crops, in torchvision's rounding.

    Returns [B, 4], the part of each image that is resized: top, left, bottom, right; [B, 2], the height and width that
    it is resized to; and [B, 2], top and left of the crop in that.
    """
    kept = np.minimum(sizes, LONGEST * sizes.min(1, keepdims=True))
    first = _center(sizes, kept)
    short = kept.min(1, keepdims=True)
    resized = center.resize * kept // short
    box = np.concatenate([first, first + kept], 1)
    return box.astype(np.int32), resized.astype(np.int32), _center(resized, center.crop).astype(np.int32)


def _center(outer: npt.NDArray[np.int64], inner: Any) -> npt.NDArray[np.int64]:
    """Return where a centered part of `outer` begins, rounded as torchvision does it: halves go to the even number."""
    return np.rint((outer - inner) / 2).astype(np.int64)


def _build_pipeline(inputs: Iterator[Any], batch: int, crop: int, device: torch.device, threads: int) -> Pipeline:
    """Build a DALI graph with one output, uint8 [B, crop, crop, 3]. CPU threads decode; the device does the rest."""
    on_gpu = device.type == "cuda"
    number = (device.index or 0) if on_gpu else None
    pipeline = Pipeline(batch_size=batch, num_threads=threads, device_id=number, prefetch_queue_depth=_DEPTH)
    with pipeline:
        encoded, box, size, start = fn.external_source(
            lambda: next(inputs), num_outputs=4, dtype=[types.UINT8, types.INT32, types.INT32, types.INT32],
            ndim=[1, 1, 1, 1],
        )  # fmt: skip
        images = fn.decoders.image(encoded, device="cpu", output_type=types.RGB, adjust_orientation=False)
        images = images.gpu() if on_gpu else images
        images = fn.slice(images, start=box[0:2], end=box[2:4], axes=(0, 1))
        images = fn.resize(
            images, size=fn.cast(size, dtype=types.FLOAT), interp_type=types.INTERP_CUBIC, antialias=True
        )
        pipeline.set_outputs(fn.slice(images, start=start, shape=(crop, crop), axes=(0, 1)))
    pipeline.build()
    return pipeline


def _name_sample(index: ShardIndex, ids: Ids, error: RuntimeError) -> Exception:
    """Return the error of the first sample that torch's decoder cannot read either, or else DALI's own."""
    for number in ids.tolist():
        try:
            read_image(index, number)
        except UserError as named:
            return named
    return error
