"""All evaluations that the data at hand allow, one after another, in one table beside the published figures.

Each evaluation is a command of its own, and leaves its result in a file. So a suite that was stopped goes on with the
evaluation that it was in. `dino-fast evaluate` is at the end.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dino_fast.checkpoint import list_checkpoints
from dino_fast.evaluate import copies, finetune, knn, linear, neighbors, retrieval
from dino_fast.evaluate.arguments import FlagParser, add_cache_flag, add_network_flags, parse_whole_number, write_json
from dino_fast.evaluate.score_table import ScoreRow, format_table, list_rows
from shards.argument_types import parse_path as parse_path_or_url
from shards.errors import UserError
from shards.index import ShardIndex
from shards.storage.atomic_write import write_text
from shards.text import escape_unprintable


@dataclass(frozen=True)
class Evaluation:
    """One command of a suite."""

    name: str
    """its result is in NAME.json"""
    run: Callable[[Sequence[str]], int]
    """the command's main"""
    arguments: list[str]
    """the command's, without --json"""
    missing: str = ""
    """the flags without which it cannot run; empty where it can"""


def list_evaluations(options: argparse.Namespace) -> Iterator[Evaluation]:
    """Yield the evaluations of the suite, with those for which the data are missing."""
    yield from _list_labeled(options)
    if not options.retrieval:
        yield Evaluation("retrieval", retrieval.main, [], "--retrieval")
    for truth in options.retrieval:
        name = truth.stem.removeprefix("gnd_")
        # As published: Oxford at 224 pixels, Paris at 512 and in three sizes.
        size = ["--size", "512", "--multi-scale"] if options.suite == "paper" and name != "roxford5k" else []
        flags = ["--ground-truth", str(truth), *size, *_pass_on(options, "limit")]
        yield Evaluation(f"retrieval-{name}", retrieval.main, [*_name_network(options), *flags])
    flags = ["--images", str(options.copies), *_pass_on(options, "whiten", "limit")]
    yield Evaluation("copies", copies.main, [*_name_network(options), *flags], "" if options.copies else "--copies")


def _list_labeled(options: argparse.Namespace) -> Iterator[Evaluation]:
    """Yield the evaluations of labeled shards."""
    network, out = _name_network(options), options.output
    labeled = [*network, *_pass_on(options, "train", "val", "cache", "limit")]
    missing = "" if options.train and options.val else "--train and --val"
    yield Evaluation("knn", knn.main, labeled, missing)
    if options.suite == "quick":
        yield Evaluation("linear", linear.main, labeled, missing)
        shown = [*network, "--images", str(options.val), "--output", str(out / "neighbors.png")]
        yield Evaluation("neighbors", neighbors.main, shown, "" if options.val else "--val")
        return
    published = [*labeled, "--protocol", "published", "--output", str(out / "linear")]
    yield Evaluation("linear", linear.main, published, missing)
    yield Evaluation("finetune", finetune.main, [*labeled, "--output", str(out / "finetune")], missing)


def _name_network(options: argparse.Namespace) -> list[str]:
    """Return the flags of a command that name the network and the device."""
    which = ["--pretrained"] if options.pretrained else ["--checkpoint", str(options.checkpoint)]
    return [*which, *_pass_on(options, "backbone", "network", "device")]


def _pass_on(options: argparse.Namespace, *names: str) -> list[str]:
    """Return the flags of these names that were given, with their values."""
    given = [(name, getattr(options, name)) for name in names]
    return [word for name, value in given if value is not None for word in (f"--{name}", str(value))]


def run_suite(options: argparse.Namespace) -> list[ScoreRow]:
    """Run the evaluations that can run and have no result yet, and return the rows of all.

    An evaluation that fails has a row that says why, and the others go on.
    """
    rows: list[ScoreRow] = []
    for evaluation in list_evaluations(options):
        if evaluation.missing:
            rows.append(ScoreRow(evaluation.name, "", None, None, f"skipped: it needs {evaluation.missing}"))
            continue
        try:
            rows += list_rows(evaluation.name, _get_result(evaluation, options))
        except (UserError, OSError) as error:
            reason = escape_unprintable(str(error))
            print(f"{evaluation.name} failed: {reason}")
            rows.append(ScoreRow(evaluation.name, "", None, None, f"failed: {reason}"))
    return rows


