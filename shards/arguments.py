"""The commands and flags of make-shards."""

import argparse
import sys
from collections.abc import Sequence
from typing import TypeAlias

from shards.argument_groups import (
    add_change_options,
    add_classes_option,
    add_image_extension_option,
    add_image_options,
    add_packing_options,
    add_source_options,
    add_strict_option,
    add_workers_option,
)
from shards.argument_types import (
    Parser,
    parse_path,
    parse_png_path,
    parse_sample_count,
    parse_seed,
)
from shards.completion import SHELLS
from shards.text import list_first
from shards.version import version

_SOURCES = """\
SRC is one of:
  a folder whose subfolders are the classes, or a folder of images without
  labels;
  a tar (plain, compressed, or with one tar per class inside, as ImageNet's
  train archive) or zip archive of such folders;
  WebDataset tars;
  parquet files of Hugging Face;
  a folder of archives, or a pattern in quotes ('train-*.parquet').
make-shards looks at SRC to find out. SRC and OUT may be URLs that fsspec knows
(s3://BUCKET/FOLDER, gs://BUCKET/FOLDER).
"""


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of a call. `command` is its name, or None where there is none.

    A wrong call prints one line and exits with status 2.
    """
    parser = build_parser()
    arguments, others = parser.parse_known_args(_join_window(sys.argv[1:] if argv is None else argv))
    parser = arguments.parser
    if others and others[0].startswith("-"):
        parser.error(f"unknown option {others[0]}")
    if others:
        parser.error(f"too many arguments ({list_first(others)}). Put a pattern in quotes, or the shell expands it")
    if arguments.command == "pack" and arguments.name and arguments.split_val:
        parser.error("--name does not go with --split-val, which names the two sets train and val. Leave --name out")
    if arguments.command == "pack" and arguments.quality:
        _refuse_unused_quality(parser, arguments)
    return arguments


def _join_window(argv: Sequence[str]) -> list[str]:
    """Return the arguments with ``--gray16 window LOW HIGH`` as one value, which argparse can tell from SRC and OUT."""
    for place in range(len(argv) - 3):
        if list(argv[place : place + 2]) == ["--gray16", "window"]:
            return [*argv[: place + 1], " ".join(argv[place + 1 : place + 4]), *argv[place + 4 :]]
    return list(argv)


def _refuse_unused_quality(parser: Parser, arguments: argparse.Namespace) -> None:
    if not (arguments.max_short_side or arguments.upright or arguments.convert == "jpeg"):
        parser.error("--quality is for images that --max-short-side, --upright or --convert jpeg encodes. Give one")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of make-shards."""
    parser = Parser(
        prog="make-shards",
        description="Pack images into tar shards in WebDataset's format, with an index, and look into such folders.",
        epilog="'make-shards COMMAND --help' explains the arguments of a command.",
    )
    parser.add_argument("--version", action="version", version=f"make-shards {version()}")
    parser.add_argument(
        "--print-completion",
        metavar="SHELL",
        choices=SHELLS,
        help="print the completion script of bash, zsh or tcsh; save and source it",
    )
    parser.set_defaults(parser=parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    _add_pack(commands)
    _add_index(commands)
    _add_check(commands)
    _add_info(commands)
    _add_show(commands)
    _add_stats(commands)
    return parser


def _add_command(commands: Commands, name: str, usage: str, help: str, description: str) -> Parser:
    command = commands.add_parser(
        name,
        usage=f"%(prog)s [options] {usage}",
        help=help,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(parser=command)
    return command


def _add_pack(commands: Commands) -> None:
    command = _add_command(
        commands,
        "pack",
        "SRC OUT",
        "pack images into shards",
        "Decode every image of SRC, and pack those that can be decoded into tars in\n"
        "OUT, shuffled. If it was stopped, the same command goes on where it was.\n"
        "Files and folders whose names start with a dot are skipped.",
    )
    command.epilog = _SOURCES
    command.add_argument("source", metavar="SRC", type=parse_path, help="folder, archive, pattern or URL of the images")
    command.add_argument(
        "out", metavar="OUT", type=parse_path, help="folder or URL for the shards: new or empty, and not in SRC"
    )
    add_source_options(command)
    add_packing_options(command)
    add_change_options(command)
    add_strict_option(add_image_options(command))
    run = command.add_argument_group("how to run")
    add_workers_option(run)
    run.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="local: processes on this machine; ray: the Ray cluster at RAY_ADDRESS, or one on this machine; all its "
        "nodes must see SRC and OUT (default: local)",
    )


def _add_index(commands: Commands) -> None:
    command = _add_command(
        commands,
        "index",
        "DIR",
        "index tars that another program made",
        "Decode every image in the tars of DIR, and write index.npy and manifest.json\n"
        "beside them. The tars are not changed.",
    )
    _add_folder_argument(command, "the tars")
    source = command.add_argument_group("what to index")
    source.add_argument(
        "--format",
        choices=("auto", "folders", "flat", "webdataset"),
        default="auto",
        help="folders: the folders in the tars are the classes; flat: no labels; webdataset: samples with cls or json "
        "labels (default: auto, look at the tars)",
    )
    add_image_extension_option(source)
    add_classes_option(source)
    add_image_options(command)
    add_workers_option(command.add_argument_group("how to run"))


def _add_check(commands: Commands) -> None:
    command = _add_command(
        commands,
        "check",
        "DIR",
        "check every byte and every image of a shard folder",
        "Check every byte and every image of a shard folder against its index and\n"
        "manifest. The exit status is 1 if there is a problem.",
    )
    _add_folder_argument(command, "the shards and their manifest")
    command.add_argument(
        "--report", type=parse_path, metavar="FILE", help="also write the result to this file, as JSON"
    )
    add_workers_option(command)


def _add_info(commands: Commands) -> None:
    command = _add_command(
        commands,
        "info",
        "DIR",
        "say what is in a shard folder",
        "Print counts, sizes, shapes and class balance of a shard folder, and which\nimages were rejected.",
    )
    _add_folder_argument(command, "the shards and their manifest")


def _add_stats(commands: Commands) -> None:
    command = _add_command(
        commands,
        "stats",
        "DIR",
        "measure the mean and the deviation of the color channels",
        "Decode images, and print the mean and the standard deviation of red, green and\n"
        "blue, for data.mean and data.std of a recipe. Every image counts the same.",
    )
    _add_folder_argument(command, "the shards and their manifest")
    command.add_argument(
        "--images", type=parse_sample_count, metavar="N", help="images to measure, spread evenly (default: all)"
    )
    command.add_argument(
        "--report", type=parse_path, metavar="FILE", help="also write the figures to this file, as JSON"
    )
    add_workers_option(command)


def _add_show(commands: Commands) -> None:
    command = _add_command(
        commands,
        "show",
        "--grid FILE.png DIR",
        "draw some samples of a shard folder",
        "Write a contact sheet of random samples with their classes.",
    )
    command.add_argument(
        "folder", metavar="DIR", type=parse_path, help="folder on this machine that holds the shards and their manifest"
    )
    command.add_argument(
        "--grid", type=parse_png_path, required=True, metavar="FILE.png", help="PNG file to write (required)"
    )
    command.add_argument(
        "--count", type=parse_sample_count, default=48, metavar="N", help="number of samples (default: %(default)s)"
    )
    command.add_argument(
        "--seed", type=parse_seed, default=0, help="seed that draws the samples (default: %(default)s)"
    )


def _add_folder_argument(command: argparse.ArgumentParser, content: str) -> None:
    command.add_argument("folder", metavar="DIR", type=parse_path, help=f"folder or URL that holds {content}")
