"""What the records of an index may hold. Its sha256 is as easily forged as the rest, so every record is checked."""

from collections.abc import Iterator, Sequence

import numpy as np

from shards.layout import BLOCK, MAX_IMAGE_BYTES, MAX_SIDE, UNLABELED

_CHUNK = 1 << 14  # records at a time: their columns fit into a core's cache


def find_record_problem(
    records: np.ndarray, shard_bytes: Sequence[int], classes: int, max_pixels: float | None
) -> str | None:
    """Return what is wrong with the first record that packing never writes, in one line, or None.

    `records` is [samples] of RECORD, `shard_bytes` has the length of each shard, `classes` is their number.
    `max_pixels` is the limit of height × width, or None where it is not known.
    """
    lengths = np.array(shard_bytes, np.uint64)
    for start in range(0, len(records), _CHUNK):
        for field, wrong in _find_wrong_values(records[start : start + _CHUNK], lengths, classes, max_pixels):
            if wrong.any():
                number = start + int(wrong.argmax())
                values = ", ".join(f"{name} {records[number][name]}" for name in field.split())
                return f"sample {number} has {values}, which packing never writes"
    return None


def _find_wrong_values(
    chunk: np.ndarray, lengths: np.ndarray, classes: int, max_pixels: float | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield fields, and which records have a wrong value in them, [records] bool. The caller stops at the first."""
    shard, offset, size, height, width, label = (
        np.ascontiguousarray(chunk[name]) for name in ("shard", "offset", "size", "height", "width", "label")
    )
    yield "shard", shard >= len(lengths)
    yield "size", (size == 0) | (size > MAX_IMAGE_BYTES)
    ends = lengths[shard]
    yield "offset size", (offset < BLOCK) | (offset > ends) | (offset + size > ends)  # a sum may exceed 64 bits
    yield "height width", (height == 0) | (width == 0) | (height > MAX_SIDE) | (width > MAX_SIDE)
    if max_pixels is not None:
        yield "height width", height * width.astype(np.uint64) > max_pixels
    yield "label", (label < UNLABELED) | (label >= classes)
