"""Fewer pictures than were listed: some classes, a sample, a validation set. All of it a function of the seed."""

import os
from collections.abc import Sequence

import numpy as np

from shards.errors import UserError
from shards.layout import UNLABELLED
from shards.sources.listing import Listing, few
from shards.storage import files

_LIMIT, _SPLIT = 1, 2  # uses of the seed; the order within the shards is use 0


def draws(seed: int, use: int, count: int) -> np.ndarray:
    """[count] uint64, the same with every numpy: raw PCG64, since numpy promises no stable `permutation`."""
    return np.random.PCG64(np.random.SeedSequence([seed, use])).random_raw(count)


def names(text: str, known: Sequence[str]) -> list[str]:
    """Class names: between commas, or of a file, one a line. Raises UserError where there is none."""
    if os.path.isfile(text) and text not in known:
        pieces = files.read_whole(text).decode("utf-8-sig", "surrogateescape").splitlines()
    else:
        pieces = text.split(",")
    found = [piece.strip() for piece in pieces if piece.strip()]
    if not found:
        raise UserError(f"--subset-classes: {text!r} names no class; give some between commas, or a file of one a line")
    return found


def classes(listing: Listing, names: Sequence[str]) -> Listing:
    """The pictures of some classes, numbered by the sorted `names`. Raises UserError for a name that is no class."""
    kept = tuple(sorted(set(names), key=os.fsencode))
    for name in kept:
        if name not in listing.classes:
            known = few(listing.classes) or "which has no labels"
            raise UserError(f"--subset-classes: {name!r} is no class of {listing.root} ({known}); mend the name")
    places = np.full(len(listing.classes) + 1, UNLABELLED, np.int32)
    places[[listing.classes.index(name) for name in kept]] = np.arange(len(kept))
    labels = places[listing.labels]
    keep = np.flatnonzero(labels != UNLABELLED)
    if not len(keep):
        raise UserError(f"--subset-classes: {listing.root} has no picture of {', '.join(kept)}; name other classes")
    return listing.take(keep).labelled(kept, labels[keep])


def limit(listing: Listing, count: int, seed: int) -> Listing:
    """`count` pictures drawn by the seed, or all where there are no more."""
    if count >= len(listing):
        return listing
    order = np.argsort(draws(seed, _LIMIT, len(listing)), kind="stable")
    return listing.take(np.sort(order[:count]))


def split(listing: Listing, fraction: float, seed: int) -> tuple[Listing, Listing]:
    """Train and validation, drawn by the seed: of each class, `fraction` of its pictures rounded to the nearest.

    Pictures without a label count as a class. Raises UserError where one of the two would be empty.
    """
    labels = listing.labels.astype(np.int64) + 1
    counts = np.bincount(labels, minlength=len(listing.classes) + 1)
    order = np.lexsort((draws(seed, _SPLIT, len(listing)), labels))  # by class, then by draw
    rank = np.empty(len(listing), np.int64)
    rank[order] = np.arange(len(listing)) - np.repeat(np.cumsum(counts) - counts, counts)
    in_val = rank < np.floor(fraction * counts + 0.5)[labels]
    if not in_val.any() or in_val.all():
        raise UserError(
            f"--split-val {fraction:g} leaves no pictures for {'train' if in_val.any() else 'val'} of {len(listing)}; "
            "choose another fraction"
        )
    return listing.take(np.flatnonzero(~in_val)), listing.take(np.flatnonzero(in_val))
