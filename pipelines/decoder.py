"""Define what a decoder is, what it is asked for, and how it says that an image does not decode."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipelines.crops import Windows


class DecodeError(Exception):
    """An image does not decode. The message says why."""


@dataclass
class DecodeRequest:
    """One rank's share of a step: read, but not decoded yet."""

    step: int
    """number of the training step"""
    ids: npt.NDArray[np.int64]
    """sample ids [B]"""
    samples: list[bytes]
    """B encoded images"""
    windows: Windows
    """crop windows [views, B, 4]: top, left, height, width in pixels"""


def move_to_device(images: Tensor, device: torch.device) -> Tensor:
    """Copy crops from the CPU to a GPU through pinned memory, so that the host need not wait for the copy.

    Crops that are on the device already are returned as they are.
    """
    if images.device.type == device.type:
        return images
    return images.pin_memory().to(device, non_blocking=True)


class Decoder(Protocol):
    """Turns encoded images into 8-bit crops: one uint8 tensor [B, V, S, S, 3] for each of `CropRecipe.resolutions`.

    An image gives the same crops alone as in any batch.
    """

    def decode_requests(
        self, requests: Iterable[DecodeRequest]
    ) -> Iterator[tuple[DecodeRequest, list[Tensor] | DecodeError]]:
        """Yield each request with its crops, which stay valid until the next request is asked for.

        If an image of a request does not decode, its error takes the place of the crops.
        """

    def decode_one(self, sample: bytes, windows: Windows) -> list[Tensor]:
        """Return the crops of one encoded image, uint8 [V, S, S, 3] for each resolution.

        `windows` is [views, 1, 4]. Raises DecodeError if the image does not decode.
        """
