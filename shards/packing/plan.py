"""Decide which image goes into which shard before any image is read."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shards.errors import UserError
from shards.images.reencode import Changes
from shards.images.rules import ImageRules
from shards.layout import BLOCK, FORMAT_VERSION, MAX_SHARDS, TAR_END, UNLABELED, count_member_bytes
from shards.sources.listing import Listing
from shards.sources.subset import ORDER, draw_numbers


@dataclass(frozen=True)
class Options:
    """What changes the bytes of a packing."""

    seed: int = 0
    """seed of the order"""
    shard_size: int = 256_000_000
    """bytes per tar at most, unless a single image is larger"""
    name: str = "train"
    """prefix of the tars"""
    rules: ImageRules = field(default_factory=ImageRules)
    """which images become samples"""
    changes: Changes = field(default_factory=Changes)
    """what is changed in images"""

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain data, changes among the others.

        Changes that came after version 0.2.0 are there only where they are asked for, so that the fingerprints of
        earlier packings stay what they are.
        """
        options = dataclasses.asdict(self)
        for name, value in options.pop("changes").items():
            if name in ("max_short_side", "quality") or value != getattr(Changes, name):
                options[name] = str(value) if name == "gray16" else value
        return options


@dataclass(frozen=True)
class Plan:
    """Which image goes where: shard k holds ``order[cuts[k]:cuts[k + 1]]``."""

    order: np.ndarray
    """[images] int64: positions in the listing"""
    cuts: np.ndarray
    """[shards + 1] int64: positions in `order`"""
    fingerprint: str
    """sha256 of the images' names, sizes and labels, what was left out, the classes and the options"""

    @property
    def shard_count(self) -> int:
        """Number of shards."""
        return len(self.cuts) - 1


def make_plan(listing: Listing, options: Options) -> Plan:
    """Shuffle a listing by the seed, then cut it where a shard would exceed `options.shard_size`.

    Raises UserError where there would be more shards than have names.
    """
    order = np.argsort(draw_numbers(options.seed, ORDER, len(listing)), kind="stable")
    ends = np.cumsum(_count_tar_bytes(listing)[order])
    cuts = [0]
    while cuts[-1] < len(ends):
        start = cuts[-1]
        before = int(ends[start - 1]) if start else 0
        fitting = int(np.searchsorted(ends, before + options.shard_size - len(TAR_END), side="right"))
        cuts.append(max(fitting, start + 1))
    if len(cuts) - 1 > MAX_SHARDS:
        raise UserError(f"this would make more than {MAX_SHARDS} shards. Use a larger --shard-size.")
    return Plan(order, np.array(cuts, np.int64), _compute_fingerprint(listing, options))


def _count_tar_bytes(listing: Listing) -> np.ndarray:
    """Return the bytes of each image in a tar, with its label's member, [images] int64."""
    total = (listing.sizes.astype(np.int64) + (BLOCK - 1)) // BLOCK
    total += 1  # the header
    total *= BLOCK
    total[listing.labels != UNLABELED] += count_member_bytes(1)
    return total


def _compute_fingerprint(listing: Listing, options: Options) -> str:
    head = [FORMAT_VERSION, listing.classes, options.to_dict()]
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for column in (listing.rows["length"], listing.sizes, listing.labels):
        digest.update(np.ascontiguousarray(column).data)
    for name in listing.read_names():
        digest.update(name)
    if listing.left_out:
        digest.update(json.dumps(listing.left_out).encode())
    return digest.hexdigest()
