"""Completion of commands, flags and paths in a shell, made by shtab from a program's argument parser."""

import argparse
from collections.abc import Iterator

from shards.errors import UserError

SHELLS = ("bash", "zsh", "tcsh")
_FILES = ("FILE", "FILE.png", "MANIFEST", "SRC")  # metavars of arguments that are completed to files and folders
_FOLDERS = ("DIR", "FOLDER", "OUT")  # metavars of arguments that are completed to folders


def print_completion(parser: argparse.ArgumentParser, shell: str) -> None:
    """Print the script that completes the parser's commands and flags in a shell, one of `SHELLS`.

    Arguments are completed to paths if their metavar says so. Raises UserError where shtab is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise UserError("completion needs the package shtab, which is not installed. Run: pip install shtab") from error
    for action in _list_actions(parser):
        if action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # where shtab looks for it
        elif action.metavar in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell=shell))


def _list_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the arguments of a parser and of its commands."""
    for action in parser._actions:  # argparse has no public list of them
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _list_actions(command)
