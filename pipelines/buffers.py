"""Reuse main memory for batches. To get fresh pages from the kernel takes longer than to fill them."""

import weakref
from collections import deque

import torch
from torch import Tensor


class BufferPool:
    """Lend memory as tensors.

    A block returns to the pool when the last tensor that uses it is gone. The pool keeps at most `spare` free blocks of
    each size. Threads may share it.
    """

    def __init__(self, spare: int) -> None:
        self._spare = spare
        self._free: dict[int, deque[Tensor]] = {}  # free blocks by their size in bytes

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialized tensor on the CPU, as `torch.empty` does."""
        size = torch.Size(shape).numel() * dtype.itemsize
        free = self._free.setdefault(size, deque(maxlen=self._spare))
        try:
            block = free.pop()
        except IndexError:
            block = torch.empty(size, dtype=torch.uint8)
        # Nobody is told when the last view of a tensor is gone: views only share its storage. That storage holds this
        # array, and the end of an array can be observed.
        array = block.numpy()
        weakref.finalize(array, free.append, block).atexit = False
        return torch.from_numpy(array).view(dtype).view(shape)
