"""What the reader hands to a decoder, and what a decoder is."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pipelines.crops import Windows


class Undecodable(Exception):
    """A picture that does not decode; the message says why."""


@dataclass
class Request:
    """One rank's share of a step, read but not decoded."""

    step: int
    ids: npt.NDArray[np.int64]  # [B]
    samples: list[bytes]  # B compressed pictures
    windows: Windows  # [views, B, 4]


class Decoder(Protocol):
    """Makes 8-bit crops: one uint8 tensor [B, V, S, S, 3] a resolution (`CropRecipe.resolutions`), the same for a
    picture alone as in any batch."""

    def stream(self, requests: Iterable[Request]) -> Iterator[tuple[Request, list[Tensor] | Undecodable]]:
        """Each request with its crops, valid until the next is asked for; or with the error where some picture of it
        does not decode."""

    def one(self, sample: bytes, windows: Windows) -> list[Tensor]:
        """The crops of one picture, uint8 [V, S, S, 3] a resolution, from its windows [views, 1, 4]; Undecodable."""
