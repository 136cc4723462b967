"""What make-shards says: lines that are safe to print whatever names are in them."""

import os
import sys
from collections.abc import Iterator

from shards.errors import UserError
from shards.inspect.check import Report
from shards.inspect.info import printable
from shards.layout import DUPLICATES_FILE, REJECTED_FILE, UNLABELLED, Manifest
from shards.packing.pack import Packed
from shards.sources.listing import Listing, few

_NAMED = 5  # left-out pictures that are printed in full


def say(line: str) -> None:
    """Print a line; that nobody reads on (`| head`) stops nothing. Raises UserError where it cannot be written."""
    try:
        print(printable(line), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        raise UserError(f"cannot print: {error.strerror}; send the output elsewhere") from error


def listed(listing: Listing) -> str:
    """What was found in SRC."""
    what = f"{_many(len(listing.classes), 'class')} ({few(listing.classes)})" if listing.classes else "no labels"
    unlabelled = int((listing.labels == UNLABELLED).sum())
    if listing.classes and unlabelled:
        what += f", {_many(unlabelled, 'picture')} without a label"
    ignored = f"{_many(listing.ignored, 'other file')} ignored"
    return f"{listing.root}: {listing.format}: {_many(len(listing), 'picture')}, {what}; {ignored}"


def packed(done: Packed, out: str, seconds: float) -> Iterator[str]:
    """What `pack` did."""
    if done.was_complete:
        yield f"{out}: already complete"
    yield from described(done.manifest, out)
    if done.kept and not done.was_complete:
        yield f"{_many(done.kept, 'shard')} finished before and kept"
    if done.judged:
        yield f"{seconds:.1f} s, {done.judged / seconds:.0f} img/s"


def described(manifest: Manifest, out: str) -> Iterator[str]:
    """What is in a folder of shards."""
    total = sum(shard.bytes for shard in manifest.shards)
    classes = _many(len(manifest.classes), "class") if manifest.classes else "no labels"
    pictures, shards = _many(manifest.samples, "picture"), _many(len(manifest.shards), "shard")
    yield f"{out}: {pictures}, {classes}, {shards}, {_many(total, 'byte')}"
    if manifest.rejected:
        where = os.path.join(out, REJECTED_FILE)
        yield f"{_many(len(manifest.rejected), 'picture')} left out, with the reason in {where}"
        yield from (f"  {entry.source}: {entry.reason}" for entry in manifest.rejected[:_NAMED])
        if len(manifest.rejected) > _NAMED:
            yield "  …"
    if manifest.duplicates:
        where = os.path.join(out, DUPLICATES_FILE)
        yield f"{_many(manifest.duplicates, 'picture')} with the bytes of another, kept, and named in {where}"


def checked(report: Report, folder: str, seconds: float) -> Iterator[str]:
    """What `check` found."""
    yield from report.problems
    verdict = _many(len(report.problems), "problem") if report.problems else "all is well"
    looked = f"{_many(report.pictures, 'picture')}, {_many(report.shards, 'shard')}, {_many(report.bytes, 'byte')}"
    yield f"{folder}: {verdict}: {looked}; {seconds:.1f} s, {report.pictures / seconds:.0f} img/s"


def _many(count: int, noun: str) -> str:
    """1 picture, 2 pictures, 1,000 classes."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{'' if count == 1 else plural}"
