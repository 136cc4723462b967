"""The flags that plan and doctor have besides those of a recipe."""

import argparse
from collections.abc import Sequence

from dino_fast.config import UsageError
from dino_fast.evaluate.arguments import check_json_file, explain_argument_error
from shards.errors import UserError


def parse_own_flags(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the command's own flags, and the other arguments, which describe a recipe.

    The parser has a flag --json and raises its errors. Raises UsageError for wrong values, and for a --json that could
    not be written.
    """
    try:
        own, rest = parser.parse_known_args(list(arguments))
        check_json_file(own.json)
    except argparse.ArgumentError as error:
        raise UsageError(explain_argument_error(str(error))) from error
    except UserError as error:
        raise UsageError(str(error)) from error
    return own, rest
