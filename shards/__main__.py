"""The make-shards command."""

import io
import os
import sys
from collections.abc import Sequence

from shards import commands
from shards.arguments import build_parser, parse_arguments
from shards.completion import print_completion
from shards.errors import UserError
from shards.text import escape_unprintable

_COMMANDS = {
    "pack": commands.run_pack,
    "index": commands.run_index,
    "check": commands.run_check,
    "info": commands.run_info,
    "show": commands.run_show,
    "stats": commands.run_stats,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 1 failed, 2 wrong call, 130 interrupted."""
    _open_streams()
    arguments = parse_arguments(argv)
    try:
        if arguments.print_completion:
            print_completion(build_parser(), arguments.print_completion)
            return 0
        if arguments.command is None:
            arguments.parser.print_help()
            return 0
        _refuse_other_encodings()
        return _COMMANDS[arguments.command](arguments)
    except UserError as error:
        return _print_failure(str(error))
    except OSError as error:  # for example a failing disk, where nothing better is known
        return _print_failure(f"{error.filename or 'I/O'}: {error.strerror or error}. Fix that and try again.")
    except KeyboardInterrupt:
        return _print_failure("interrupted. Run the same command again to go on from here.", 130)


def _open_streams() -> None:
    """Open output that takes whatever is written to it: names may not be text, and the caller may have closed it."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  for the life of the process
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _refuse_other_encodings() -> None:
    """Raise UserError where file names would be decoded in another way, which would change keys and classes."""
    if (encoding := sys.getfilesystemencoding()) != "utf-8":
        raise UserError(f"file names are decoded as {encoding} in this locale. Set PYTHONUTF8=1, and run it again.")


def _print_failure(reason: str, status: int = 1) -> int:
    print(f"make-shards: {escape_unprintable(reason)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
