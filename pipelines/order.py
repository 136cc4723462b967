"""Which samples a step sees: stateless permutations of the data set for each epoch, the same for every world size.

An epoch is `samples // batch` steps. The remainder of less than one global batch is dropped, and since each epoch has
a permutation of its own, it falls on other samples each time.

`Order` permutes all samples at once: for local disks and the page cache. `ShardOrder` permutes the shards, and then
the samples of a few shards at a time: for storage that is read best from one end to the other.
"""

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.counters import ORDER, key_of, philox

Ids = npt.NDArray[np.int64]

# Luby and Rackoff need four rounds for a strong permutation; two more cost nothing that shows.
_ROUNDS = 6


def permute(positions: npt.ArrayLike, size: int, seed: int, epoch: int, part: int = 0) -> Ids:
    """Where a pseudo-random permutation of range(size) sends `positions` (integers in [0, size)), elementwise.

    `part` (below 2**32) keeps the permutations of one epoch apart. A Feistel network over the smallest even number of
    bits that holds `size`, walked again for as long as it lands outside (Black and Rogaway, "Ciphers with arbitrary
    finite domains", 2002): constant memory, and fewer than four walks on average, whatever the size.
    """
    half = max(1, -(-(size - 1).bit_length() // 2))
    ids = _feistel(np.asarray(positions, np.uint64), half, seed, epoch, part)
    while (outside := ids >= size).any():
        ids[outside] = _feistel(ids[outside], half, seed, epoch, part)
    return ids.astype(np.int64)


def _feistel(values: npt.NDArray[np.uint64], half: int, seed: int, epoch: int, part: int) -> npt.NDArray[np.uint64]:
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = values >> shift, values & mask
    key = key_of(seed, ORDER)
    zero = np.zeros_like(right)
    for number in range(_ROUNDS):
        counter = (right, zero + np.uint64(epoch), zero + np.uint64(number), zero + np.uint64(part))
        left, right = right, left ^ (philox(counter, key)[0] & mask)
    return (left << shift) | right


class AnyOrder(ABC):
    """What every order has: `samples` in the index, `batch` images a global step, a seed, and epochs of whole steps."""

    samples: int
    batch: int
    seed: int

    def refuse_large_batch(self) -> None:
        """Raises ValueError where not one global batch fits in an epoch."""
        if self.samples < self.batch:
            raise ValueError(
                f"batch_size {self.batch} is larger than the data set ({self.samples} samples): lower --batch_size"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.batch

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def ids(self, step: int, rank: int = 0, world: int = 1) -> Ids:
        """Sample ids of `step`: the global batch, or rank's equal contiguous share of it. int64 [batch // world]."""
        epoch, within = divmod(step, self.steps_per_epoch)
        share = self.batch // world
        first = within * self.batch + rank * share
        return self._ids(epoch, np.arange(first, first + share))

    @abstractmethod
    def _ids(self, epoch: int, positions: Ids) -> Ids:
        """The samples at some positions of an epoch, int64 of the same shape."""

    @abstractmethod
    def substitute(self, step: int, place: int, attempt: int) -> int:
        """The id that stands in for a bad sample at `place` of the step's global batch, at `attempt` from 1 on.

        No two places share the substitute of one attempt.
        """


@dataclass(frozen=True)
class Order(AnyOrder):
    """Each epoch is one permutation of all samples. Constant memory, and constant time to reach any step."""

    samples: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
        self.refuse_large_batch()

    def _ids(self, epoch: int, positions: Ids) -> Ids:
        return permute(positions, self.samples, self.seed, epoch)

    def substitute(self, step: int, place: int, attempt: int) -> int:
        """The one `attempt` batches later in the epoch's permutation, one further with each time round, so that every
        sample gets its turn."""
        epoch, within = divmod(step, self.steps_per_epoch)
        ahead = attempt * self.batch
        position = (within * self.batch + place + ahead + ahead // self.samples) % self.samples
        return int(permute([position], self.samples, self.seed, epoch)[0])


class _Epoch(NamedTuple):
    """The shards of an epoch in their order, and where they and the windows of them begin."""

    shards: Ids  # [shards]
    starts: Ids  # [shards + 1], the position in the epoch at which a shard's samples would begin, unmixed
    windows: Ids  # [windows + 1], the position at which a window begins


class ShardOrder(AnyOrder):
    """Each epoch permutes the shards, and all samples within each window of `window` shards that follow one another.

    `sizes` [shards] are the samples of each, which number them: shard 0 has samples 0 to sizes[0] − 1, and so on; 0 is
    allowed. Windows are numbered through all epochs, so that the next one is always one more. Every rank's share of a
    step comes from the whole window, so each machine reads every shard once an epoch. Memory is 16 bytes a shard for
    each of two epochs, and 8 bytes a window; any step is reached by bisection. Safe in threads.
    """

    def __init__(self, sizes: npt.ArrayLike, batch: int, seed: int, window: int) -> None:
        self.sizes: Ids = np.asarray(sizes, np.int64)
        if window < 1:
            raise ValueError(f"a window of {window} shards: give --data.window 1 or more")
        self.samples, self.batch, self.seed = int(self.sizes.sum()), batch, seed
        self.refuse_large_batch()
        self.window = min(window, len(self.sizes))
        self.windows_per_epoch = -(-len(self.sizes) // self.window)
        self._firsts = np.cumsum(self.sizes) - self.sizes  # [shards], the number of a shard's first sample
        # The step and what is fetched ahead of it may lie in two epochs.
        self._epoch = functools.lru_cache(2)(self._tables)

    def _tables(self, epoch: int) -> _Epoch:
        shards = permute(np.arange(len(self.sizes)), len(self.sizes), self.seed, epoch)
        starts = np.concatenate([[0], np.cumsum(self.sizes[shards])])
        return _Epoch(shards, starts, np.append(starts[: -1 : self.window], starts[-1]))

    def _ids(self, epoch: int, positions: Ids) -> Ids:
        tables = self._epoch(epoch)
        mixed = np.empty_like(positions)
        windows = _holding(tables.windows, positions)
        for window in np.unique(windows):  # one or two, unless windows are smaller than a batch
            inside = windows == window
            start, end = tables.windows[window : window + 2]
            # Part 0 is the permutation of the shards.
            mixed[inside] = start + permute(
                positions[inside] - start, int(end - start), self.seed, epoch, int(window) + 1
            )
        places = _holding(tables.starts, mixed)
        return self._firsts[tables.shards[places]] + mixed - tables.starts[places]

    def substitute(self, step: int, place: int, attempt: int) -> int:
        """A sample of the same window, whose shards are at hand.

        Let m places of the step lie in the window of n samples. An attempt moves all of them by the same way around
        the window, so that no two meet: m further with each attempt, and one more each time m more would lead around.
        After ceil(n / m) · m attempts every sample had its turn.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        tables = self._epoch(epoch)
        first = within * self.batch
        position = first + place
        window = int(_holding(tables.windows, np.array(position)))
        start, end = (int(edge) for edge in tables.windows[window : window + 2])
        size, together = end - start, min(end, first + self.batch) - max(start, first)
        around, once = divmod(attempt, -(-size // together))
        moved = start + (position - start + once * together + around) % size
        return int(self._ids(epoch, np.array([moved]))[0])

    def windows(self, step: int) -> range:
        """The windows that the global batch of `step` comes from, by their numbers through all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        edges = np.array([within * self.batch, (within + 1) * self.batch - 1])
        first, last = _holding(self._epoch(epoch).windows, edges).tolist()
        return range(epoch * self.windows_per_epoch + first, epoch * self.windows_per_epoch + last + 1)

    def shards_of(self, window: int) -> Ids:
        """The shards of a window that have samples, in the order of the epoch; none where the epoch drops all of it."""
        epoch, number = divmod(window, self.windows_per_epoch)
        tables = self._epoch(epoch)
        if tables.windows[number] >= self.steps_per_epoch * self.batch:
            return np.empty(0, np.int64)
        shards = tables.shards[number * self.window : (number + 1) * self.window]
        return shards[self.sizes[shards] > 0]

    def shards(self, step: int) -> Ids:
        """The shards of the windows of `step`: its samples and their substitutes are in them. Each is named once."""
        return np.concatenate([self.shards_of(window) for window in self.windows(step)])


def _holding(starts: Ids, positions: Ids) -> Ids:
    """The place k of each position with starts[k] ≤ position < starts[k + 1]; what is empty holds none."""
    return np.searchsorted(starts, positions, "right") - 1
