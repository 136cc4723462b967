"""Describe a shard folder in plain lines for people, from its manifest and index alone. No image is decoded."""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from shards.counts import Counts
from shards.inspect.statistics import Column, compute_percentiles, count_in_bins, count_values, read_chunks
from shards.layout import DUPLICATES_FILE, REJECTED_FILE, UNLABELED
from shards.manifest import Manifest, Rejected
from shards.text import format_bytes, shorten

COLUMNS = 80
_BAR = 38  # columns of the longest bar
_NAMED = 5  # classes at either end, and empty ones
_REASONS = 10
_BYTES_EDGES = [digit * 10**power for power in range(3, 8) for digit in (1, 2, 5)][:-1]  # 1 kB … 20 MB
_SIDE_EDGES = [32, 64, 96, 128, 160, 224, 256, 320, 384, 512, 768, 1024, 2048, 4096]  # pixels
_RATIOS = [(1, 3), (1, 2), (9, 16), (2, 3), (3, 4), (1, 1), (4, 3), (3, 2), (16, 9), (2, 1), (3, 1)]  # width, height
_VARYING = re.compile(r"b?'[^']*'|0x[0-9a-f]+|\d+(?:\.\d+)?")  # what differs in reasons of one kind


def describe(manifest: Manifest, records: np.ndarray) -> Iterator[str]:
    """Yield lines about a shard folder with this index, [samples] of RECORD.

    A line has at most 80 columns, and is safe to print whatever the names in the manifest hold.
    """
    yield from _describe_manifest(manifest)
    if len(records):
        yield from _describe_bytes(records)
        yield from _describe_sides(records)
        yield from _describe_ratios(records)
        yield from _describe_classes(records, manifest.classes)
    if manifest.rejected:
        yield from _describe_rejected(manifest.rejected)


def group_rejected(rejected: Iterable[Rejected]) -> list[tuple[str, list[Rejected]]]:
    """Return reasons with their images, the most frequent first.

    Reasons that differ only in numbers or in quoted text are one.
    """
    groups: defaultdict[str, list[Rejected]] = defaultdict(list)
    for entry in rejected:
        groups[_VARYING.sub("\0", entry.reason)].append(entry)
    named = [(_merge_reasons([entry.reason for entry in entries]), entries) for entries in groups.values()]
    return sorted(named, key=lambda group: -len(group[1]))


def _merge_reasons(reasons: Sequence[str]) -> str:
    """Return the reasons of one group as one: N for numbers and '...' for quotes that are not the same in all."""
    columns = zip(*map(_VARYING.findall, reasons), strict=False)
    shown = [values[0] if len(set(values)) == 1 else "N" if values[0][0].isdigit() else "'...'" for values in columns]
    pieces = itertools.zip_longest(_VARYING.split(reasons[0]), shown, fillvalue="")
    return "".join(itertools.chain.from_iterable(pieces))


def _get_sizes(chunk: np.ndarray) -> np.ndarray:
    return np.asarray(chunk["size"])


def _get_short_sides(chunk: np.ndarray) -> np.ndarray:
    return np.minimum(chunk["height"], chunk["width"])


def _compute_ratios(chunk: np.ndarray) -> np.ndarray:
    return np.asarray(chunk["width"] / chunk["height"])


def _compute_megapixels(chunk: np.ndarray) -> np.ndarray:
    return np.asarray(chunk["height"] * 1e-6 * chunk["width"])


def _describe_manifest(manifest: Manifest) -> Iterator[str]:
    total = sum(shard.bytes for shard in manifest.shards)
    yield f"name        {shorten(manifest.name, COLUMNS - 12)}"
    yield f"format      version {manifest.format_version}{', tars of another program' if manifest.foreign else ''}"
    yield f"samples     {manifest.samples:,}"
    yield f"classes     {f'{len(manifest.classes):,}' if manifest.classes else 'none (no labels)'}"
    yield f"shards      {len(manifest.shards):,}, {format_bytes(total)} ({total:,} bytes)"
    yield f"rejected    {len(manifest.rejected):,}"
    yield f"ignored     {manifest.ignored:,} files whose names are not those of images"
    kept = f" (kept, listed in {DUPLICATES_FILE})" if manifest.duplicates else ""
    yield f"duplicates  {manifest.duplicates:,}{kept}"
    counts = manifest.counts
    if counts.converted:
        yield f"converted   {counts.converted:,} images of other types than JPEG, PNG and WebP"
    if counts.gray16:
        yield f"16-bit gray {counts.gray16:,} images{_describe_largest(counts)}; the high byte is kept"
    if counts.gray16_scaled:
        yield f"16-bit gray {counts.gray16_scaled:,} images{_describe_largest(counts)}; made 8-bit"
    if counts.turned_in_training:
        yield f"EXIF        {counts.turned_in_training:,} images to be turned, which training does not do (--upright)"
    if counts.turned_upright:
        yield f"upright     {counts.turned_upright:,} images turned as their EXIF orientation said"
    head = "options     "
    for key, value in sorted(manifest.options.items()):
        yield shorten(f"{head}{key} {'none' if value is None else value}", COLUMNS)
        head = " " * len(head)


def _describe_largest(counts: Counts) -> str:
    return f", largest value {counts.gray16_largest:,}" if counts.gray16_largest else ""


