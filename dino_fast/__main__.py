"""The dino-fast command."""

import sys
from collections.abc import Sequence
from typing import NoReturn

from shards.errors import UserError

USAGE = """usage: dino-fast COMMAND ...

commands:
  train   train a backbone with DINO on shards            (dino-fast train --help)
  plan    what a recipe will do and cost, without a run   (dino-fast plan --help)
  knn     k-NN score of a checkpoint on labelled shards   (dino-fast knn --help)
  linear  its score by linear classification              (dino-fast linear --help)
  doctor  find what limits a run on this machine          (dino-fast doctor --help)

Shards are made with `make-shards pack SRC OUT`. Many GPUs: torchrun --nproc_per_node N -m dino_fast.train ...
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns its exit status: 0, 1 for a failed run, 2 for a wrong call."""
    command, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if command == "train":
        from dino_fast.train import main as train

        return train(rest)
    if command in ("knn", "linear"):
        return _evaluate(command, rest)
    if command == "plan":
        from dino_fast.advise.plan import main as plan

        return plan(rest)
    if command == "doctor":
        from dino_fast.advise.doctor import main as doctor

        return doctor(rest)
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    print(f"dino-fast: unknown command {command!r}: choose train, plan, knn, linear or doctor", file=sys.stderr)
    return 2


def _evaluate(command: str, arguments: Sequence[str]) -> int:
    from dino_fast.evaluate.knn import knn_command
    from dino_fast.evaluate.linear import linear_command

    try:
        return (knn_command if command == "knn" else linear_command)(arguments)
    except (UserError, OSError) as error:  # TimeoutError is an OSError
        print(f"dino-fast {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"dino-fast {command}: stopped", file=sys.stderr)
        return 130


def command() -> NoReturn:
    """The command as a process."""
    from dino_fast.train import leave

    leave(main())


if __name__ == "__main__":
    command()
