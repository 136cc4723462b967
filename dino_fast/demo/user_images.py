"""Select some of the user's own images for the demo, set a part of them aside, and make small copies of all.

The user's files are never changed. Photographs of many megapixels would leave two cores decoding instead of training,
so the demo packs copies of a few hundred pixels. A real run packs the images themselves.
"""

import os
import shutil
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps

from shards.errors import UserError
from shards.sources.listing import Listing
from shards.sources.scan import scan

SHORT_SIDE = 160  # pixels of a copy; an image that is smaller already keeps its size
VAL_EVERY = 5  # of each class, every fifth image is set aside to be classified
MARKER_FILE = ".made-by-the-demo"


class Copy(NamedTuple):
    """One image to copy."""

    source: str
    """path below the user's folder"""
    target: str
    """path below the folder of the copies"""


@dataclass(frozen=True)
class Selection:
    """What lies in the user's folder, and what the demo takes of it."""

    root: Path
    """the user's folder"""
    found: int
    """images that lie in it"""
    classes: int
    """class folders; 0 if the images have no labels"""
    copies: list[Copy]
    """images that the demo takes"""

    @property
    def labeled(self) -> bool:
        """Whether the images have labels."""
        return self.classes > 0

    def describe(self) -> str:
        """Return a line for the user."""
        labels = f"in {self.classes} class folders" if self.labeled else "without class folders, and so without labels"
        taken = "all of them" if len(self.copies) == self.found else f"{len(self.copies)}, so that it stays short"
        return f"{self.root}: {self.found} images {labels}. The demo takes {taken}."


def select_images(root: Path, home: Path, limit: int) -> Selection:
    """Select at most `limit` images below `root`, evenly from its classes, and set every fifth of a class aside.

    `home` is the folder that the demo writes into. Raises UserError where there are no images, and where one of the two
    folders lies in the other.
    """
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f"--images {root} {problem}. Name a folder of images.")
    here, there = root.resolve(), home.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UserError(
            f"--images {root} and {home}, where the demo writes, lie in one another. Choose another --output."
        )
    listing = _list_images(root, home)
    classes = _group_by_class(listing)
    counts = _divide_evenly({name: len(paths) for name, paths in classes.items()}, limit)
    copies = [
        Copy(path, f"{_choose_split(number, bool(listing.classes))}/{name}/{number:06d}.jpg")
        for name, paths in classes.items()
        for number, path in enumerate(_pick_evenly(paths, counts[name]))
    ]
    return Selection(root, len(listing), len(listing.classes), copies)


def copy_images(selection: Selection, folder: Path, progress: Callable[[], object]) -> list[tuple[str, str]]:
    """Write small JPEG copies of the selected images below `folder`. Return those that do not decode, and why."""
    for parent in {Path(folder, copy.target).parent for copy in selection.copies}:
        parent.mkdir(parents=True, exist_ok=True)

    def write_copy(copy: Copy) -> tuple[str, str] | None:
        progress()
        try:
            image = _load_small(selection.root / copy.source)
        except Exception as error:  # damaged bytes make a decoder raise anything
            return copy.source, " ".join(str(error).split()) or type(error).__name__
        image.save(folder / copy.target, quality=90)
        return None

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return [failure for failure in pool.map(write_copy, selection.copies) if failure]


def make_empty_folder(folder: Path) -> Path:
    """Make an empty folder that bears the demo's marker. What an earlier demo left in it is removed.

    Raises UserError for a folder without the marker, which is somebody else's.
    """
    marker = folder / MARKER_FILE
    if folder.is_symlink() or (
        folder.exists() and not (folder.is_dir() and (marker.is_file() or not any(folder.iterdir())))
    ):
        raise UserError(f"{folder} exists and was not made by the demo. Move it away, or choose another --output.")
    if folder.exists():
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True)
        marker.touch()
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}. Choose another --output.") from error
    return folder


def _list_images(root: Path, home: Path) -> Listing:
    """List all images below `root`. They have labels if all of them lie in class folders."""
    try:
        flat = scan(root, "flat", home)
    except UserError as error:
        raise UserError(f"--images {error}".replace(" as SRC", "").replace("SRC", "it")) from error
    if flat.containers:
        raise UserError(f"--images {root} holds archives and no images. Unpack them, or name a folder of images.")
    return scan(root, "folders", home) if all(b"/" in name for name in flat.read_names()) else flat


def _group_by_class(listing: Listing) -> dict[str, list[str]]:
    """Return the paths of each class by its folder's name. Without classes all are under "unlabeled"."""
    paths: dict[str, list[str]] = defaultdict(list)
    for label, name in zip(listing.labels.tolist(), listing.read_names(), strict=True):
        paths[listing.classes[label] if listing.classes else "unlabeled"].append(os.fsdecode(name))
    return dict(paths)


def _divide_evenly(counts: dict[str, int], limit: int) -> dict[str, int]:
    """Return how many images of each class to take, `limit` together. What small classes leave, larger ones get."""
    left, taken = limit, {}
    for place, (name, count) in enumerate(sorted(counts.items(), key=lambda item: item[1])):
        taken[name] = min(count, left // (len(counts) - place))
        left -= taken[name]
    return taken


def _pick_evenly(paths: list[str], count: int) -> list[str]:
    """Return `count` of the paths, evenly from the whole list: the first ones may all be from one camera or day."""
    return [paths[place * len(paths) // count] for place in range(count)]


def _choose_split(number: int, labeled: bool) -> str:
    return "val" if labeled and number % VAL_EVERY == VAL_EVERY - 1 else "train"


def _load_small(path: Path) -> Image.Image:
    """Return an image as RGB, upright, with a short side of at most `SHORT_SIDE` pixels."""
    with Image.open(path) as opened:
        opened.draft("RGB", (2 * SHORT_SIDE, 2 * SHORT_SIDE))  # a large JPEG is decoded at a fraction of its size
        image = ImageOps.exif_transpose(opened).convert("RGB")
    shrink = SHORT_SIDE / min(image.size)
    if shrink < 1:
        width, height = (max(1, round(side * shrink)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image
