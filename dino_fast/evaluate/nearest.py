"""The nearest features by cosine. What is searched may be larger than the device's memory: it is moved in parts."""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_SIMILARITIES = 2**26  # held at once: 256 MB in float32

_PART = 2**14  # rows that are searched at once at least, where memory allows it


def find_nearest(queries: Tensor, database: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the cosines, and the numbers in `database`, of the k features nearest to each query, nearest first.

    queries: [M, D]; database: [N, D], of any floating type, on any device, or memory-mapped. Both results are
    [M, min(k, N)], on the queries' device and, for the cosines, of their type. At most 2²⁶ similarities are held
    at once.
    """
    found = [_search(part, database, k) for part in F.normalize(queries, dim=1).split(split_rows(len(database)))]
    cosines, numbers = zip(*found, strict=True)
    return torch.cat(cosines), torch.cat(numbers)


def split_rows(columns: int) -> int:
    """Return how many rows of a matrix with this many columns are computed at once."""
    return max(1, MAX_SIMILARITIES // max(1, min(columns, _PART)))


def _search(queries: Tensor, database: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Do what `find_nearest` does for queries of length 1."""
    cosines = queries.new_empty(len(queries), 0)
    numbers = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    first = 0
    for part in database.split(max(1, MAX_SIMILARITIES // len(queries))):
        similarities = queries @ F.normalize(part.to(queries), dim=1).T
        best = similarities.topk(min(k, len(part)), dim=1)
        cosines = torch.cat([cosines, best.values], 1)
        numbers = torch.cat([numbers, best.indices + first], 1)
        first += len(part)
        kept = cosines.topk(min(k, first), dim=1)
        cosines, numbers = kept.values, numbers.gather(1, kept.indices)
    return cosines, numbers
