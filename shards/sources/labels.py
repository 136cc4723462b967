"""Give each image its class: by its folder, by the text of its label, or by the classes of another set."""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from shards.errors import UserError
from shards.layout import UNLABELED
from shards.sources.class_folders import refuse_outside_classes, refuse_wrong_level
from shards.sources.listing import Listing
from shards.text import list_first

_MAX_CLASSES = 1 << 20  # a larger number is not the number of a class


def label_by_folder(listing: Listing, format: str, depth: int, folders: Iterable[str]) -> Listing:
    """Label the images by their folders, `depth` folders below the root.

    `folders` are names that are classes even without an image. `format` is as in `scan`. Where no image is in such a
    folder, the listing has no labels. Raises UserError for images beside folders, and for folders that are certainly
    not classes.
    """
    if format == "flat":
        return _remove_labels(listing)
    found = {name: place for place, name in enumerate(sorted(map(os.fsencode, folders)))}
    numbers = np.empty(len(listing), np.int32)
    outside = None
    for place, name in enumerate(listing.read_names()):
        folder = _find_folder(name, depth)
        if folder is None:
            outside = outside or os.fsdecode(name)
        numbers[place] = UNLABELED if folder is None else found.setdefault(folder, len(found))
    if outside is not None:
        refuse_outside_classes(listing, format, outside, bool((numbers != UNLABELED).any()))
        return _remove_labels(listing)
    names = [os.fsdecode(name) for name in found]
    if format != "folders":
        refuse_wrong_level(listing, sorted(names[place] for place in np.unique(numbers)))
    return number_classes(dataclasses.replace(listing, format="folders"), numbers, names, named=True)


def number_classes(
    listing: Listing, numbers: np.ndarray, texts: list[str], *, named: bool, names: tuple[str, ...] | None = None
) -> Listing:
    """Return the listing with classes, from `numbers` [images], which are positions in `texts`.

    Where not `named`, texts that are all decimal are numbers of classes. Their names are `names`, or else the numbers.
    """
    places = None if named else _parse_class_numbers(texts)
    if places is None:
        classes = tuple(sorted(texts, key=os.fsencode))
        place_of = {name: place for place, name in enumerate(classes)}
        places = [place_of[text] for text in texts]
    else:
        classes = names or tuple(map(str, range(max(places, default=-1) + 1)))
        _refuse_unnamed_classes(listing, places, classes)
    if len(set(classes)) < len(classes):
        raise UserError(f"{listing.root}: two classes have the name {find_repeated(classes)!r}. Rename one.")
    return listing.with_labels(classes, np.array([*places, UNLABELED], np.int32)[numbers])


def number_as_in(listing: Listing, classes: tuple[str, ...], source: str) -> Listing:
    """Return the listing with the class numbers of another set, whose `classes` come from `source`.

    Raises UserError for a class that the other set does not have.
    """
    if not classes:
        raise UserError(f"--classes {source}: this set has no labels. Give the manifest of a set with labels.")
    if not listing.classes:
        raise UserError(
            f"{listing.root} has no labels, so --classes cannot number them. Leave it out, or give --labels."
        )
    place_of = {name: place for place, name in enumerate(classes)}
    used = np.unique(listing.labels[listing.labels != UNLABELED])
    places = np.full(len(listing.classes) + 1, UNLABELED, np.int32)
    for label in used.tolist():
        name = listing.classes[label]
        if name not in place_of:
            raise UserError(
                f"{listing.root}: class {name!r} is not one of the {len(classes)} classes in {source} "
                f"({list_first(classes)}). Give the manifest of the matching train set."
            )
        places[label] = place_of[name]
    return listing.with_labels(classes, places[listing.labels])


def find_repeated(texts: Sequence[str]) -> str:
    """Return the first text that comes more than once."""
    return next(text for text, count in Counter(texts).items() if count > 1)


def _find_folder(name: bytes, depth: int) -> bytes | None:
    parts = name.split(b"/", depth + 1)
    return parts[depth] if len(parts) == depth + 2 else None


def _remove_labels(listing: Listing) -> Listing:
    return listing.with_labels((), np.full(len(listing), UNLABELED, np.int32))


def _parse_class_numbers(texts: list[str]) -> list[int] | None:
    """Return the texts as numbers of classes, or None where one of them is something else."""
    if not all(text.isascii() and text.isdecimal() and len(text) < 8 and text == str(int(text)) for text in texts):
        return None
    numbers = [int(text) for text in texts]
    return numbers if max(numbers, default=0) < _MAX_CLASSES else None


def _refuse_unnamed_classes(listing: Listing, places: list[int], classes: tuple[str, ...]) -> None:
    if max(places, default=-1) >= len(classes):
        raise UserError(
            f"{listing.root}: there is a label {max(places)}, but only {len(classes)} class names. Correct the labels."
        )
