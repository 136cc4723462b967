"""The flags of make-shards that pack has alone, or shares with another command, in their groups."""

import argparse
import os

from shards.argument_types import (
    parse_bytes,
    parse_count,
    parse_extensions,
    parse_fraction,
    parse_gray16,
    parse_path,
    parse_prefix,
    parse_quality,
    parse_seconds,
    parse_seed,
    parse_side,
    parse_workers,
)
from shards.images.gray16 import HIGH_BYTE
from shards.images.reencode import Changes
from shards.images.rules import ImageRules
from shards.packing.plan import Options
from shards.sources.scan import FORMATS


def add_source_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("what to pack")
    group.add_argument(
        "--format",
        choices=FORMATS,
        default="auto",
        help="folders: the folders are the classes; flat: no labels; webdataset: tars of samples with cls or json "
        "labels; parquet: Hugging Face's tables (default: auto, look at SRC)",
    )
    group.add_argument(
        "--labels",
        type=parse_path,
        metavar="FILE",
        help="file with the classes: a CSV of image and class; or one class per line, in the order of the images' "
        "names; or ILSVRC2012_devkit_t12.tar.gz, for ImageNet's validation archive",
    )
    add_image_extension_option(group)
    group.add_argument(
        "--image-column",
        metavar="NAME",
        help="column of a parquet table that holds the images (default: image, or the only one that may)",
    )
    group.add_argument(
        "--label-column",
        metavar="NAME",
        help="column of a parquet table that holds the labels (default: label, or the only one with class names)",
    )
    add_classes_option(group)
    group.add_argument(
        "--subset-classes",
        metavar="NAMES",
        help="pack these classes only: names between commas, or a file with one per line (default: all)",
    )
    group.add_argument(
        "--limit", type=parse_count, metavar="N", help="pack N random images only, drawn by --seed (default: all)"
    )
    group.add_argument(
        "--split-val",
        type=parse_fraction,
        metavar="FRACTION",
        help="pack this fraction of each class (more than 0, less than 1), drawn by --seed, into OUT/val, and the rest "
        "into OUT/train (default: no split)",
    )


def add_image_extension_option(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--image-extension",
        type=parse_extensions,
        default=(),
        metavar="NAMES",
        help="extension of the images in WebDataset tars, such as image.jpg or tif, or several between commas; what "
        "precedes it is the key, which may hold dots (default: jpg, jpeg, png, webp after the first dot)",
    )


def add_classes_option(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--classes",
        type=parse_path,
        metavar="MANIFEST",
        help="number the classes as this manifest.json does: that of the train set, to pack the validation set "
        "(default: sort them by name)",
    )


def add_packing_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("how to pack")
    group.add_argument(
        "--shard-size",
        type=parse_bytes,
        default=Options.shard_size,
        metavar="SIZE",
        help="largest size of a tar, like 512MiB or 1GB (default: 256MB)",
    )
    group.add_argument(
        "--seed",
        type=parse_seed,
        default=Options.seed,
        help="seed of the order, and of what --limit and --split-val draw (default: %(default)s)",
    )
    group.add_argument("--name", type=parse_prefix, help="prefix of the tars' names (default: train)")


def add_change_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("how to change images")
    group.add_argument(
        "--max-short-side",
        type=parse_side,
        metavar="N",
        help="re-encode images whose shorter side has more than N pixels, as baseline 4:2:0 JPEG with N pixels "
        "(default: keep the bytes of all images)",
    )
    group.add_argument(
        "--quality",
        type=parse_quality,
        metavar="Q",
        help=f"JPEG quality of re-encoded images, 1 to 100 (default: {Changes.quality})",
    )
    group.add_argument(
        "--gray16",
        type=parse_gray16,
        default=HIGH_BYTE,
        metavar="RULE",
        help="how 16-bit grayscale becomes 8-bit. high-byte: training keeps the high byte; stretch: from the least to "
        "the largest value of each image; window LOW HIGH: from LOW to HIGH, for all images (default: %(default)s)",
    )
    group.add_argument(
        "--convert",
        choices=("png", "jpeg"),
        help="include TIFF, BMP, GIF (its first frame), PPM, PGM, AVIF, HEIF, JPEG 2000 and JPEG XL, as far as Pillow "
        "and its plugins read them: as PNG without loss, or as JPEG of --quality (default: reject them)",
    )
    group.add_argument(
        "--upright",
        action="store_true",
        help="turn images as their EXIF orientation says, which training ignores: PNG without loss, JPEG and WebP by "
        "encoding them again as JPEG (default: keep all images as they are stored)",
    )


def add_image_options(command: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the options that `index` has, too. Return their group."""
    group = command.add_argument_group("which images to accept")
    group.add_argument(
        "--check",
        choices=("full", "header"),
        default=ImageRules.check,
        help="full: decode every pixel, and reject what cannot be decoded; header: only read the image's size "
        "(default: full)",
    )
    group.add_argument(
        "--max-pixels",
        type=parse_count,
        default=ImageRules.max_pixels,
        metavar="N",
        help="reject images of more pixels (height x width) than this (default: %(default)s)",
    )
    group.add_argument(
        "--image-seconds",
        type=parse_seconds,
        default=ImageRules.image_seconds,
        metavar="S",
        help="reject images that take more seconds of CPU time to decode than this (default: %(default)g)",
    )
    return group


def add_strict_option(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--strict",
        action="store_true",
        help="fail where an image is rejected or a link leads nowhere (default: leave such images out, and list them "
        "with the reasons)",
    )


def add_workers_option(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--workers",
        type=parse_workers,
        default=_count_cores(),
        metavar="N",
        help="number of worker processes (default: the CPU cores, %(default)s here)",
    )


def _count_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
