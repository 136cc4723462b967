"""Read the encoded images of a step, draw their crop windows, and replace the samples that cannot be used."""

import sys
from concurrent.futures import Executor
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pipelines.crops import CropRecipe, Windows, draw_windows
from pipelines.decoder import DecodeRequest
from pipelines.order import Order
from shards.errors import UserError
from shards.images.decode import decode
from shards.images.image_info import UndecodableError
from shards.index import BadSample, ShardIndex

Ids: TypeAlias = npt.NDArray[np.int64]


class SampleReader:
    """Reads one rank's share of each step.

    A bad sample is one that cannot be read or decoded. The order names another sample to replace it. `bad_samples` maps
    the ids of the bad samples to their reports, one line each. `read_bytes` counts the bytes of all encoded images that
    were read for a step.
    """

    def __init__(
        self,
        index: ShardIndex,
        order: Order,
        crops: CropRecipe,
        rank: int,
        world: int,
        max_bad_samples: int,
        validate: bool,
    ) -> None:
        """With `validate`, every image is decoded once before it is handed to the decoder."""
        self._index, self._order, self._crops = index, order, crops
        self._rank, self._world = rank, world
        self._max_bad_samples, self._validate = max_bad_samples, validate
        self.bad_samples: dict[int, str] = {}
        self.read_bytes = 0

    def read_step(self, step: int, pool: Executor) -> DecodeRequest:
        """Return the rank's share of a step, in which bad samples have been replaced.

        The threads of `pool` validate images. Raises UserError if too many samples are bad.
        """
        ids = self._order.ids(step, self._rank, self._world)
        attempts = np.zeros(len(ids), np.int64)
        while True:
            try:
                samples = self._index.read(ids)
                self.read_bytes += sum(map(len, samples))
                if self._validate:
                    self._validate_images(ids, samples, pool)
                return DecodeRequest(step, ids, samples, self.draw_windows(step, ids))
            except BadSample as bad:
                place = int(np.flatnonzero(ids == bad.id)[0])
                self.replace(step, ids, attempts, place, str(bad))

    def read_one(self, id: int) -> bytes:
        """Return the encoded image of one sample. Raises BadSample."""
        return self._index.read([id])[0]

    def report_undecodable(self, id: int, reason: str) -> str:
        """Return the report of a sample that does not decode, one line."""
        return str(self._index.make_bad_sample(id, reason))

    def draw_windows(self, step: int, ids: Ids) -> Windows:
        """Return the crop windows [views, B, 4] of samples `ids` [B] in the epoch of a step."""
        index = self._index
        epoch = self._order.epoch(step)
        return draw_windows(self._crops, self._order.seed, epoch, ids, index.heights[ids], index.widths[ids])

    def replace(self, step: int, ids: Ids, attempts: Ids, place: int, report: str) -> None:
        """Put another sample at `place` of this rank's `ids` [B], and keep the report of the bad one.

        `attempts` [B] counts the replacements at each place. Raises UserError if too many samples are bad.
        """
        folder, most = self._index.folder, self._max_bad_samples
        self.bad_samples[int(ids[place])] = report
        if len(self.bad_samples) > most:
            raise UserError(
                f"{len(self.bad_samples)} bad samples in {folder}, more than --data.max_bad_samples {most}. The last "
                f"one is {report}. Run `make-shards check {folder}`"
            )
        attempts[place] += 1
        if attempts[place] > most:
            raise UserError(
                f"{folder}: no readable sample was found to replace a bad one. The last one tried is {report}. Run "
                f"`make-shards check {folder}`"
            )
        ids[place] = self._order.substitute(step, self._rank * len(ids) + place, int(attempts[place]))

    def _validate_images(self, ids: Ids, samples: list[bytes], pool: Executor) -> None:
        """Raise BadSample for the first image that does not decode, on which DALI 2.4 may crash in a large batch."""
        for id, reason in zip(ids.tolist(), pool.map(_find_decode_problem, samples), strict=True):
            if reason is not None:
                raise self._index.make_bad_sample(id, reason)


def _find_decode_problem(sample: bytes) -> str | None:
    """Return why an image does not decode, or None."""
    try:
        decode(sample, max_pixels=sys.maxsize)  # the limit on pixels was checked when the image was packed
    except UndecodableError as error:
        return str(error)
    return None