def _get_result(evaluation: Evaluation, options: argparse.Namespace) -> dict[str, Any]:
    """Return the result of an evaluation: that of an earlier run of the same one, or a new one."""
    file, call = (options.output / f"{evaluation.name}.{suffix}" for suffix in ("json", "call.json"))
    wanted = {"arguments": evaluation.arguments, **_describe_inputs(options)}
    if file.exists() and call.exists() and json.loads(call.read_text()) == wanted:
        print(f"\n{evaluation.name}: its result is in {file}")
    else:
        call.unlink(missing_ok=True)
        _run(evaluation, [*evaluation.arguments, "--json", str(file)], options.gpus)
        write_json(call, wanted)
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def _run(evaluation: Evaluation, arguments: list[str], gpus: int) -> None:
    """Run an evaluation in this process, or in one process for each GPU. Raises UserError where one of those fails."""
    command = evaluation.name.partition("-")[0]
    print(f"\ndino-fast {command} {' '.join(arguments)}", flush=True)
    if gpus == 1:
        evaluation.run(arguments)
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
    status = subprocess.run([*torchrun, "-m", "dino_fast", command, *arguments], check=False).returncode
    if status:
        raise UserError(f"its processes ended with status {status}. What they printed is above.")


def _describe_inputs(options: argparse.Namespace) -> dict[str, Any]:
    """Return what tells whether the files are those of an earlier run: a checkpoint's size and time, shards' hashes."""
    about = None if options.pretrained else options.checkpoint.stat()
    found: dict[str, Any] = {"checkpoint": about and [about.st_size, about.st_mtime_ns]}
    for name in ("train", "val"):
        if folder := getattr(options, name):
            with ShardIndex(folder) as index:
                found[name] = index.fingerprint
    return found


# The command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dino-fast evaluate`: print the table of all scores, and write it into --output."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if (options.run is None) != options.pretrained:
        parser.error("expected either RUN or --pretrained")
    if "RANK" in os.environ:
        parser.error("torchrun started it. Start it without, and pass --gpus N")
    options.output = options.output or _choose_output(options)
    options.checkpoint = None if options.pretrained else _find_checkpoint(options.run)
    options.output.mkdir(parents=True, exist_ok=True)
    rows = run_suite(options)
    title = f"{options.suite} suite of {options.backbone if options.pretrained else options.run.name}"
    table = format_table(title, rows)
    write_json(options.output / "scores.json", {"title": title, "scores": [asdict(row) for row in rows]})
    write_text(options.output / "scores.md", table)
    print(f"\n{table}\nscores.md, scores.json and the result of each evaluation are in {options.output}")
    return int(any(row.note.startswith("failed") for row in rows))


def _choose_output(options: argparse.Namespace) -> Path:
    if options.run is None or not options.run.is_dir():
        raise UserError("--output is missing. Name a folder for the results.")
    folder: Path = options.run / f"evaluate-{options.suite}"
    return folder


def _find_checkpoint(run: Path) -> Path:
    """Return the newest checkpoint of a run, or the file itself. Raises UserError where there is none.

    A training that goes on must not change what is evaluated in the middle of a suite.
    """
    if not run.is_dir():
        if not run.exists():
            raise UserError(f"{run}: no such file. Pass a run's folder, or a file of weights.")
        return run
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        raise UserError(f"{run} has no step-….pt. Pass the output folder of a run.")
    return checkpoints[-1]


_DESCRIPTION = (
    "Run all evaluations that the data at hand allow, one after another, and write one table beside the published "
    "figures of the same backbone. quick: k-NN, a linear layer on cached features, neighbors, retrieval and copies. "
    "paper: k-NN, the published linear protocol, fine-tuning, retrieval in the published sizes, and copies."
)
_EPILOG = (
    "An evaluation whose data were not given is skipped, and the table says so. One that fails does not stop the "
    "others; the exit status is then 1. The same command again keeps the results that are there, and does the rest."
)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command's flags."""
    parser = FlagParser(prog="dino-fast evaluate", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument(
        "run", nargs="?", type=Path, metavar="RUN",
        help="the output folder of a run, which means its newest checkpoint, or a file of weights",
    )  # fmt: skip
    parser.add_argument("--pretrained", action="store_true", help="in place of RUN: timm's weights for --backbone")
    add_network_flags(parser)
    parser.add_argument(
        "--suite", choices=("quick", "paper"), default="quick", help="which evaluations (default: quick)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help="folder for the results (default: evaluate-quick or evaluate-paper in RUN)",
    )  # fmt: skip
    for name, what in ("train", "labeled shards to learn from"), ("val", "labeled shards to classify"):
        parser.add_argument(f"--{name}", type=parse_path_or_url, metavar="DIR", help=f"folder or URL of {what}")
    parser.add_argument(
        "--retrieval", type=Path, action="append", default=[], metavar="FILE",
        help="a ground truth, as dino-fast retrieval takes it; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--copies", type=Path, metavar="DIR", help="a folder of originals and copies, as dino-fast copies takes it"
    )
    parser.add_argument("--whiten", metavar="DIR", help="images that the whitening of copies is learned on")
    parser.add_argument(
        "--gpus", type=parse_whole_number(1), default=1, metavar="N",
        help="share each evaluation among N GPUs, or N processes on a CPU (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=parse_whole_number(1), metavar="N", help="use at most N images of each set (default: all)"
    )
    add_cache_flag(parser)
    return parser
