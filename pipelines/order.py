"""Decide which samples a step sees, by permutations that need no state and do not depend on the number of ranks.

An epoch is `samples // batch` steps. The remainder, less than one global batch, is dropped. Each epoch has another
permutation, so the remainder consists of other samples each time. `WholeOrder` alone drops nothing.

`SampleOrder` permutes all samples at once, for local disks and the page cache. `ShardOrder` permutes the shards, and
then the samples of a few shards at a time, for storage that is fastest when it is read from end to end.
"""

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.random_numbers import ORDER_STREAM, derive_key, philox

Ids = npt.NDArray[np.int64]

# Luby and Rackoff need four rounds for a strong permutation. Two more take no time that can be measured.
_ROUNDS = 6


def permute(positions: npt.ArrayLike, size: int, seed: int, epoch: int, part: int = 0) -> Ids:
    """Return where a pseudo-random permutation of range(size) sends `positions`, integers in [0, size), elementwise.

    Each `part` (below 2**32) of an epoch has another permutation. It is a Feistel network over the smallest even number
    of bits that holds `size`. Results outside the range go through it again (Black and Rogaway, "Ciphers with arbitrary
    finite domains", 2002). That needs constant memory, and fewer than four passes on average, whatever the size.
    """
    half = max(1, -(-(size - 1).bit_length() // 2))
    ids = _feistel(np.asarray(positions, np.uint64), half, seed, epoch, part)
    while (outside := ids >= size).any():
        ids[outside] = _feistel(ids[outside], half, seed, epoch, part)
    return ids.astype(np.int64)


def _feistel(values: npt.NDArray[np.uint64], half: int, seed: int, epoch: int, part: int) -> npt.NDArray[np.uint64]:
    """Apply the Feistel network of 2 · `half` bits once."""
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = values >> shift, values & mask
    key = derive_key(seed, ORDER_STREAM)
    zero = np.zeros_like(right)
    for number in range(_ROUNDS):
        counter = (right, zero + np.uint64(epoch), zero + np.uint64(number), zero + np.uint64(part))
        left, right = right, left ^ (philox(counter, key)[0] & mask)
    return (left << shift) | right


class Order(ABC):
    """A rule that says which samples each step sees."""

    samples: int
    """number of samples in the index"""
    batch: int
    """samples of a global step, over all ranks"""
    seed: int
    """seed of the run"""

    def check_batch(self) -> None:
        """Raise ValueError if an epoch has fewer samples than one global batch."""
        if self.samples < self.batch:
            raise ValueError(
                f"batch_size {self.batch} is larger than the data set ({self.samples} samples). Lower --batch_size"
            )

    @property
    def steps_per_epoch(self) -> int:
        """The number of whole global batches in an epoch."""
        return self.samples // self.batch

    def epoch(self, step: int) -> int:
        """Return the epoch of a step, from 0."""
        return step // self.steps_per_epoch

    def ids(self, step: int, rank: int = 0, world: int = 1) -> Ids:
        """Return the sample ids of a rank's share of the step's global batch, int64 [batch // world].

        The shares are of equal size, contiguous and in the order of the ranks.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        share = self.batch // world
        first = within * self.batch + rank * share
        return self._ids(epoch, np.arange(first, first + share))

    @abstractmethod
    def _ids(self, epoch: int, positions: Ids) -> Ids:
        """Return the samples at some positions of an epoch, int64 of the same shape."""

    @abstractmethod
    def substitute(self, step: int, place: int, attempt: int) -> int:
        """Return the id that replaces a bad sample at `place` of the step's global batch.

        `attempt` counts from 1. In one attempt no two places get the same id.
        """


@dataclass(frozen=True)
class SampleOrder(Order):
    """Permutes all samples in each epoch. It needs constant memory, and constant time for any step."""

    samples: int
    """number of samples in the index"""
    batch: int
    """samples of a global step, over all ranks"""
    seed: int
    """seed of the run"""

    def __post_init__(self) -> None:
        self.check_batch()

    def _ids(self, epoch: int, positions: Ids) -> Ids:
        return permute(positions, self.samples, self.seed, epoch)

    def substitute(self, step: int, place: int, attempt: int) -> int:
        """Return the sample that lies `attempt` batches later in the epoch's permutation.

        Each time around the permutation it moves one position further, so that every sample gets its turn.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        ahead = attempt * self.batch
        position = (within * self.batch + place + ahead + ahead // self.samples) % self.samples
        return int(permute([position], self.samples, self.seed, epoch)[0])


@dataclass(frozen=True)
class WholeOrder:
    """Permutes all samples in each epoch, and visits all of them: the last batch of an epoch may be smaller.

    It is for what must take sets of any size. The ranks' shares of a batch are contiguous and in their order. Those of
    the last ranks may be smaller, or empty.
    """

    samples: int
    """number of samples in the index, 1 or more"""
    batch: int
    """samples of a global step, over all ranks"""
    seed: int
    """seed of the run"""

    @property
    def steps_per_epoch(self) -> int:
        """The number of batches in an epoch, the smaller one counted."""
        return -(-self.samples // self.batch)

    def epoch(self, step: int) -> int:
        """Return the epoch of a step, from 0."""
        return step // self.steps_per_epoch

    def ids(self, step: int, rank: int = 0, world: int = 1) -> Ids:
        """Return the sample ids of a rank's share of the step's global batch, int64."""
        first, count = step % self.steps_per_epoch * self.batch, self.count(step)
        share = -(-count // world)
        positions = np.arange(first + min(rank * share, count), first + min((rank + 1) * share, count))
        return permute(positions, self.samples, self.seed, self.epoch(step))

    def count(self, step: int) -> int:
        """Return the number of samples of a step, over all ranks."""
        return min(self.batch, self.samples - step % self.steps_per_epoch * self.batch)


class _Epoch(NamedTuple):
    """The shards of an epoch in their order, and the positions at which shards and windows begin."""

    shards: Ids
    """numbers of the shards in the epoch's order [shards]"""
    starts: Ids
    """position in the epoch at which each shard would begin if samples were not shuffled [shards + 1]"""
    windows: Ids
    """position in the epoch at which each window begins [windows + 1]"""


class ShardOrder(Order):
    """Permutes the shards in each epoch, and all samples within each window of `window` successive shards.

    `sizes` [shards] are the numbers of samples. Shard 0 has samples 0 to sizes[0] − 1, and so on. A size may be 0.
    Windows are numbered through all epochs, so that the next window always has the next number. Every rank's share of a
    step comes from the whole window, so each machine reads every shard once in an epoch. The memory is 16 bytes for
    each shard and 8 bytes for each window, for two epochs. Any step is found by bisection. Threads may share it.
    """

    def __init__(self, sizes: npt.ArrayLike, batch: int, seed: int, window: int) -> None:
        self.sizes: Ids = np.asarray(sizes, np.int64)
        if window < 1:
            raise ValueError(f"data.shuffle_window {window} is too small. Set --data.shuffle_window to 1 or more")
        self.samples, self.batch, self.seed = int(self.sizes.sum()), batch, seed
        self.check_batch()
        self.window = min(window, len(self.sizes))
        self.windows_per_epoch = -(-len(self.sizes) // self.window)
        self._firsts = np.cumsum(self.sizes) - self.sizes  # [shards], the number of a shard's first sample
        # Two epochs, because a step and the windows that are fetched ahead of it may lie in two.
        self._epoch = functools.lru_cache(2)(self._build_epoch)

    def _build_epoch(self, epoch: int) -> _Epoch:
        shards = permute(np.arange(len(self.sizes)), len(self.sizes), self.seed, epoch)
        starts = np.concatenate([[0], np.cumsum(self.sizes[shards])])
        return _Epoch(shards, starts, np.append(starts[: -1 : self.window], starts[-1]))

    def _ids(self, epoch: int, positions: Ids) -> Ids:
        tables = self._epoch(epoch)
        shuffled = np.empty_like(positions)
        windows = _find_interval(tables.windows, positions)
        for window in np.unique(windows):  # one or two, unless windows are smaller than a batch
            inside = windows == window
            start, end = tables.windows[window : window + 2]
            # Part 0 is the permutation of the shards.
            shuffled[inside] = start + permute(
                positions[inside] - start, int(end - start), self.seed, epoch, int(window) + 1
            )
        places = _find_interval(tables.starts, shuffled)
        return self._firsts[tables.shards[places]] + shuffled - tables.starts[places]

    def substitute(self, step: int, place: int, attempt: int) -> int:
        """Return a sample of the same window. Its shards have been fetched already.

        Let the window have n samples, of which m belong to the step. An attempt moves all m by the same distance around
        the window, so no two of them meet. Each attempt moves m further, and one more each time it goes all around.
        After ceil(n / m) · m attempts every sample has had its turn.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        tables = self._epoch(epoch)
        first = within * self.batch
        position = first + place
        window = int(_find_interval(tables.windows, np.array(position)))
        start, end = (int(edge) for edge in tables.windows[window : window + 2])
        size, together = end - start, min(end, first + self.batch) - max(start, first)
        around, once = divmod(attempt, -(-size // together))
        moved = start + (position - start + once * together + around) % size
        return int(self._ids(epoch, np.array([moved]))[0])

    def windows(self, step: int) -> range:
        """Return the numbers of the windows, counted through all epochs, that the step's global batch comes from."""
        epoch, within = divmod(step, self.steps_per_epoch)
        edges = np.array([within * self.batch, (within + 1) * self.batch - 1])
        first, last = _find_interval(self._epoch(epoch).windows, edges).tolist()
        return range(epoch * self.windows_per_epoch + first, epoch * self.windows_per_epoch + last + 1)

    def shards_in_window(self, window: int) -> Ids:
        """Return the shards of a window that have samples, in the epoch's order. None if the epoch drops all of it."""
        epoch, number = divmod(window, self.windows_per_epoch)
        tables = self._epoch(epoch)
        if tables.windows[number] >= self.steps_per_epoch * self.batch:
            return np.empty(0, np.int64)
        shards = tables.shards[number * self.window : (number + 1) * self.window]
        return shards[self.sizes[shards] > 0]

    def shards(self, step: int) -> Ids:
        """Return the shards of the step's windows, each once. They hold its samples and all their substitutes."""
        return np.concatenate([self.shards_in_window(window) for window in self.windows(step)])


def _find_interval(starts: Ids, positions: Ids) -> Ids:
    """Return for each position the k with starts[k] ≤ position < starts[k + 1]. Empty intervals are never returned."""
    return np.searchsorted(starts, positions, "right") - 1
