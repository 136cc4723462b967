"""The make-shards command."""

import argparse
import contextlib
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from shards.check import Report, check
from shards.errors import UserError
from shards.layout import MANIFEST_FILE
from shards.pack import Options, Packed, pack
from shards.sources import FORMATS, Listing, scan

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_LINE_EVERY = 10.0  # seconds, where there is no terminal
_NAMED = 5  # left-out pictures and problems that are printed in full

Progress = Callable[[int, int], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status: 0 done, 1 failed, 2 wrong call, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names are bytes, not always text
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        return status
    except UserError as error:
        print(f"make-shards: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a failing disk, say, in a place where nothing better is known
        print(f"make-shards: {error.filename or 'I/O'}: {error.strerror}; mend that and try again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("make-shards: interrupted; the same command again goes on from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make-shards", description="Pictures into WebDataset tars with an index.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    packing = commands.add_parser(
        "pack",
        help="pack the pictures of a folder",
        description="Decode every picture below SRC and pack those that decode into tars in OUT, shuffled. "
        "Where pictures lie in subfolders only, each folder directly below SRC is a class. "
        "The same command again goes on where a killed one stopped. Names that start with a dot are passed over.",
    )
    packing.add_argument("source", metavar="SRC", help="folder of class folders, or of pictures")
    packing.add_argument("out", metavar="OUT", help="folder to make; must not lie in SRC")
    packing.add_argument("--shard-size", type=_size, default=Options.shard_size, metavar="SIZE", help="default: 256MB")
    packing.add_argument("--seed", type=_seed, default=Options.seed, help="of the order (default: %(default)s)")
    packing.add_argument("--name", type=_name, default=Options.name, help="prefix of the tars (default: %(default)s)")
    packing.add_argument(
        "--format", choices=FORMATS, default="auto", help="folders: with labels; flat: without; default: look at SRC"
    )
    packing.set_defaults(run=_pack)
    checking = commands.add_parser(
        "check", help="verify every byte and every picture", description="Verify every byte and every picture of DIR."
    )
    checking.add_argument("folder", metavar="DIR", help="folder that 'make-shards pack' has made")
    checking.set_defaults(run=_check)
    for command in (packing, checking):
        command.add_argument(
            "--workers", type=_workers, default=_cores(), metavar="N", help="processes (default here: %(default)s)"
        )
    return parser


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS or float(match[1]) * _UNITS[match[2].upper()] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it like 256MB, 1.5GB or 512MiB")
    return round(float(match[1]) * _UNITS[match[2].upper()])


def _whole(text: str, least: int, most: int, what: str) -> int:
    if not re.fullmatch(r"\d{1,20}", text) or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is no {what}; give a whole number from {least} to {most}")
    return int(text)


def _seed(text: str) -> int:
    return _whole(text, 0, 2**63 - 1, "seed")


def _workers(text: str) -> int:
    return _whole(text, 1, 1024, "number of processes")


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no prefix; use at most 64 letters, digits, - and _")
    return text


def _pack(arguments: argparse.Namespace) -> int:
    began = time.monotonic()
    listing = scan(arguments.source, arguments.format)
    print(_describe(listing), flush=True)
    options = Options(arguments.seed, arguments.shard_size, arguments.name)
    with _progress("packing") as progress:
        packed = pack(listing, arguments.out, options, arguments.workers, progress)
    for line in _packed_lines(packed, arguments.out, time.monotonic() - began):
        print(line)
    return 0


def _describe(listing: Listing) -> str:
    what = f"{len(listing.classes)} class folders" if listing.classes else "no labels"
    return f"{listing.root}: {len(listing.sources)} pictures, {what}; {listing.ignored} other files ignored"


def _packed_lines(packed: Packed, out: str, seconds: float) -> Iterator[str]:
    manifest = packed.manifest
    total = sum(shard.bytes for shard in manifest.shards)
    counts = f"{manifest.samples} pictures, {len(manifest.classes)} classes, {len(manifest.shards)} shards"
    yield f"{out}: {'already complete: ' if packed.was_complete else ''}{counts}, {total} bytes"
    if manifest.rejected:
        yield f"{len(manifest.rejected)} pictures left out; all of them are in {os.path.join(out, MANIFEST_FILE)}"
        yield from (f"  {entry.source}: {entry.reason}" for entry in manifest.rejected[:_NAMED])
        if len(manifest.rejected) > _NAMED:
            yield "  …"
    if packed.kept and not packed.was_complete:
        yield f"{packed.kept} shards were finished before and kept"
    if packed.judged:
        yield f"{seconds:.1f} s, {packed.judged / seconds:.0f} img/s"


def _check(arguments: argparse.Namespace) -> int:
    began = time.monotonic()
    with _progress("checking") as progress:
        report = check(arguments.folder, arguments.workers, progress)
    for problem in report.problems:
        print(problem)
    print(_checked_line(report, arguments.folder, time.monotonic() - began))
    return 1 if report.problems else 0


def _checked_line(report: Report, folder: str, seconds: float) -> str:
    verdict = f"{len(report.problems)} problems" if report.problems else "all is well"
    looked = f"{report.pictures} pictures, {report.shards} shards, {report.bytes} bytes"
    return f"{folder}: {verdict}: {looked}; {seconds:.1f} s, {report.pictures / seconds:.0f} img/s"


@contextlib.contextmanager
def _progress(doing: str) -> Iterator[Progress]:
    """A bar on a terminal, else a line now and then; both on stderr."""
    with _bar(doing) if sys.stderr.isatty() else contextlib.nullcontext(_lines(doing)) as progress:
        yield progress


def _lines(doing: str) -> Progress:
    began = last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _LINE_EVERY:
            last = now
            rate = done / (now - began)
            left = f", {(total - done) / rate:.0f} s left" if done else ""
            print(f"{doing}: {done} of {total} pictures, {rate:.0f} img/s{left}", file=sys.stderr, flush=True)

    return show


@contextlib.contextmanager
def _bar(doing: str) -> Iterator[Progress]:
    from rich import progress as rich_progress
    from rich.console import Console

    class Rate(rich_progress.ProgressColumn):
        """Pictures a second."""

        def render(self, task: rich_progress.Task) -> str:
            return f"{task.speed or 0:.0f} img/s"

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        Rate(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True)) as bars:
        bar = bars.add_task(doing, total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)


if __name__ == "__main__":
    sys.exit(main())
