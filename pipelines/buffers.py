"""Main memory for batches, used again: to have fresh pages from the kernel takes longer than to fill them."""

import weakref
from collections import deque

import torch
from torch import Tensor


class Buffers:
    """Lends memory as tensors; a block comes back when the last tensor that looks into it is gone.

    Up to `spare` blocks that nobody uses are kept. Safe in threads.
    """

    def __init__(self, spare: int) -> None:
        self._spare = spare
        self._free: dict[int, deque[Tensor]] = {}  # by their bytes

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As `torch.empty`, on the CPU."""
        size = torch.Size(shape).numel() * dtype.itemsize
        free = self._free.setdefault(size, deque(maxlen=self._spare))
        try:
            block = free.pop()
        except IndexError:
            block = torch.empty(size, dtype=torch.uint8)
        # A tensor cannot be watched: views of it live on in its storage. That storage holds this array, which can.
        lent = block.numpy()
        weakref.finalize(lent, free.append, block).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)
