"""What the evaluations that train something share: their flags, and what they refuse."""

import argparse
import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from shards.argument_types import parse_path
from shards.errors import UserError
from shards.index import ShardIndex


def parse_rates(text: str) -> tuple[float, ...]:
    """Read a flag's learning rates, with commas between them."""
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise argparse.ArgumentTypeError(f"expected numbers above 0 with commas between them, not {text!r}")
    if len(set(rates)) < len(rates):
        raise argparse.ArgumentTypeError(f"expected numbers that differ from each other, not {text!r}")
    return rates


def format_rates(rates: tuple[float, ...]) -> str:
    """Return learning rates as `parse_rates` reads them."""
    return ",".join(f"{rate:g}" for rate in rates)


def add_output_flag(parser: argparse.ArgumentParser, required: bool, what: str) -> None:
    """Add --output, whose help begins with `what` the folder is for."""
    parser.add_argument(
        "--output", type=lambda text: Path(parse_path(text)), required=required, metavar="DIR",
        help=f"{what}, so that the same command goes on after a stop",
    )  # fmt: skip


@contextlib.contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Turn torch's error into a UserError of one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError("out of GPU memory. Lower --batch, or use more GPUs with torchrun.") from error


def refuse_single_class(index: ShardIndex) -> None:
    """Raise UserError for shards of one class, which every classifier gets right."""
    if len(index.classes) == 1:
        raise UserError(
            f"{index.folder} has a single class, {index.classes[0]}, so there is nothing to tell apart. Pack a folder "
            "with one folder for each class."
        )
