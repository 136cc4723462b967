"""Copy detection as on Copydays: the layout of its folders, and its scores.

`original/` holds the originals. Every other folder holds copies of them that were changed in one way: strong,
jpegqual/3 to jpegqual/75, and crops/10 to crops/80 in Copydays itself. The numbers of images are those of the folders.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from torch import Tensor

from dino_fast.evaluate.features import spread_evenly
from dino_fast.evaluate.nearest import find_nearest
from dino_fast.evaluate.search.images import list_image_files
from dino_fast.evaluate.search.ranking import compute_average_precision
from shards.errors import UserError

ORIGINAL, STRONG, DISTRACTORS = "original", "strong", "distractors"
TOP = 20  # nearest images that are looked at, as published


class CopyBlock(NamedTuple):
    """The copies in one folder."""

    files: list[str]
    """paths relative to the set's folder, sorted"""
    originals: list[int]
    """for each file, the number of its original"""


@dataclass(frozen=True)
class CopySet:
    """A folder in the layout of Copydays."""

    folder: Path
    originals: list[str]
    """paths relative to the folder, sorted"""
    blocks: dict[str, CopyBlock]
    """copies by the name of their folder; strong first, and numbers in their order"""
    without_original: list[str]
    """copies to which no original has a fitting name"""
    has_distractors: bool
    """whether there is a folder named distractors"""


def find_copies(folder: Path) -> CopySet:
    """List a folder in the layout of Copydays. Raises UserError for another layout."""
    by_folder: dict[str, list[str]] = defaultdict(list)
    for file in list_image_files(folder):
        by_folder[str(PurePosixPath(file).parent)].append(file)
    has_distractors = bool(by_folder.pop(DISTRACTORS, None))
    originals = by_folder.get(ORIGINAL)
    if not originals or len(by_folder) < 2:
        raise UserError(
            f"--images {folder} is no folder of copies: it needs a folder original and one folder for each kind of "
            "copy, as Copydays has them. `dino-fast copies --make-attacks SRC OUT` makes such a folder."
        )
    blocks: dict[str, CopyBlock] = {}
    lonely: list[str] = []
    for name in sorted(by_folder, key=_order_blocks):
        matched = match_copies(name, by_folder[name], originals)
        lonely += [file for file in by_folder[name] if file not in matched]
        if matched:
            blocks[name] = CopyBlock(list(matched), list(matched.values()))
    return CopySet(folder, originals, blocks, lonely, has_distractors)


def match_copies(block: str, files: Sequence[str], originals: Sequence[str]) -> dict[str, int]:
    """Return the number of the original of each copy that has one.

    A copy has the name of its original, whatever the extensions. In `strong` there may be several of one original:
    their names differ in the last two characters.
    """
    numbers = {PurePosixPath(file).stem: number for number, file in enumerate(originals)}
    if block == STRONG:
        numbers = {name[:-2]: number for name, number in numbers.items()}
    stems = {file: PurePosixPath(file).stem for file in files}
    keys = {file: stem[:-2] if block == STRONG else stem for file, stem in stems.items()}
    return {file: numbers[key] for file, key in keys.items() if key in numbers}


def limit_copies(copies: CopySet, limit: int | None) -> CopySet:
    """Keep at most `limit` originals, at even distances, and their copies."""
    if limit is None:
        return copies
    kept = {number: place for place, number in enumerate(spread_evenly(len(copies.originals), limit).tolist())}
    blocks = {}
    for name, block in copies.blocks.items():
        pairs = [(file, kept[n]) for file, n in zip(block.files, block.originals, strict=True) if n in kept]
        if pairs:
            blocks[name] = CopyBlock([file for file, _ in pairs], [place for _, place in pairs])
    return replace(copies, originals=[copies.originals[number] for number in kept], blocks=blocks)


def _order_blocks(name: str) -> tuple[bool, bool, list[tuple[str, int]]]:
    """Return what blocks are sorted by: original and strong first, then the names with numbers as numbers."""
    parts = [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)]
    return name != ORIGINAL, name != STRONG, parts


@dataclass(frozen=True)
class CopyScore:
    """How well the originals of some copies are found."""

    images: int
    """number of copies"""
    mean_ap: float
    """mean of the copies' average precisions among the nearest 20 images, 0 to 1"""
    first: float
    """share of the copies whose nearest image is an original of theirs"""


def score_copies(queries: Tensor, database: Tensor, positives: Sequence[Sequence[int]], top: int = TOP) -> CopyScore:
    """Score copies [Q, D] against a database [N, D] by their cosines.

    positives: numbers of each copy's originals in the database, at least one. top: how many of the nearest images are
    looked at. An original that is not among them counts as not found.
    """
    _, nearest = find_nearest(queries, database, top)
    ranks = [np.flatnonzero(np.isin(ids, wanted)) for ids, wanted in zip(nearest.cpu(), positives, strict=True)]
    each = [
        compute_average_precision(found.tolist(), len(wanted)) for found, wanted in zip(ranks, positives, strict=True)
    ]
    first = [len(found) > 0 and found[0] == 0 for found in ranks]
    return CopyScore(len(each), float(np.mean(each)), float(np.mean(first)))
