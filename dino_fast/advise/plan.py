"""The plan command: what a run will do and cost, before it is started.

`dino-fast plan --config FILE --images N` prints steps, phases, schedules, checkpoints, memory and time. It takes
seconds, needs no GPU, and with --images no shards.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from dino_fast.advise.estimate import estimate_run, measure_train_set
from dino_fast.advise.own_flags import parse_own_flags
from dino_fast.advise.plan_text import format_plan
from dino_fast.advise.schedule_plots import choose_characters, plot_schedules
from dino_fast.config import Recipe, UsageError, read_recipe
from dino_fast.evaluate.arguments import parse_positive_number, parse_whole_number
from dino_fast.run.schedules import Schedules
from shards.errors import UserError
from shards.text import escape_unprintable


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, Recipe]:
    """Return the plan's own flags, and the recipe that the other flags describe. Raises UsageError."""
    own, rest = parse_own_flags(build_parser(), arguments)
    return own, read_recipe(rest, "dino-fast plan", also=[name.replace("_", "-") for name in vars(own)])


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the plan's own flags."""
    parser = argparse.ArgumentParser(
        prog="dino-fast plan",
        usage="dino-fast plan --config FILE [--SETTING VALUE ...] [--images N] [--ranks N] [--images-per-s X] "
        "[--json FILE]",
        description="Print what a run of a recipe will do and cost: steps, schedules, checkpoints, memory and time. "
        "Nothing is trained or written.",
        epilog="Every setting of a recipe is a flag, too. `dino-fast train --help` lists them.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "--images", type=parse_whole_number(1), metavar="N",
        help="number of images in the training set (default: those in the shards of data.train)",
    )  # fmt: skip
    parser.add_argument(
        "--ranks", type=parse_whole_number(1), default=1, metavar="N",
        help="number of ranks: processes that train together, one for each GPU (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--images-per-s", type=parse_positive_number, metavar="X",
        help="speed of the training, in images a second of all ranks together (default: the speed that an earlier run "
        "logged in the recipe's output folder)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the plan to this file, as a JSON object")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the plan command. Return its exit status: 0, 1 for a run that could not start, 2 for a wrong call."""
    try:
        own, recipe = parse_arguments(sys.argv[1:] if arguments is None else arguments)
        train_set = measure_train_set(recipe, own.images)
        plan = estimate_run(recipe, train_set, own.ranks, own.images_per_s)
        schedules = Schedules(recipe, plan["run"]["steps_per_epoch"])
        columns, characters = shutil.get_terminal_size().columns, choose_characters(sys.stdout.encoding)
        plots = plot_schedules(schedules, columns, characters)
        print("\n".join([*format_plan(recipe, plan), "", *plots]))  # one write, so that `| head` breaks no pipe
        if own.json:
            own.json.write_text(json.dumps(plan) + "\n", encoding="utf-8")
        return 0
    except (UserError, OSError) as error:
        print(f"dino-fast plan: {escape_unprintable(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("dino-fast plan: stopped", file=sys.stderr)
        return 130
