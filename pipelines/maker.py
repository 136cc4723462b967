"""Make batches of what has been read: decode and crop, replace images that do not decode, augment and normalize."""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from pipelines.batch import Batch
from pipelines.buffers import BufferPool
from pipelines.crops import CropRecipe
from pipelines.decoder import DecodeError, Decoder, DecodeRequest, move_to_device
from pipelines.order import Order
from pipelines.photometric import (
    IMAGENET,
    AugmentParameters,
    Normalization,
    PhotometricRecipe,
    draw_augment_parameters,
)
from pipelines.photometric import augment as augment_reference
from pipelines.reader import Ids, SampleReader
from shards.errors import UserError
from shards.index import BadSample

# `photometric.augment` with one more argument, threads for it.
Augment: TypeAlias = Callable[[Tensor, AugmentParameters, Tensor, Executor], None]


class BatchMaker:
    """Turns requests into batches of `dtype` on `device`.

    `reader` replaces images that do not decode. `spare` is how many batches may be in use at the same time on a CPU,
    where their memory is used again.
    """

    def __init__(
        self,
        reader: SampleReader,
        order: Order,
        crops: CropRecipe,
        recipe: PhotometricRecipe,
        augment: Augment,
        device: torch.device,
        dtype: torch.dtype,
        spare: int,
    ) -> None:
        self._reader, self._order, self._crops = reader, order, crops
        self._recipe, self._augment = recipe, augment
        self._device, self._dtype = device, dtype
        self._buffers = BufferPool(spare)

    def make_batches(self, requests: Iterator[DecodeRequest], decoder: Decoder, pool: Executor) -> Iterator[Batch]:
        """Yield the batch of each request. The threads of `pool` augment.

        Raises UserError if too many samples are bad, or if a request does not decode though each of its images does.
        """
        for request, crops in decoder.decode_requests(requests):
            if isinstance(crops, DecodeError):
                crops = self._replace_undecodable(decoder, request, crops)
            yield self._augment_crops(request, crops, pool)

    def _replace_undecodable(self, decoder: Decoder, request: DecodeRequest, error: DecodeError) -> list[Tensor]:
        """Decode each image of a request alone, and replace those that do not decode. Returns the crops."""
        attempts = np.zeros(len(request.ids), np.int64)
        images = [self._decode_place(decoder, request, attempts, place) for place in range(len(request.ids))]
        if not attempts.any():
            raise UserError(
                f"decoding step {request.step} failed ({error}), though each of its images decodes alone. Lower "
                "--batch_size, or pass --data.decode torch"
            )
        return [torch.stack(views) for views in zip(*images, strict=True)]

    def _decode_place(self, decoder: Decoder, request: DecodeRequest, attempts: Ids, place: int) -> list[Tensor]:
        """Decode the image at `place` of a request. While it does not decode, replace it."""
        ids, windows = request.ids[place : place + 1], request.windows[:, place : place + 1]
        while True:
            id = int(ids[0])
            try:
                return decoder.decode_one(self._reader.read_one(id), windows)
            except BadSample as bad:
                report = str(bad)
            except DecodeError as error:
                report = self._reader.report_undecodable(id, str(error))
            self._reader.replace(request.step, request.ids, attempts, place, report)  # and thus `ids`, a view of these
            windows[:] = self._reader.draw_windows(request.step, ids)

    def _augment_crops(self, request: DecodeRequest, crops: list[Tensor], pool: Executor) -> Batch:
        epoch = self._order.epoch(request.step)
        parameters = draw_augment_parameters(self._recipe, self._order.seed, epoch, request.ids, self._crops.views)
        outs = []
        for (size, views), images in zip(self._crops.resolutions, crops, strict=True):
            outs.append(self._empty_views(len(request.ids) * (views.stop - views.start), size))
            self._augment(move_to_device(images, self._device), parameters[views], outs[-1], pool)
        ready = None
        if self._device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record()
        return Batch(request.step, request.ids, outs[0], outs[1] if self._crops.locals else None, ready)

    def _empty_views(self, images: int, side: int) -> Tensor:
        """Return memory for normalized views [images, 3, side, side], channels-last, on the device."""
        shape = (images, side, side, 3)
        if self._device.type == "cpu":
            return self._buffers.empty(shape, self._dtype).permute(0, 3, 1, 2)
        return torch.empty(shape, dtype=self._dtype, device=self._device).permute(0, 3, 1, 2)


def choose_augment(device: torch.device, normalization: Normalization = IMAGENET) -> tuple[Augment, list[str]]:
    """Return the fastest way to augment on a device, and a note for the user where its package is not installed.

    All ways agree with the reference to one level.
    """
    try:
        if device.type == "cpu":
            from pipelines import photometric_cpu

            return partial(photometric_cpu.augment, normalization=normalization), []
        from pipelines import photometric_triton

        return lambda images, parameters, out, _: photometric_triton.augment(images, parameters, out, normalization), []
    except ImportError as error:
        note = f"{error}. Without it the augmentation takes several times as long"
        return lambda images, parameters, out, _: augment_reference(images, parameters, out, normalization), [note]
