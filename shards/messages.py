"""The lines that make-shards prints. They are safe to print whatever names are in them."""

import os
import sys
from collections.abc import Iterator, Sequence

from shards.counts import Counts
from shards.errors import UserError
from shards.images.gray16 import MOST
from shards.inspect.channels import ChannelStatistics
from shards.inspect.check import Report
from shards.layout import DUPLICATES_FILE, REJECTED_FILE, UNLABELED
from shards.manifest import Manifest
from shards.packing.pack import PackResult
from shards.sources.listing import Listing
from shards.text import escape_unprintable, format_count, list_first

_NAMED = 5  # rejected images that are printed in full


def print_line(line: str) -> None:
    """Print a line. It does not matter if nobody reads it (`| head`). Raises UserError where it cannot be written."""
    try:
        print(escape_unprintable(line), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        raise UserError(f"cannot print: {error.strerror}. Send the output elsewhere.") from error


def describe_listing(listing: Listing, strict: bool = False) -> Iterator[str]:
    """Yield what was found in SRC, with the first images that are left out. Where `strict`, with all of them."""
    images = format_count(len(listing), "image")
    labels = f"no labels ({listing.hint})" if listing.hint else "no labels"
    if listing.classes:
        labels = f"{format_count(len(listing.classes), 'class')} ({list_first(listing.classes)})"
    unlabeled = int((listing.labels == UNLABELED).sum())
    if listing.classes and unlabeled:
        labels += f", {format_count(unlabeled, 'image')} without a label"
    ignored = format_count(listing.ignored, "other file")
    yield f"{listing.root}: {images} (format {listing.format}), {labels}, {ignored} ignored"
    if listing.left_out:
        yield f"{format_count(len(listing.left_out), 'image')} cannot be listed, and will be left out:"
        yield from _list_reasons(listing.left_out, len(listing.left_out) if strict else _NAMED)


def describe_pack(result: PackResult, out: str, seconds: float) -> Iterator[str]:
    """Yield what `pack` did."""
    if result.was_complete:
        yield f"{out}: already complete, nothing to do"
    yield from describe_shards(result.manifest, out)
    if result.kept_shards and not result.was_complete:
        yield f"{format_count(result.kept_shards, 'shard')} kept from an earlier run"
    if result.images:
        yield f"{seconds:.1f} s, {result.images / seconds:.0f} img/s"


def describe_shards(manifest: Manifest, out: str) -> Iterator[str]:
    """Yield what is in a shard folder."""
    total = sum(shard.bytes for shard in manifest.shards)
    classes = format_count(len(manifest.classes), "class") if manifest.classes else "no labels"
    images, shards = format_count(manifest.samples, "image"), format_count(len(manifest.shards), "shard")
    yield f"{out}: {images}, {classes}, {shards}, {format_count(total, 'byte')}"
    if manifest.rejected:
        where = os.path.join(out, REJECTED_FILE)
        yield f"{format_count(len(manifest.rejected), 'image')} rejected, listed with the reasons in {where}"
        yield from _list_reasons([(entry.source, entry.reason) for entry in manifest.rejected[: _NAMED + 1]], _NAMED)
    yield from _describe_counts(manifest.counts)
    if manifest.duplicates:
        where = os.path.join(out, DUPLICATES_FILE)
        images = format_count(manifest.duplicates, "image")
        yield f"{images} with the same bytes as another, kept, and listed in {where}"


def _list_reasons(images: Sequence[tuple[str, str]], most: int) -> Iterator[str]:
    """Yield a line for each of the first `most` images, with its reason, and an ellipsis where there are more."""
    yield from (f"  {source}: {reason}" for source, reason in images[:most])
    if len(images) > most:
        yield "  …"


def _describe_counts(counts: Counts) -> Iterator[str]:
    """Yield what is worth knowing before training, with the flags of ``make-shards pack`` that change it."""
    if counts.converted:
        yield f"{format_count(counts.converted, 'image')} of other types converted"
    if counts.turned_upright:
        yield f"{format_count(counts.turned_upright, 'image')} turned upright, as the EXIF orientation says"
    if counts.gray16_scaled:
        images = format_count(counts.gray16_scaled, "image")
        yield f"{images} of 16-bit grayscale made 8-bit{_describe_largest(counts)}"
    if counts.gray16:
        images = format_count(counts.gray16, "image")
        yield f"{images} of 16-bit grayscale{_describe_largest(counts)}. Of these the high byte is kept"
        if 0 < counts.gray16_largest < MOST / 4:
            yield "They are nearly black in training. Pack with --gray16 stretch, or with --gray16 window LOW HIGH"
    if counts.turned_in_training:
        images = format_count(counts.turned_in_training, "image")
        yield f"{images} with an EXIF orientation, which training ignores. Pack with --upright to turn them"


def _describe_largest(counts: Counts) -> str:
    return f", largest value {counts.gray16_largest:,} of {MOST:,}" if counts.gray16_largest else ""


def describe_report(report: Report, folder: str, seconds: float) -> Iterator[str]:
    """Yield what `check` found."""
    yield from report.problems
    problems = format_count(len(report.problems), "problem") if report.problems else "no problems"
    images, shards = format_count(report.images, "image"), format_count(report.shards, "shard")
    rate = f"{seconds:.1f} s, {report.images / seconds:.0f} img/s"
    yield f"{folder}: {problems} in {images}, {shards}, {format_count(report.bytes, 'byte')} ({rate})"


def describe_channels(found: ChannelStatistics) -> Iterator[str]:
    """Yield lines on the color channels, of which the middle ones are a part of a recipe in YAML."""
    yield f"{format_count(found.images, 'image')}; put these lines into the recipe:"
    yield "data:"
    yield f"  mean: {list(found.mean)}"
    yield f"  std: {list(found.std)}"
    if found.unreadable:
        yield f"{format_count(found.unreadable, 'image')} could not be decoded. Run `make-shards check` on the folder."
    for name, std in zip(("red", "green", "blue"), found.std, strict=True):
        if not std:
            yield f"All pixels have the same {name}. A recipe refuses a std of 0, so give another number there."
