"""The user's own pictures for the demo: looked at, a share of them set aside, and copied small. Never changed.

Photographs of many megapixels would leave two cores decoding instead of training, so the demo packs copies of a few
hundred pixels. A real run packs the pictures themselves.
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

SHORT_SIDE = 160  # pixels of a copy; a picture that is smaller already is copied at its size
EVERY = 5  # one picture in so many of each class is set aside to be classified
MARK = ".made-by-the-demo"


class Choice(NamedTuple):
    """One picture to copy: its path below the user's folder, and where to, below the demo's."""

    source: str
    target: str


@dataclass(frozen=True)
class Survey:
    """What lies in the user's folder, and what of it the demo takes."""

    root: Path
    found: int
    classes: int  # 0 where the pictures have no labels
    chosen: list[Choice]

    @property
    def labelled(self) -> bool:
        return self.classes > 0

    def text(self) -> str:
        what = f"{self.classes} class folders" if self.labelled else "no class folders, so no labels"
        taken = "all" if len(self.chosen) == self.found else f"{len(self.chosen)} (so that the demo stays short)"
        return f"{self.root}: {self.found} pictures, {what}; taking {taken}"


def survey(root: Path, home: Path, most: int) -> Survey:
    """Choose at most `most` pictures below `root`, evenly over its classes, and set every fifth of a class aside.

    UserError where there are none, or `root` and `home`, the folder that the demo writes into, lie in one another.
    """
    if not root.is_dir():
        raise UserError(
            f"--images {root}: {'not a folder' if root.exists() else 'no such folder'}; name one of pictures"
        )
    here, there = root.resolve(), home.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UserError(f"--images {root} and {home}, where the demo writes, lie in one another; give another --output")
    listing = _listed(root, home)
    classes = _by_class(listing)
    keep = _evenly({name: len(paths) for name, paths in classes.items()}, most)
    chosen = [
        Choice(path, f"{_split(place, bool(listing.classes))}/{name}/{place:06d}.jpg")
        for name, paths in classes.items()
        for place, path in enumerate(_spread(paths, keep[name]))
    ]
    return Survey(root, len(listing), len(listing.classes), chosen)


def stage(survey: Survey, folder: Path, progress: Callable[[], object]) -> list[tuple[str, str]]:
    """Write small JPEG copies of the chosen pictures below `folder`; returns those that do not decode, and why."""
    for parent in {Path(folder, choice.target).parent for choice in survey.chosen}:
        parent.mkdir(parents=True, exist_ok=True)

    def copy(choice: Choice) -> tuple[str, str] | None:
        progress()
        try:
            picture = _small(survey.root / choice.source)
        except Exception as error:  # whatever a decoder makes of damaged bytes
            return choice.source, " ".join(str(error).split()) or type(error).__name__
        picture.save(folder / choice.target, quality=90)
        return None

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return [failure for failure in pool.map(copy, survey.chosen) if failure]


def cleared(folder: Path) -> Path:
    """An empty folder that bears the demo's mark. UserError where there is one without it: it is somebody else's."""
    mark = folder / MARK
    if folder.is_symlink() or (
        folder.exists() and not (folder.is_dir() and (mark.is_file() or not any(folder.iterdir())))
    ):
        raise UserError(f"{folder}: exists and was not made by the demo; move it away, or give another --output")
    if folder.exists():
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True)
        mark.touch()
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; give another --output") from error
    return folder


def _listed(root: Path, home: Path) -> Listing:
    """All pictures, with labels where they lie in class folders only."""
    try:
        flat = scan(root, "flat", home)
    except UserError as error:
        raise UserError(f"--images {error}".replace(" as SRC", "").replace("SRC", "it")) from error
    if flat.containers:
        raise UserError(f"--images {root} holds archives and no pictures; unpack them, or name a folder of pictures")
    return scan(root, "folders", home) if all(b"/" in name for name in flat.names()) else flat


def _by_class(listing: Listing) -> dict[str, list[str]]:
    """The paths of each class by its folder's name; all of them under "unlabelled" where there are no classes."""
    found: dict[str, list[str]] = defaultdict(list)
    for label, name in zip(listing.labels.tolist(), listing.names(), strict=True):
        found[listing.classes[label] if listing.classes else "unlabelled"].append(os.fsdecode(name))
    return dict(found)


def _evenly(counts: dict[str, int], most: int) -> dict[str, int]:
    """How many of each class to take, `most` together: what small classes leave goes to the larger ones."""
    left, kept = most, {}
    for place, (name, count) in enumerate(sorted(counts.items(), key=lambda item: item[1])):
        kept[name] = min(count, left // (len(counts) - place))
        left -= kept[name]
    return kept


def _spread(paths: list[str], count: int) -> list[str]:
    """`count` of the paths, evenly over the list: the first ones alone may all come from one camera or day."""
    return [paths[place * len(paths) // count] for place in range(count)]


def _split(place: int, labelled: bool) -> str:
    return "val" if labelled and place % EVERY == EVERY - 1 else "train"


def _small(path: Path) -> Image.Image:
    """A picture as RGB, upright, its short side at most `SHORT_SIDE` pixels."""
    with Image.open(path) as image:
        image.draft("RGB", (2 * SHORT_SIDE, 2 * SHORT_SIDE))  # a large JPEG is decoded at a fraction of its size
        picture = ImageOps.exif_transpose(image).convert("RGB")
    shrink = SHORT_SIDE / min(picture.size)
    if shrink < 1:
        width, height = (max(1, round(side * shrink)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return picture
