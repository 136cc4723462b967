"""What a shard folder holds, in plain lines for people: from its manifest and index alone, no picture is decoded.

Memory is flat in the number of samples: the index is read in chunks, and everything is found by counting.
"""

import itertools
import re
import unicodedata
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from shards.layout import DUPLICATES_FILE, REJECTED_FILE, UNLABELLED, Manifest, Rejected

COLUMNS = 80
_BAR = 38  # columns of the longest
_CHUNK = 1 << 18  # records at a time
_NAMED = 5  # classes at either end, and empty ones
_REASONS = 10
_BYTES_EDGES = [digit * 10**power for power in range(3, 8) for digit in (1, 2, 5)][:-1]  # 1 kB … 20 MB
_SIDE_EDGES = [32, 64, 96, 128, 160, 224, 256, 320, 384, 512, 768, 1024, 2048, 4096]  # pixels
_SHAPES = [(1, 3), (1, 2), (9, 16), (2, 3), (3, 4), (1, 1), (4, 3), (3, 2), (16, 9), (2, 1), (3, 1)]  # width, height
_VARYING = re.compile(r"b?'[^']*'|0x[0-9a-f]+|\d+(?:\.\d+)?")  # what differs in reasons of one kind

Column = Callable[[np.ndarray], np.ndarray]  # records → a number >= 0 of each


def describe(manifest: Manifest, records: np.ndarray) -> Iterator[str]:
    """Lines of at most 80 columns about a shard folder with this index, [samples] of RECORD.

    They are safe to print whatever the names in the manifest hold.
    """
    yield from _overview(manifest)
    if len(records):
        yield from _bytes_lines(records)
        yield from _side_lines(records)
        yield from _shape_lines(records)
        yield from _class_lines(records, manifest.classes)
    if manifest.rejected:
        yield from _rejected_lines(manifest.rejected)


def printable(text: str) -> str:
    """`text` in one line that does a terminal no harm: control characters and bytes that are no UTF-8 are escaped."""
    return "".join(character if character.isprintable() else _escape(character) for character in text)


def shortened(text: str, columns: int) -> str:
    """`printable`, in at most `columns` columns of a terminal: what is too long loses its middle."""
    text = printable(text)
    if sum(map(_width, text)) <= columns:
        return text
    tail = (columns - 3) // 2
    return f"{_prefix(text, columns - 3 - tail)}...{_prefix(text[::-1], tail)[::-1]}"


def bin_counts(records: np.ndarray, column: Column, edges: Sequence[float]) -> np.ndarray:
    """How many numbers lie in each bin, [len(edges) + 1]: below edges[0], in edges[0] <= number < edges[1], …"""
    return _tally(records, lambda chunk: np.searchsorted(edges, column(chunk), "right"), len(edges) + 1)


