"""Take fewer images than were listed: some classes, a random sample, a validation set. All depend on the seed alone."""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from shards.errors import UserError
from shards.layout import UNLABELED
from shards.sources.listing import Listing
from shards.storage import files
from shards.text import list_first

ORDER, _LIMIT, _SPLIT = 0, 1, 2  # uses of the seed; `shards.packing.plan` shuffles with the first


def draw_numbers(seed: int, use: int, count: int) -> np.ndarray:
    """Return [count] random uint64.

    They are raw PCG64 and so the same with every numpy, which promises no stable `permutation`.
    """
    return np.random.PCG64(np.random.SeedSequence([seed, use])).random_raw(count)


def read_class_names(text: str, known: Sequence[str]) -> list[str]:
    """Return the class names in `text`, separated by commas, or in the file of that name, one per line.

    A text that is one of the `known` classes is not a file. Raises UserError where there is no name.
    """
    if os.path.isfile(text) and text not in known:
        pieces = files.read_whole(text).decode("utf-8-sig", "surrogateescape").splitlines()
    else:
        pieces = text.split(",")
    names = [piece.strip() for piece in pieces if piece.strip()]
    if not names:
        raise UserError(
            f"--subset-classes {text!r} has no class names. Give names between commas, or a file with one per line."
        )
    return names


def select_classes(listing: Listing, names: Sequence[str]) -> Listing:
    """Return the images of some classes, numbered by the sorted `names`. Raises UserError for an unknown name."""
    kept = tuple(sorted(set(names), key=os.fsencode))
    for name in kept:
        if name not in listing.classes:
            known = list_first(listing.classes) or "it has no labels"
            raise UserError(f"--subset-classes: {name!r} is not a class of {listing.root} ({known}). Correct the name.")
    places = np.full(len(listing.classes) + 1, UNLABELED, np.int32)
    places[[listing.classes.index(name) for name in kept]] = np.arange(len(kept))
    labels = places[listing.labels]
    keep = np.flatnonzero(labels != UNLABELED)
    if not len(keep):
        raise UserError(f"--subset-classes: {listing.root} has no image of {', '.join(kept)}. Name other classes.")
    return listing.select(keep).with_labels(kept, labels[keep])


def draw_images(listing: Listing, count: int, seed: int) -> Listing:
    """Return `count` random images, or all where there are no more."""
    if count >= len(listing):
        return listing
    order = np.argsort(draw_numbers(seed, _LIMIT, len(listing)), kind="stable")
    return listing.select(np.sort(order[:count]))


def split_train_val(listing: Listing, fraction: float, seed: int) -> tuple[Listing, Listing]:
    """Return the images for training and for validation.

    Of each class, `fraction` of its images, rounded to the nearest, are drawn for validation. Unlabeled images count as
    one class. What was left out stays with the images for training. Raises UserError where one of the two sets would be
    empty.
    """
    labels = listing.labels.astype(np.int64) + 1
    counts = np.bincount(labels, minlength=len(listing.classes) + 1)
    order = np.lexsort((draw_numbers(seed, _SPLIT, len(listing)), labels))  # by class, then by draw
    rank = np.empty(len(listing), np.int64)
    rank[order] = np.arange(len(listing)) - np.repeat(np.cumsum(counts) - counts, counts)
    in_val = rank < np.floor(fraction * counts + 0.5)[labels]
    if not in_val.any() or in_val.all():
        raise UserError(
            f"--split-val {fraction:g} leaves no images for {'train' if in_val.any() else 'val'} of {len(listing)}. "
            "Choose another fraction."
        )
    train, val = listing.select(np.flatnonzero(~in_val)), listing.select(np.flatnonzero(in_val))
    return train, dataclasses.replace(val, left_out=())
