"""The commands and flags of dino-fast as one parser, from which the completion of a shell is made."""

import argparse
import typing
from collections.abc import Mapping
from typing import Any

from dino_fast.advise import doctor, plan
from dino_fast.config import Recipe, describe_type, list_settings
from dino_fast.evaluate import copies, finetune, knn, linear, neighbors, retrieval, suite
from dino_fast.model.backbones import BACKBONES, BackboneName
from dino_fast.model.timm_backbones import PREFIX
from shards.completion import SHELLS

_OWN_FLAGS = {  # of the commands, besides the settings of a recipe
    "plan": plan.build_parser,
    "doctor": doctor.build_parser,
    "knn": knn.build_parser,
    "linear": linear.build_parser,
    "finetune": finetune.build_parser,
    "retrieval": retrieval.build_parser,
    "copies": copies.build_parser,
    "neighbors": neighbors.build_parser,
    "evaluate": suite.build_parser,
}
_WITH_SETTINGS = ("train", "plan", "doctor")


def build_command_parser(commands: Mapping[str, str]) -> argparse.ArgumentParser:
    """Build a parser that has all flags of these commands. `commands`: a line of help by the name of each."""
    parser = argparse.ArgumentParser(prog="dino-fast")
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("--print-completion", choices=SHELLS, help="print the completion of a shell")
    parsers = parser.add_subparsers(parser_class=argparse.ArgumentParser)
    for name, line in commands.items():
        parents = [_OWN_FLAGS[name]()] if name in _OWN_FLAGS else []
        command = parsers.add_parser(name, help=line, parents=parents, add_help=not parents)
        if name in _WITH_SETTINGS:
            _add_settings(command)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Add one flag for each setting of a recipe."""
    parser.add_argument("--config", metavar="FILE", help="a recipe in YAML")
    for name, hint in list_settings(Recipe).items():
        # Most settings that are texts are paths.
        metavar = "FILE" if hint is str else None
        parser.add_argument(f"--{name}", choices=_list_choices(hint), metavar=metavar, help=describe_type(hint))


def _list_choices(hint: Any) -> list[str] | None:
    """Return the values that a setting may have. Return None if it may have any number or text."""
    if hint is bool:
        return ["true", "false"]
    if hint == BackboneName:
        return [*BACKBONES, PREFIX]
    return [str(value) for value in typing.get_args(hint)] if typing.get_origin(hint) is typing.Literal else None