def _describe_bytes(records: np.ndarray) -> Iterator[str]:
    total = sum(int(_get_sizes(chunk).sum(dtype=np.uint64)) for chunk in read_chunks(records))
    least, median, ninety, most = map(format_bytes, compute_percentiles(records, _get_sizes, (0, 50, 90, 100)))
    yield ""
    yield f"Bytes per image: min {least}, median {median}, p90 {ninety}, max {most}"
    between = [f"{format_bytes(low)} - {format_bytes(high)}" for low, high in itertools.pairwise(_BYTES_EDGES)]
    names = [f"under {format_bytes(_BYTES_EDGES[0])}", *between, f"from {format_bytes(_BYTES_EDGES[-1])}"]
    yield from _draw_bars(names, count_in_bins(records, _get_sizes, _BYTES_EDGES))
    yield f"  total: {format_bytes(total)} ({total:,} bytes)"


def _describe_sides(records: np.ndarray) -> Iterator[str]:
    counts = count_in_bins(records, _get_short_sides, _SIDE_EDGES)
    yield ""
    yield f"Short side in pixels: {_format_range(records, _get_short_sides, ',.0f')}"
    between = [f"{low} - {high - 1}" for low, high in itertools.pairwise(_SIDE_EDGES)]
    yield from _draw_bars([f"under {_SIDE_EDGES[0]}", *between, f"from {_SIDE_EDGES[-1]}"], counts)
    for side, crop in ((96, "local"), (224, "global")):
        under = int(counts[: _SIDE_EDGES.index(side) + 1].sum())
        yield f"  under {side}, so that every {crop} crop is upscaled: {under:,} ({_format_share(under, len(records))})"


def _describe_ratios(records: np.ndarray) -> Iterator[str]:
    ratios = [width / height for width, height in _RATIOS]
    edges = [(low * high) ** 0.5 for low, high in itertools.pairwise(ratios)]
    first, *others, last = (f"{width}:{height}" for width, height in _RATIOS)
    counts = count_in_bins(records, _compute_ratios, edges)
    yield ""
    yield "Width to height, rounded to the nearest of these:"
    yield from _draw_bars([f"{first} or narrower", *others, f"{last} or wider"], counts)
    yield f"  megapixels: {_format_range(records, _compute_megapixels, '.3g')}"


def _describe_classes(records: np.ndarray, classes: Sequence[str]) -> Iterator[str]:
    counts = count_values(records, lambda chunk: chunk["label"] - UNLABELED, len(classes) + 1)
    unlabeled, counts = int(counts[0]), counts[1:]
    order = np.argsort(-counts, kind="stable")
    filled, empty = np.split(order, [np.count_nonzero(counts)])
    yield ""
    yield f"Labels: {len(filled):,} classes with samples, {len(empty):,} without; {unlabeled:,} samples unlabeled"
    if len(filled):
        most, median, least = (counts[filled[rank]] for rank in (0, len(filled) // 2, -1))
        yield f"  samples per class: min {least:,}, median {median:,}, max {most:,}"
    ends = [filled] if len(filled) <= 2 * _NAMED else [filled[:_NAMED], filled[-_NAMED:]]
    for end in ends:
        if end is not ends[0]:
            yield f"  {'...':>15}"
        for label in end:
            yield _format_class(classes[label], f"{counts[label]:,}", _format_share(counts[label], len(records)))
    for label in empty[:_NAMED]:
        yield _format_class(classes[label], "0", "0 %")
    if len(empty) > _NAMED:
        yield f"  {'...':>15}  and {len(empty) - _NAMED:,} more without samples"


def _format_class(name: str, count: str, share: str) -> str:
    return f"  {count:>15} {share:>8}  {shorten(name, COLUMNS - 28)}"


def _describe_rejected(rejected: Sequence[Rejected]) -> Iterator[str]:
    groups = group_rejected(rejected)
    yield ""
    yield f"Rejected: {len(rejected):,} images, all listed in {REJECTED_FILE}. Their reasons:"
    for reason, entries in groups[:_REASONS]:
        yield f"  {len(entries):>15,}  {shorten(reason, COLUMNS - 19)}"
        yield f"  {'':>15}  such as {shorten(entries[0].source, COLUMNS - 27)}"
    if others := sum(len(entries) for _, entries in groups[_REASONS:]):
        yield f"  {others:>15,}  for {len(groups) - _REASONS:,} other reasons"


def _draw_bars(names: Sequence[str], counts: np.ndarray) -> Iterator[str]:
    """Yield one line per bin, from the first to the last that is not empty."""
    filled = np.flatnonzero(counts)
    for place in range(filled[0], filled[-1] + 1):
        count = int(counts[place])
        bar = "#" * max(round(_BAR * count / int(counts.max())), int(count > 0))
        yield f"  {names[place]:>15} {count:>13,} {_format_share(count, int(counts.sum())):>7}  {bar}".rstrip()


def _format_range(records: np.ndarray, column: Column, form: str) -> str:
    least, median, most = (format(number, form) for number in compute_percentiles(records, column, (0, 50, 100)))
    return f"min {least}, median {median}, max {most}"


def _format_share(count: int, total: int) -> str:
    return "< 0.1 %" if 0 < count < total / 1000 else f"{100 * count / total:.1f} %"
