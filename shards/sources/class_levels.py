"""Whether folders and archives are classes, or lie above or beside them: a SRC of the wrong level, told by looking."""

import os
import re
from collections.abc import Iterable, Sequence

from shards.errors import UserError
from shards.sources.listing import Listing

_SPLIT = re.compile(r"(?<![a-z])(train|val|test|unlabell?ed)(?:ing|id|idation)?(?![a-z])")


def common_depth(listing: Listing, skip: int, below: int = 0) -> int:
    """Below how many leading folders all pictures lie; the first `skip` may differ, the last `below` do not count."""
    return skip + len(_common(listing, skip, below))


def refuse_loose(listing: Listing, format: str, loose: str, mixed: bool) -> None:
    """Raises UserError where the picture `loose` lies in no class folder but should, or others do (`mixed`)."""
    if format == "folders":
        raise UserError(f"{listing.root}: {loose} lies in no class folder; move it into one, or use --format flat")
    if mixed:
        raise UserError(
            f"{listing.root}: pictures ({loose}, …) beside folders of pictures; use --format flat to pack all of them "
            "without labels, or move those into class folders"
        )


def refuse_wrong_level(listing: Listing, folders: Sequence[str]) -> None:
    """Raises UserError where `folders`, all that hold pictures, are one alone or train, val and the like."""
    if len(folders) == 1:
        inner = os.fsdecode(b"/".join(_common(listing, 0, 0)))
        raise UserError(
            f"{listing.root}: all pictures lie in {inner}; give {os.path.join(listing.root, inner)}, or use "
            f"--format folders to take {folders[0]} as the one class"
        )
    if all(map(_split, folders)):
        each = f"unpack it and pack each by itself ({folders[0]}, …)"
        if not listing.containers:
            each = f"pack each by itself ({os.path.join(listing.root, folders[0])}, …)"
        raise UserError(
            f"{listing.root} holds {', '.join(folders)}, which are no classes; {each}, or use --format folders to take "
            "them as classes"
        )


def refuse_splits(root: str, archives: Sequence[str]) -> None:
    """Raises UserError where all archives, or their folders, are called after a split, but not all after the same."""
    splits = [_split(rest) for rest in below_common_folder(archives)]
    if all(splits) and len(set(splits)) > 1:
        folder, name = os.path.split(archives[0])
        one = f"a pattern in quotes ('{os.path.join(folder, f'*{splits[0]}*')}')" if _split(name) else folder
        raise UserError(
            f"{root} holds archives of {', '.join(_sorted(splits))}; keep them apart: to pack one, give {one}; "
            "or say with --format what they are, to take all of them as one set"
        )


def below_common_folder(paths: Sequence[str]) -> list[str]:
    """The paths or URLs relative to the deepest folder that holds them all."""
    start = os.path.commonprefix(list(paths)).rfind("/") + 1  # noqa: RUF071  commonpath takes no URLs
    return [path[start:] for path in paths]


def _common(listing: Listing, skip: int, below: int) -> list[bytes]:
    """The leading folders, after the first `skip` and without the last `below`, that all pictures share."""
    common: list[bytes] | None = None
    for name in listing.names():
        folders = name.split(b"/")[skip : -1 - below]
        if common is None:
            common = folders
        while common != folders[: len(common)]:
            common.pop()
        if not common:
            break
    return common or []


def _split(name: str) -> str | None:
    """Which split a name such as train2017, ILSVRC2012_img_val.tar or Testing speaks of."""
    match = _SPLIT.search(name.lower())
    return match[1] if match else None


def _sorted(splits: Iterable[str | None]) -> list[str]:
    return sorted({split for split in splits if split})
