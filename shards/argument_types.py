"""The values of command line arguments: how their text is read, and what is refused as a wrong call."""

import argparse
import os
import re
from pathlib import Path
from typing import NoReturn

from shards.images.gray16 import MOST, Gray16
from shards.text import escape_unprintable

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Parser(argparse.ArgumentParser):
    """An argument parser that says in one line what is wrong with a call."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        self.exit(2, f"{self.prog}: {escape_unprintable(message).rstrip('.')}. See '{self.prog} --help'.\n")


def parse_path(text: str) -> str:
    """Return a path or URL. ``file://`` is a path too. A ~ is expanded where the shell has not done so."""
    text = re.sub("^(file|local)://", "", text, flags=re.IGNORECASE)
    if not text:
        raise argparse.ArgumentTypeError("the path is empty. Perhaps a shell variable is not set")
    return os.path.expanduser(text)


def parse_png_path(text: str) -> Path:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a PNG file. Use a name that ends in .png")
    return Path(parse_path(text))


def parse_bytes(text: str) -> int:
    """Return a size in bytes from text such as "256MB" or "1.5 GiB"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS or float(match[1]) * _UNITS[match[2].upper()] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size. Write it like 256MB, 1.5GB or 512MiB")
    return round(float(match[1]) * _UNITS[match[2].upper()])


def parse_seed(text: str) -> int:
    return _parse_integer(text, 0, 2**63 - 1, "a seed")


def parse_workers(text: str) -> int:
    return _parse_integer(text, 1, 1024, "a number of processes")


def parse_count(text: str) -> int:
    return _parse_integer(text, 1, 2**40, "a count")


def parse_sample_count(text: str) -> int:
    return _parse_integer(text, 1, 1000, "a number of samples")


def parse_side(text: str) -> int:
    return _parse_integer(text, 16, 65_500, "a number of pixels")


def parse_quality(text: str) -> int:
    return _parse_integer(text, 1, 100, "a JPEG quality")


def parse_fraction(text: str) -> float:
    return _parse_number(text, "a fraction", 0, 1)


def parse_seconds(text: str) -> float:
    return _parse_number(text, "a time in seconds", 0, 1e6)


def parse_extensions(text: str) -> tuple[str, ...]:
    """Return extensions from text such as "image.jpg,image.png", in lowercase and without a first dot."""
    extensions = tuple(part.strip().lstrip(".").lower() for part in text.split(","))
    if not all(extensions) or "/" in text:
        raise argparse.ArgumentTypeError(f"{text!r} has no extension. Write it like image.jpg or jpg,png")
    return extensions


def parse_gray16(text: str) -> Gray16:
    """Return the rule in text such as "stretch" or "window 0 4095"."""
    rule, *numbers = text.split()
    if not numbers and rule in ("high-byte", "stretch"):
        return Gray16(rule)  # type: ignore[arg-type]  # one of the two
    if rule == "window" and len(numbers) == 2:
        low, high = (_parse_integer(number, 0, MOST, "a value of 16 bits") for number in numbers)
        if low < high:
            return Gray16("window", low, high)
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a rule. Give high-byte, stretch, or window LOW HIGH with LOW below HIGH"
    )


def parse_prefix(text: str) -> str:
    """Return the prefix of the tars' names."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a prefix. Use at most 64 letters, digits, - and _")
    return text


def _parse_integer(text: str, least: int, most: int, what: str) -> int:
    if not re.fullmatch(r"\d{1,20}", text) or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}. Give a whole number from {least} to {most}")
    return int(text)


def _parse_number(text: str, what: str, more_than: float, less_than: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not more_than < number < less_than:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not {what}. Give a number between {more_than:g} and {less_than:g}"
        )
    return number
