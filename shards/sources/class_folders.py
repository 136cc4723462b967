"""Decide which folders are classes, and refuse a SRC whose folders or archives are one level above or below them."""

import os
import re
from collections.abc import Iterable, Sequence

from shards.errors import UserError
from shards.sources.listing import Listing

_SPLIT = re.compile(r"(?<![a-z])(train|val|test|unlabell?ed)(?:ing|id|idation)?(?![a-z])")


def count_common_folders(listing: Listing, skip: int, below: int = 0) -> int:
    """Return how many leading folders all images share.

    The first `skip` folders may differ and count as shared. The last `below` folders do not count.
    """
    return skip + len(_find_common_folders(listing, skip, below))


def refuse_outside_classes(listing: Listing, format: str, name: str, mixed: bool) -> None:
    """Raise UserError where the image `name` lies in no class folder but should, or where others do (`mixed`)."""
    if format == "folders":
        raise UserError(
            f"{listing.root}: {name} is not in a class folder. Move it into one, or use --format flat to pack without "
            "labels."
        )
    if mixed:
        raise UserError(
            f"{listing.root}: some images are in folders, others ({name}, …) are not. Use --format flat to pack all of "
            "them without labels, or move those into class folders."
        )


def refuse_wrong_level(listing: Listing, folders: Sequence[str]) -> None:
    """Raise UserError where `folders`, all that hold images, are only one, or are train, val and the like."""
    if len(folders) == 1:
        inner = os.fsdecode(b"/".join(_find_common_folders(listing, 0, 0)))
        raise UserError(
            f"{listing.root}: all images are in {inner}. Give {os.path.join(listing.root, inner)}, or use "
            f"--format folders to take {folders[0]} as the only class."
        )
    if all(map(_find_split, folders)):
        each = f"Unpack it and pack each by itself ({folders[0]}, …)"
        if not listing.containers:
            each = f"Pack each by itself ({os.path.join(listing.root, folders[0])}, …)"
        raise UserError(
            f"{listing.root} holds {', '.join(folders)}, which are not classes. {each}, or use --format folders to "
            "take them as classes."
        )


def refuse_mixed_splits(root: str, archives: Sequence[str]) -> None:
    """Raise UserError where the names of all archives, or of their folders, are those of different splits."""
    splits = [_find_split(rest) for rest in strip_common_folder(archives)]
    if all(splits) and len(set(splits)) > 1:
        folder, name = os.path.split(archives[0])
        one = f"a pattern in quotes ('{os.path.join(folder, f'*{splits[0]}*')}')" if _find_split(name) else folder
        raise UserError(
            f"{root} holds archives of {', '.join(_sort(splits))}. To pack one of them, give {one}. To pack all "
            "as one set, say with --format what they are."
        )


def strip_common_folder(paths: Sequence[str]) -> list[str]:
    """Return the paths or URLs relative to the deepest folder that holds them all."""
    start = os.path.commonprefix(list(paths)).rfind("/") + 1  # noqa: RUF071  commonpath takes no URLs
    return [path[start:] for path in paths]


def _find_common_folders(listing: Listing, skip: int, below: int) -> list[bytes]:
    """Return the leading folders that all images share, after the first `skip` and without the last `below`."""
    common: list[bytes] | None = None
    for name in listing.read_names():
        folders = name.split(b"/")[skip : -1 - below]
        if common is None:
            common = folders
        while common != folders[: len(common)]:
            common.pop()
        if not common:
            break
    return common or []


def _find_split(name: str) -> str | None:
    """Return the split that a name such as train2017, ILSVRC2012_img_val.tar or Testing stands for."""
    match = _SPLIT.search(name.lower())
    return match[1] if match else None


def _sort(splits: Iterable[str | None]) -> list[str]:
    return sorted({split for split in splits if split})
