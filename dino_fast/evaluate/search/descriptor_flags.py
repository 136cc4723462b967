"""The flags of the commands that compare images by descriptors, and the whitening that they ask for."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from dino_fast.distributed import Ranks
from dino_fast.evaluate.arguments import (
    BackboneParser,
    add_cache_flag,
    load_network_from,
    parse_positive_number,
    parse_whole_number,
)
from dino_fast.evaluate.features import spread_evenly
from dino_fast.evaluate.search.describer import Describer
from dino_fast.evaluate.search.descriptors import Descriptor
from dino_fast.evaluate.search.images import Images
from dino_fast.evaluate.search.whitening import Whitening, learn_whitening
from dino_fast.model.trial import check_size
from shards.argument_types import parse_path
from shards.text import format_count

Prepare = Callable[[Image.Image], Image.Image]


class DescriptorParser(BackboneParser):
    """Has the flags for a folder of images and for their descriptors."""

    # Those of the published evaluation scripts.
    other_names = {  # noqa: RUF012  # it is not changed
        **BackboneParser.other_names,
        "--data_path": "--images DIR", "--dataset": "--ground-truth FILE", "--multiscale": "--multi-scale",
        "--whitening_path": "--whiten DIR", "--distractors_path": "--distractors DIR",
    }  # fmt: skip

    def add_descriptor_flags(self, limit_help: str, gem_help: str, gem: float | None = None) -> None:
        """Add --gem, --whiten and --limit. `gem`: the default power of the generalized mean."""
        self.add_argument("--gem", type=parse_positive_number, default=gem, metavar="P", help=gem_help)
        self.add_argument(
            "--whiten", type=parse_path, metavar="DIR",
            help="whiten the descriptors, as published for copies. This is learnt on the images of DIR, a folder of "
            "image files or of shards: other images than those that are scored (published: 20,000)",
        )  # fmt: skip
        self.add_argument("--limit", type=parse_whole_number(1), metavar="N", help=limit_help)
        add_cache_flag(self)


def build_describer(
    options: argparse.Namespace, scales: Sequence[float], ranks: Ranks
) -> tuple[Describer, dict[str, Any]]:
    """Load the backbone that the flags name, and return what computes its descriptors.

    Return it with what a result's JSON begins with. Raises UserError for flags that do not fit each other or the files.
    """
    found, evaluation = load_network_from(options)
    check_size(found.name, options.size, "--size")
    network = Descriptor(found.network, options.gem, scales)
    describer = Describer(network, found.normalization, ranks, found.name, options.cache)
    return describer, {
        **evaluation, "size": options.size, "scales": list(scales), "gem": options.gem, "whiten": options.whiten,
    }  # fmt: skip


def learn_whitening_on(
    images: Images | None, prepare: Prepare, prepared: str, describer: Describer, limit: int | None
) -> Whitening | None:
    """Learn the whitening on at most `limit` images. Return None without images. `prepared`: how, in words."""
    if images is None:
        return None
    descriptors = describe_others(images, prepare, prepared, describer, limit)
    count, width = descriptors.shape
    if describer.ranks.first:
        few = "" if count > width else f", fewer than the {width} values of a descriptor: this is a rough one"
        print(f"whitening learnt on {format_count(count, 'image')} of {images.where}{few}")
    return learn_whitening(descriptors)


def describe_others(images: Images, prepare: Prepare, prepared: str, describer: Describer, limit: int | None) -> Tensor:
    """Compute the descriptors [N, D] of at most `limit` images that no score depends on one by one.

    `prepared` says in words what `prepare` does. Images that cannot be read are skipped, and named in a line.
    """
    numbers = spread_evenly(len(images.names), limit).tolist()
    found = describer.describe(
        lambda n: prepare(images.read(numbers[n])),
        len(numbers),
        images.where,
        {"images": images.compute_fingerprint(), "limit": limit, "prepared": prepared},
        skip_unreadable=True,
    )
    if describer.ranks.first:
        print_unreadable(images.where, found.unreadable)
    return found.descriptors


def print_unreadable(folder: str, lines: Sequence[str]) -> None:
    """Print a line that names images which could not be read, if there are any."""
    if lines:
        more = f"; {len(lines) - 3} more" if len(lines) > 3 else ""
        print(f"{folder}: {format_count(len(lines), 'image')} could not be read: {'; '.join(lines[:3])}{more}")
