"""Statistics of the samples in an index. Memory does not grow with their number: the index is read in chunks."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

_CHUNK = 1 << 18  # records at a time

Column = Callable[[np.ndarray], np.ndarray]  # records → one number >= 0 per record


def count_in_bins(records: np.ndarray, column: Column, edges: Sequence[float]) -> np.ndarray:
    """Return how many numbers lie in each bin, [len(edges) + 1].

    The bins are: below edges[0], edges[0] <= number < edges[1], and so on.
    """
    return count_values(records, lambda chunk: np.searchsorted(edges, column(chunk), "right"), len(edges) + 1)


def count_values(records: np.ndarray, column: Column, bins: int) -> np.ndarray:
    """Return how often `column` is 0, 1, …, bins - 1, [bins] int64."""
    counts = np.zeros(bins, np.int64)
    for chunk in read_chunks(records):
        counts += np.bincount(column(chunk), minlength=bins)
    return counts


def compute_percentiles(records: np.ndarray, column: Column, percents: Sequence[int]) -> list[float]:
    """Return, for each percent, the smallest number that so many percent of the numbers do not exceed.

    Exact to the 7 digits of float32. The upper, then the lower halves of the numbers' bits are counted: the bits of
    floats >= 0 sort as the floats do.
    """

    def get_bits(chunk: np.ndarray) -> np.ndarray:
        return column(chunk).astype(np.float32).view(np.uint32)

    upper = count_values(records, lambda chunk: get_bits(chunk) >> 16, 1 << 16)
    ends = np.cumsum(upper)

    def find_by_rank(rank: int) -> float:
        high = int(np.searchsorted(ends, rank, "right"))
        lower = count_values(records, lambda chunk: _get_low_bits(get_bits(chunk), high), 1 << 16)
        low = int(np.searchsorted(np.cumsum(lower), rank - (ends[high] - upper[high]), "right"))
        return float(np.uint32(high << 16 | low).view(np.float32))

    return [find_by_rank(max(-(-percent * len(records) // 100) - 1, 0)) for percent in percents]


def read_chunks(records: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the records, a bounded number at a time."""
    for start in range(0, len(records), _CHUNK):
        yield records[start : start + _CHUNK]


def _get_low_bits(bits: np.ndarray, high: int) -> np.ndarray:
    return bits[bits >> 16 == high] & 0xFFFF
