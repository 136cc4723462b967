"""The loader's settings on the command line of a benchmark, each with several values, and all their combinations."""

import argparse
from collections.abc import Iterator
from itertools import product
from typing import Any

from pipelines.loader import DataRecipe

SETTINGS = ("decode", "decode_device", "threads", "prefetch", "hw_decoder_load")


def add_data_settings(parser: argparse.ArgumentParser) -> None:
    """Add an argument for each of SETTINGS, which takes several values."""
    parser.add_argument("--decode", nargs="+", choices=("auto", "dali", "torch"), default=["auto"], help="(auto)")
    parser.add_argument(
        "--decode_device", nargs="+", choices=("auto", "gpu", "split", "cpu"), default=["auto"], help="(auto)"
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[0], help="0: this process's cores (0)")
    parser.add_argument("--prefetch", nargs="+", type=int, default=[2], help="length of each queue (2)")
    parser.add_argument(
        "--hw_decoder_load", nargs="+", type=float, default=[-1.0], help="share for the JPEG engines; -1: chosen (-1)"
    )


def combine(values: dict[str, list[Any]]) -> Iterator[tuple[str, DataRecipe]]:
    """Yield every combination of the values of each setting, with a name that says where combinations differ.

    The name is empty if there is one combination only. A combination that a run refuses is left out: torch does
    not decode on a GPU.
    """
    for chosen in product(*values.values()):
        settings = dict(zip(values, chosen, strict=True))
        if settings.get("decode") == "torch" and settings.get("decode_device") in ("gpu", "split"):
            continue
        named = [f"{name} {value}" for name, value in settings.items() if len(values[name]) > 1]
        yield ", ".join(named), DataRecipe(**settings)


def read_combinations(options: argparse.Namespace) -> list[tuple[str, DataRecipe]]:
    """Return the combinations of the settings on the command line. Raises SystemExit if none is left."""
    found = list(combine({name: getattr(options, name) for name in SETTINGS}))
    if not found:
        raise SystemExit("--decode torch decodes and crops on the CPU. Pass --decode_device cpu")
    return found
