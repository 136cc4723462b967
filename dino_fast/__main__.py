"""The dino-fast command."""

import difflib
import sys
from collections.abc import Sequence
from typing import NoReturn

from shards.errors import UserError
from shards.text import escape_unprintable
from shards.version import version

COMMANDS = {
    "train": "train a backbone with DINO on shards",
    "plan": "print what a run will do and cost, without running it",
    "doctor": "find what limits a run on this machine",
    "knn": "score a checkpoint by k-NN on labeled shards",
    "linear": "score a checkpoint by linear classification on labeled shards",
    "finetune": "train a checkpoint's whole network on labeled shards, and score it",
    "retrieval": "score a checkpoint by image retrieval, as on revisited Oxford and Paris",
    "copies": "score a checkpoint by copy detection, or make changed copies of images for it",
    "neighbors": "find the nearest images of some queries, as a contact sheet or a table",
    "evaluate": "run all evaluations that the data at hand allow, and write one table",
}
OPTIONS = ("--help", "--version", "--print-completion")
USAGE = f"""usage: dino-fast COMMAND ...

commands:
{"".join(f"  {name:9s} {line}{chr(10)}" for name, line in COMMANDS.items())}
options:
  --version                 print the version
  --print-completion SHELL  print the completion script of bash, zsh or tcsh; save and source it

`dino-fast COMMAND --help` lists the flags of a command.
Shards are made with `make-shards pack SRC OUT`.
To train on several GPUs: torchrun --nproc_per_node N -m dino_fast.train ...
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Return its exit status: 0, 1 for a failed run, 2 for a wrong call, and what the command adds."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0].startswith(("--local_rank", "--local-rank")):
        from dino_fast.distributed import drop_local_rank

        arguments = drop_local_rank(arguments)
    command, *rest = arguments or ["--help"]
    # Each command is imported where it is called, so that --help need not wait for torch.
    if command == "train":
        from dino_fast.train import main as run
    elif command == "plan":
        from dino_fast.advise.plan import main as run
    elif command == "doctor":
        from dino_fast.advise.doctor import main as run
    elif command == "knn":
        from dino_fast.evaluate.knn import main as run
    elif command == "linear":
        from dino_fast.evaluate.linear import main as run
    elif command == "finetune":
        from dino_fast.evaluate.finetune import main as run
    elif command == "retrieval":
        from dino_fast.evaluate.retrieval import main as run
    elif command == "copies":
        from dino_fast.evaluate.copies import main as run
    elif command == "neighbors":
        from dino_fast.evaluate.neighbors import main as run
    elif command == "evaluate":
        from dino_fast.evaluate.suite import main as run
    else:
        return _answer(command, rest)
    try:
        return run(rest)
    except (UserError, OSError) as error:  # TimeoutError is an OSError
        print(f"dino-fast {command}: {escape_unprintable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"dino-fast {command}: stopped", file=sys.stderr)
        return 130


def _answer(word: str, rest: Sequence[str]) -> int:
    """Print what was asked for instead of a command, or that there is no such command."""
    option, _, value = word.partition("=")
    if word in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if word == "--version":
        print(f"dino-fast {version()}")
        return 0
    if option == "--print-completion":
        return _print_completion(value or " ".join(rest))
    near = difflib.get_close_matches(word, [*COMMANDS, *OPTIONS], n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Choose one of {', '.join(COMMANDS)}."
    print(f"dino-fast: unknown command {word!r}. {hint}", file=sys.stderr)
    return 2


def _print_completion(shell: str) -> int:
    from shards.completion import SHELLS, print_completion

    if shell not in SHELLS:
        print(f"dino-fast: --print-completion expects one of {', '.join(SHELLS)}, not {shell!r}.", file=sys.stderr)
        return 2
    try:
        from dino_fast.completion import build_command_parser

        print_completion(build_command_parser(COMMANDS), shell)
        return 0
    except UserError as error:
        print(f"dino-fast: {error}", file=sys.stderr)
        return 1


def command() -> NoReturn:
    """Run the command in this process, and end the process with its exit status."""
    from dino_fast.run.command import accept_any_encoding, exit_process

    accept_any_encoding()
    exit_process(main())


if __name__ == "__main__":
    command()
