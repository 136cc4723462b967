"""The demo's image sets: drawn images, or copies of the user's, packed into shards for training and for scoring."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dino_fast.demo.draw import PATTERNS, draw_dataset
from dino_fast.demo.user_images import Selection, copy_images, make_empty_folder
from shards.errors import UserError
from shards.index import ShardIndex
from shards.packing.pack import pack
from shards.packing.plan import Options
from shards.sources.scan import scan
from shards.storage.local_folder import LocalFolder
from shards.text import escape_unprintable

IMAGES_PER_CLASS = 108  # drawn training images
VAL_IMAGES_PER_CLASS = 30  # further drawn images, which are only classified
_MAX_NAMED = 5  # images that do not decode and are named

say = Console(soft_wrap=True, highlight=False, markup=False).print


@dataclass(frozen=True)
class ImageSets:
    """The packed images."""

    train: ShardIndex
    """images to train on"""
    val: ShardIndex | None
    """labeled images to classify; None where there can be no score"""


def make_drawn_sets(home: Path, per_class: int | None, seed: int) -> ImageSets:
    """Draw the images, unless they are there already, and pack them. `home`: the folder that everything goes into."""
    count = per_class or IMAGES_PER_CLASS
    val_count = min(VAL_IMAGES_PER_CLASS, count)
    with progress_bar("drawing", len(PATTERNS) * (count + val_count)) as tick:
        images = draw_dataset(home / "images", count, val_count, seed, tick)
    say(f"{images}: drawn patterns of {len(PATTERNS)} classes, {count} training and {val_count} validation images each")
    shards = make_empty_folder(home / "shards")
    train, val = (pack_folder(images / split, shards / split, "folders", seed) for split in ("train", "val"))
    return ImageSets(train, val)


def make_user_sets(home: Path, selection: Selection, seed: int) -> ImageSets:
    """Copy the user's images at a small size into the demo's own folder, and pack the copies."""
    say(selection.describe())
    copies, shards = make_empty_folder(home / "images"), make_empty_folder(home / "shards")
    with progress_bar("making small copies", len(selection.copies)) as tick:
        failures = copy_images(selection, copies, tick)
    for name, reason in failures[:_MAX_NAMED]:
        say(escape_unprintable(f"{name} is left out, because it does not decode ({reason})."))
    if len(failures) > _MAX_NAMED:
        say(f"{len(failures) - _MAX_NAMED} more images are left out.")
    if not any((copies / "train").rglob("*.jpg")):
        raise UserError(f"--images {selection.root}: none of its images could be decoded. Name another folder.")
    kind = "folders" if selection.labeled else "flat"
    train = pack_folder(copies / "train", shards / "train", kind, seed)
    if len(train.classes) < 2 or not any((copies / "val").rglob("*.jpg")):
        return ImageSets(train, None)
    return ImageSets(train, pack_folder(copies / "val", shards / "val", kind, seed))


def pack_folder(source: Path, out: Path, kind: str, seed: int) -> ShardIndex:
    """Pack a folder as `make-shards pack --format KIND` does, and open the shards."""
    folder, workers = LocalFolder(str(out)), os.cpu_count() or 1
    with folder.lock("another demo is packing into it; wait for it"):
        listing = scan(source, kind, folder.work_folder)
        with progress_bar("packing", len(listing)) as tick:
            pack(listing, folder, Options(seed=seed, name=out.name), workers, lambda done, _: tick(done))
    return ShardIndex(out)


@contextmanager
def progress_bar(doing: str, total: int) -> Iterator[Callable[..., None]]:
    """Show a progress bar on a terminal, and nothing elsewhere.

    Yield a function that counts one more, or sets how many are done.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(doing, total=total)

        def tick(done: int | None = None) -> None:
            progress.advance(task) if done is None else progress.update(task, completed=done)

        yield tick
