"""Which samples a step sees: a stateless permutation of the data set for each epoch, the same for every world size.

An epoch is `samples // batch` steps. The remainder of less than one global batch is dropped, and since each epoch has
a permutation of its own, it falls on other samples each time.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.counters import ORDER, key_of, philox

Ids = npt.NDArray[np.int64]

# Luby and Rackoff need four rounds for a strong permutation; two more cost nothing that shows.
_ROUNDS = 6


def permute(positions: npt.ArrayLike, size: int, seed: int, epoch: int) -> Ids:
    """Where a pseudo-random permutation of range(size) sends `positions` (integers in [0, size)), elementwise.

    A Feistel network over the smallest even number of bits that holds `size`, walked again for as long as it lands
    outside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): constant memory, and fewer than four
    walks on average, whatever the size.
    """
    half = max(1, -(-(size - 1).bit_length() // 2))
    ids = _feistel(np.asarray(positions, np.uint64), half, seed, epoch)
    while (outside := ids >= size).any():
        ids[outside] = _feistel(ids[outside], half, seed, epoch)
    return ids.astype(np.int64)


def _feistel(values: npt.NDArray[np.uint64], half: int, seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = values >> shift, values & mask
    key = key_of(seed, ORDER)
    zero = np.zeros_like(right)
    for number in range(_ROUNDS):
        word = philox((right, zero + np.uint64(epoch), zero + np.uint64(number), zero), key)[0]
        left, right = right, left ^ (word & mask)
    return (left << shift) | right


@dataclass(frozen=True)
class Order:
    """The order of a run: `samples` in the index, `batch` images a global step, and a seed."""

    samples: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
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
        return permute(np.arange(first, first + share), self.samples, self.seed, epoch)

    def substitute(self, step: int, place: int, attempt: int) -> int:
        """The id that stands in for a bad sample at `place` of the step's global batch: the one `attempt` (from 1)
        batches later in the epoch's permutation, one further with each time round, so that every sample gets its turn.
        No two places share the substitute of one attempt."""
        epoch, within = divmod(step, self.steps_per_epoch)
        ahead = attempt * self.batch
        position = (within * self.batch + place + ahead + ahead // self.samples) % self.samples
        return int(permute([position], self.samples, self.seed, epoch)[0])
