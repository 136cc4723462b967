"""The options of make-shards: what their texts mean, and what is refused as a wrong call."""

import argparse
import os
import re
from pathlib import Path
from typing import NoReturn

from shards.images.validate import Judge
from shards.inspect.info import printable
from shards.packing.pack import Options
from shards.sources.scan import FORMATS

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Parser(argparse.ArgumentParser):
    """One that says in one line what is wrong with a call."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: {printable(message)}; see {self.prog} --help\n")


def path(text: str) -> str:
    """A path or URL; ``file://`` names a path as well. Its ~ is expanded where the shell has not."""
    text = re.sub("^(file|local)://", "", text, flags=re.IGNORECASE)
    if not text:
        raise argparse.ArgumentTypeError("an empty path; perhaps a shell variable is not set")
    return os.path.expanduser(text)


def add_folder_argument(command: argparse.ArgumentParser, holding: str) -> None:
    """What to look at."""
    command.add_argument("folder", metavar="DIR", type=path, help=f"folder or URL that holds {holding}")


def add_source_options(packing: argparse.ArgumentParser) -> None:
    """What of the source."""
    group = packing.add_argument_group("what to pack")
    group.add_argument(
        "--format",
        choices=FORMATS,
        default="auto",
        help="folders: their names are the labels; flat: no labels (default: look at SRC)",
    )
    group.add_argument(
        "--labels",
        type=path,
        metavar="FILE",
        help="classes of the pictures: CSV of picture and class, one class a line in the order of their names, or "
        "ILSVRC2012_devkit_t12.tar.gz for ImageNet's validation archive",
    )
    add_classes_option(group)
    group.add_argument("--subset-classes", metavar="NAMES", help="these classes alone: a,b,c, or a file of one a line")
    group.add_argument("--limit", type=_count, metavar="N", help="so many pictures, drawn by the seed")
    group.add_argument(
        "--split-val",
        type=_fraction,
        metavar="FRACTION",
        help="draw this share of each class for OUT/val, and pack the others into OUT/train",
    )


def add_packing_options(packing: argparse.ArgumentParser) -> None:
    """How to pack it."""
    group = packing.add_argument_group("how to pack")
    group.add_argument(
        "--shard-size",
        type=_size,
        default=Options.shard_size,
        metavar="SIZE",
        help="bytes of a tar at most, like 512MiB (default: 256MB)",
    )
    group.add_argument(
        "--seed",
        type=_seed,
        default=Options.seed,
        help="of the order, and of what --limit and --split-val draw (default: %(default)s)",
    )
    group.add_argument("--name", type=_name, help="prefix of the tars (default: train)")
    group.add_argument(
        "--max-short-side",
        type=_side,
        metavar="N",
        help="re-encode pictures whose shorter side has more pixels, as baseline 4:2:0 JPEG (default: keep all bytes)",
    )
    group.add_argument("--quality", type=_quality, metavar="Q", help=f"of those JPEGs (default: {Options.quality})")
    group.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: on a Ray cluster (RAY_ADDRESS, or a local one), all of whose nodes see SRC and OUT",
    )


def add_classes_option(group: argparse._ActionsContainer) -> None:
    """By whose classes to number."""
    group.add_argument(
        "--classes",
        type=path,
        metavar="MANIFEST",
        help="number the classes as this manifest.json does (of train, to pack val)",
    )


def add_judge_options(command: argparse.ArgumentParser) -> None:
    """How pictures are judged."""
    group = command.add_argument_group("what becomes a sample")
    group.add_argument(
        "--check",
        choices=("full", "header"),
        default=Judge.check,
        help="full: decode every pixel, leave out what does not decode; header: read sizes alone (default: full)",
    )
    group.add_argument(
        "--max-pixels",
        type=_count,
        default=Judge.max_pixels,
        metavar="N",
        help="height times width, beyond which a picture is left out (default: %(default)s)",
    )
    group.add_argument(
        "--picture-seconds",
        type=_seconds,
        default=Judge.picture_seconds,
        metavar="S",
        help="CPU time to decode one picture, beyond which it is left out (default: %(default)g)",
    )


def add_workers_option(command: argparse.ArgumentParser) -> None:
    """In how many processes."""
    command.add_argument(
        "--workers", type=_workers, default=_cores(), metavar="N", help="processes (default here: %(default)s)"
    )


def add_show_options(command: argparse.ArgumentParser) -> None:
    """What to draw, and where to."""
    command.add_argument("--grid", type=_png, required=True, metavar="FILE.png", help="the picture to write")
    command.add_argument("--count", type=_drawn, default=48, metavar="N", help="samples (default: %(default)s)")
    command.add_argument("--seed", type=_seed, default=0, help="draws them (default: %(default)s)")


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS or float(match[1]) * _UNITS[match[2].upper()] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it like 256MB, 1.5GB or 512MiB")
    return round(float(match[1]) * _UNITS[match[2].upper()])


def _whole(text: str, least: int, most: int, what: str) -> int:
    if not re.fullmatch(r"\d{1,20}", text) or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is no {what}; give a whole number from {least} to {most}")
    return int(text)


def _number(text: str, what: str, more_than: float, less_than: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not more_than < number < less_than:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no {what}; give a number between {more_than:g} and {less_than:g}"
        )
    return number


def _seed(text: str) -> int:
    return _whole(text, 0, 2**63 - 1, "seed")


def _workers(text: str) -> int:
    return _whole(text, 1, 1024, "number of processes")


def _count(text: str) -> int:
    return _whole(text, 1, 2**40, "count")


def _drawn(text: str) -> int:
    return _whole(text, 1, 1000, "number of samples")


def _png(text: str) -> Path:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} is no PNG file; give a name that ends in .png")
    return Path(path(text))


def _side(text: str) -> int:
    return _whole(text, 16, 65_500, "number of pixels")


def _quality(text: str) -> int:
    return _whole(text, 1, 100, "JPEG quality")


def _fraction(text: str) -> float:
    return _number(text, "fraction", 0, 1)


def _seconds(text: str) -> float:
    return _number(text, "time in seconds", 0, 1e6)


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no prefix; use at most 64 letters, digits, - and _")
    return text