def percentiles(records: np.ndarray, column: Column, percents: Sequence[int]) -> list[float]:
    """The smallest of the numbers that so many percent of them do not exceed, exact to the 7 digits of float32.

    Found by counting the upper, then the lower halves of their bits: those of floats >= 0 sort as the floats do.
    """

    def bits(chunk: np.ndarray) -> np.ndarray:
        return column(chunk).astype(np.float32).view(np.uint32)

    upper = _tally(records, lambda chunk: bits(chunk) >> 16, 1 << 16)
    ends = np.cumsum(upper)

    def ranked(rank: int) -> float:
        high = int(np.searchsorted(ends, rank, "right"))
        lower = _tally(records, lambda chunk: _low_bits(bits(chunk), high), 1 << 16)
        low = int(np.searchsorted(np.cumsum(lower), rank - (ends[high] - upper[high]), "right"))
        return float(np.uint32(high << 16 | low).view(np.float32))

    return [ranked(max(-(-percent * len(records) // 100) - 1, 0)) for percent in percents]


def grouped(rejected: Iterable[Rejected]) -> list[tuple[str, list[Rejected]]]:
    """Reasons with their entries, the most frequent first; reasons that differ only in numbers or quotes are one."""
    groups: defaultdict[str, list[Rejected]] = defaultdict(list)
    for entry in rejected:
        groups[_VARYING.sub("\0", entry.reason)].append(entry)
    named = [(_common([entry.reason for entry in entries]), entries) for entries in groups.values()]
    return sorted(named, key=lambda group: -len(group[1]))


def _common(reasons: Sequence[str]) -> str:
    """The reasons of one group as one: N for numbers and '...' for quotes that are not the same in all of them."""
    columns = zip(*map(_VARYING.findall, reasons), strict=False)
    shown = [values[0] if len(set(values)) == 1 else "N" if values[0][0].isdigit() else "'...'" for values in columns]
    pieces = itertools.zip_longest(_VARYING.split(reasons[0]), shown, fillvalue="")
    return "".join(itertools.chain.from_iterable(pieces))


def _escape(character: str) -> str:
    if 0xDC80 <= ord(character) <= 0xDCFF:  # how Python holds a byte that is no UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def _width(character: str) -> int:
    """Columns of a terminal."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _prefix(text: str, columns: int) -> str:
    ends = list(itertools.accumulate(map(_width, text)))
    return text[: bisect_right(ends, columns)]


def _chunks(records: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(records), _CHUNK):
        yield records[start : start + _CHUNK]


def _tally(records: np.ndarray, column: Column, bins: int) -> np.ndarray:
    """How often `column` is 0, 1, …, bins - 1."""
    counts = np.zeros(bins, np.int64)
    for chunk in _chunks(records):
        counts += np.bincount(column(chunk), minlength=bins)
    return counts


def _low_bits(bits: np.ndarray, high: int) -> np.ndarray:
    return bits[bits >> 16 == high] & 0xFFFF


def _sizes(chunk: np.ndarray) -> np.ndarray:
    return np.asarray(chunk["size"])


def _short_sides(chunk: np.ndarray) -> np.ndarray:
    return np.minimum(chunk["height"], chunk["width"])


def _ratios(chunk: np.ndarray) -> np.ndarray:
    return np.asarray(chunk["width"] / chunk["height"])


def _megapixels(chunk: np.ndarray) -> np.ndarray:
    return np.asarray(chunk["height"] * 1e-6 * chunk["width"])


def _overview(manifest: Manifest) -> Iterator[str]:
    total = sum(shard.bytes for shard in manifest.shards)
    classes = f"{len(manifest.classes):,}" if manifest.classes else "none: no labels"
    yield f"name        {shortened(manifest.name, COLUMNS - 12)}"
    yield f"format      version {manifest.format_version}{', tars of another maker' if manifest.foreign else ''}"
    yield f"samples     {manifest.samples:,}"
    yield f"classes     {classes}"
    yield f"shards      {len(manifest.shards):,}, {amount(total)} ({total:,} bytes)"
    yield f"left out    {len(manifest.rejected):,}"
    yield f"ignored     {manifest.ignored:,} files that are no pictures by their names"
    yield f"duplicates  {manifest.duplicates:,}{f' (kept; see {DUPLICATES_FILE})' if manifest.duplicates else ''}"
    head = "options     "
    for key, value in sorted(manifest.options.items()):
        yield shortened(f"{head}{key} {'-' if value is None else value}", COLUMNS)
        head = " " * len(head)


def _bytes_lines(records: np.ndarray) -> Iterator[str]:
    total = sum(int(_sizes(chunk).sum(dtype=np.uint64)) for chunk in _chunks(records))
    least, median, ninety, most = map(amount, percentiles(records, _sizes, (0, 50, 90, 100)))
    yield ""
    yield f"Picture bytes: min {least}, median {median}, p90 {ninety}, max {most}"
    between = [f"{amount(low)} - {amount(high)}" for low, high in itertools.pairwise(_BYTES_EDGES)]
    names = [f"under {amount(_BYTES_EDGES[0])}", *between, f"from {amount(_BYTES_EDGES[-1])}"]
    yield from _bars(names, bin_counts(records, _sizes, _BYTES_EDGES))
    yield f"  all together: {amount(total)} ({total:,} bytes)"


def _side_lines(records: np.ndarray) -> Iterator[str]:
    counts = bin_counts(records, _short_sides, _SIDE_EDGES)
    yield ""
    yield f"Short side in pixels: {_spread(percentiles(records, _short_sides, (0, 50, 100)), ',.0f')}"
    between = [f"{low} - {high - 1}" for low, high in itertools.pairwise(_SIDE_EDGES)]
    yield from _bars([f"under {_SIDE_EDGES[0]}", *between, f"from {_SIDE_EDGES[-1]}"], counts)
    for side, crop in ((96, "local"), (224, "global")):
        under = int(counts[: _SIDE_EDGES.index(side) + 1].sum())
        yield f"  below {side}, where every {crop} crop is enlarged: {under:,} ({_share(under, len(records))})"


def _shape_lines(records: np.ndarray) -> Iterator[str]:
    ratios = [width / height for width, height in _SHAPES]
    edges = [(low * high) ** 0.5 for low, high in itertools.pairwise(ratios)]
    first, *others, last = (f"{width}:{height}" for width, height in _SHAPES)
    yield ""
    yield "Width to height: the nearest of these"
    yield from _bars([f"{first} or narrower", *others, f"{last} or wider"], bin_counts(records, _ratios, edges))
    yield f"  megapixels: {_spread(percentiles(records, _megapixels, (0, 50, 100)), '.3g')}"


def _class_lines(records: np.ndarray, classes: Sequence[str]) -> Iterator[str]:
    counts = _tally(records, lambda chunk: chunk["label"] - UNLABELLED, len(classes) + 1)
    unlabelled, counts = int(counts[0]), counts[1:]
    order = np.argsort(-counts, kind="stable")
    filled, empty = np.split(order, [np.count_nonzero(counts)])
    yield ""
    yield f"Labels: {len(filled):,} classes with samples, {len(empty):,} without; {unlabelled:,} samples unlabelled"
    if len(filled):
        ranks = [-1, len(filled) // 2, 0]
        yield f"  samples a class: {_spread(counts[filled[ranks]], ',')}"
    ends = [filled] if len(filled) <= 2 * _NAMED else [filled[:_NAMED], filled[-_NAMED:]]
    for end in ends:
        if end is not ends[0]:
            yield f"  {'...':>15}"
        for label in end:
            share = _share(counts[label], len(records))
            yield f"  {counts[label]:>15,} {share:>8}  {shortened(classes[label], COLUMNS - 28)}"
    for label in empty[:_NAMED]:
        yield f"  {'0':>15} {'0 %':>8}  {shortened(classes[label], COLUMNS - 28)}"
    if len(empty) > _NAMED:
        yield f"  {'...':>15}  and {len(empty) - _NAMED:,} more without samples"


def _rejected_lines(rejected: Sequence[Rejected]) -> Iterator[str]:
    groups = grouped(rejected)
    yield ""
    yield f"Left out: {len(rejected):,} pictures; each of them is named in {REJECTED_FILE}"
    for reason, entries in groups[:_REASONS]:
        yield f"  {len(entries):>15,}  {shortened(reason, COLUMNS - 19)}"
        yield f"  {'':>15}  such as {shortened(entries[0].source, COLUMNS - 27)}"
    if others := sum(len(entries) for _, entries in groups[_REASONS:]):
        yield f"  {others:>15,}  for {len(groups) - _REASONS:,} other reasons"


def _bars(names: Sequence[str], counts: np.ndarray) -> Iterator[str]:
    """A line a bin, from the first to the last that is not empty."""
    filled = np.flatnonzero(counts)
    for place in range(filled[0], filled[-1] + 1):
        count = int(counts[place])
        bar = "#" * max(round(_BAR * count / int(counts.max())), int(count > 0))
        yield f"  {names[place]:>15} {count:>13,} {_share(count, int(counts.sum())):>7}  {bar}".rstrip()


def _spread(numbers: Iterable[float], form: str) -> str:
    least, median, most = (format(number, form) for number in numbers)
    return f"min {least}, median {median}, max {most}"


def _share(count: int, total: int) -> str:
    return "< 0.1 %" if 0 < count < total / 1000 else f"{100 * count / total:.1f} %"


def amount(size: float) -> str:
    """Bytes in decimal units, as ``--shard-size`` counts them, to three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} PB"
