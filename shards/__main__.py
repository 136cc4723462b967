"""The make-shards command."""

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from shards import messages
from shards.arguments import (
    Parser,
    add_classes_option,
    add_folder_argument,
    add_judge_options,
    add_packing_options,
    add_show_options,
    add_source_options,
    add_workers_option,
    path,
)
from shards.errors import UserError
from shards.images.validate import Judge
from shards.index import ShardIndex, open_records
from shards.inspect.check import check
from shards.inspect.info import describe, printable
from shards.inspect.show import contact_sheet, save
from shards.layout import MANIFEST_FILE, PARTS, PLAN_FILE, Manifest, load_manifest
from shards.messages import say
from shards.packing import workers
from shards.packing.index_tars import index
from shards.packing.pack import TAKEN, Engine, Options, pack, refuse_overlap
from shards.packing.parts import OTHER_OUT, refuse_foreign
from shards.progress import progress
from shards.sources import labels, subset
from shards.sources.listing import Listing, few
from shards.sources.scan import require, scan, scan_tars
from shards.storage import files
from shards.storage.output import Folder, out_folder

_HALVES = ("train", "val")  # of --split-val


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status: 0 done, 1 failed, 2 wrong call, 130 interrupted."""
    _open_streams()
    arguments = _arguments(argv)
    try:
        _refuse_other_encodings()
        status: int = arguments.run(arguments)
        return status
    except UserError as error:
        return _failed(str(error))
    except OSError as error:  # a failing disk, say, in a place where nothing better is known
        return _failed(f"{error.filename or 'I/O'}: {error.strerror or error}; mend that and try again")
    except KeyboardInterrupt:
        return _failed("interrupted; the same command again goes on from here", 130)


def _open_streams() -> None:
    """Output that takes whatever is written to it: names are bytes, not always text, and the caller may close it."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  for the life of the process
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _refuse_other_encodings() -> None:
    """Raises UserError where file names would be taken apart in another way, which changes keys and classes."""
    if (encoding := sys.getfilesystemencoding()) != "utf-8":
        raise UserError(f"file names are taken as {encoding} in this locale; set PYTHONUTF8=1, and run it again")


def _failed(why: str, status: int = 1) -> int:
    print(f"make-shards: {printable(why)}", file=sys.stderr)
    return status


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments, others = parser.parse_known_args(argv)
    if others and others[0].startswith("-"):
        parser.error(f"no such option: {others[0]}")
    if others:
        parser.error(f"too many arguments: {few(others)}; put a pattern in quotes, or the shell expands it")
    if arguments.run is _pack and arguments.name and arguments.split_val:
        parser.error("--name and --split-val: the two sets are called train and val; leave --name out")
    if arguments.run is _pack and arguments.quality and not arguments.max_short_side:
        parser.error("--quality is for the pictures that --max-short-side re-encodes; give that too")
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="make-shards", description="Pictures into WebDataset tars with an index.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    packing = commands.add_parser(
        "pack",
        usage="%(prog)s [options] SRC OUT",
        help="pack pictures into shards",
        description="Decode every picture of SRC and pack those that decode into tars in OUT, shuffled. The same "
        "command again goes on where a killed one stopped. Names that start with a dot are passed over.",
        epilog="SRC is looked at: a folder whose pictures lie in class folders, or one of pictures without labels; "
        "a tar (plain, compressed, or of one tar a class, as ImageNet's train archive) or zip archive of such folders; "
        "WebDataset tars; Hugging Face parquet; a folder of archives, or a pattern in quotes ('train-*.parquet'). "
        "SRC and OUT may be URLs that fsspec knows (s3://BUCKET/FOLDER, gs://BUCKET/FOLDER).",
    )
    packing.add_argument("source", metavar="SRC", type=path, help="folder, archive, pattern or URL")
    packing.add_argument("out", metavar="OUT", type=path, help="new or empty folder, or URL; must not lie in SRC")
    add_source_options(packing)
    add_packing_options(packing)
    add_judge_options(packing)
    packing.set_defaults(run=_pack)
    indexing = commands.add_parser(
        "index",
        help="index tars that somebody else made",
        description="Decode every picture of the tars in DIR and write index.npy and manifest.json beside them. The "
        "tars are not changed.",
    )
    add_folder_argument(indexing, "the tars")
    indexing.add_argument(
        "--format", choices=("auto", "folders", "flat", "webdataset"), default="auto", help="default: look at the tars"
    )
    add_classes_option(indexing)
    add_judge_options(indexing)
    indexing.set_defaults(run=_index)
    checking = commands.add_parser(
        "check", help="verify every byte and every picture", description="Verify every byte and every picture of DIR."
    )
    add_folder_argument(checking, "shards with their manifest")
    checking.add_argument("--report", type=path, metavar="FILE", help="write what was found as JSON")
    checking.set_defaults(run=_check)
    informing = commands.add_parser(
        "info", help="say what is in shards", description="Counts, sizes, shapes, class balance and what was left out."
    )
    add_folder_argument(informing, "shards with their manifest")
    informing.set_defaults(run=_info)
    showing = commands.add_parser(
        "show",
        help="draw some samples",
        description="A contact sheet of samples drawn by the seed, with their classes.",
    )
    add_folder_argument(showing, "shards with their manifest")
    add_show_options(showing)
    showing.set_defaults(run=_show)
    for command in (packing, indexing, checking):
        add_workers_option(command)
    return parser


def _pack(arguments: argparse.Namespace) -> int:
    require(arguments.source)
    refuse_overlap(arguments.source, arguments.out)
    is_new = not os.path.exists(arguments.out)
    try:
        with (out := out_folder(arguments.out)).held(TAKEN):
            _pack_into(out, arguments)
    finally:
        if is_new:  # and nothing came of it
            for empty in (os.path.join(arguments.out, PARTS), arguments.out):
                with contextlib.suppress(OSError):
                    os.rmdir(empty)
    return 0


def _pack_into(out: Folder, arguments: argparse.Namespace) -> None:
    is_finished = out.size(MANIFEST_FILE) is not None
    is_begun = is_finished or out.size(PLAN_FILE) is not None
    if arguments.split_val is not None and is_begun:
        raise UserError(f"{out} holds another packing, without --split-val; {OTHER_OUT}")
    if not is_begun:
        refuse_foreign(out, () if arguments.split_val is None else _HALVES)  # before anything is staged in it
    try:
        listing = _listed(arguments, out.work)
        say(messages.listed(listing))
        _refuse_staged_far_away(arguments, listing, out)
        _pack_listing(arguments, listing, out)
    finally:
        if is_finished:
            out.remove_parts()  # what was staged only to see that all is done, or that OUT is another packing's


def _refuse_staged_far_away(arguments: argparse.Namespace, listing: Listing, out: Folder) -> None:
    is_staged = any(Path(path).parent == out.work for path in listing.containers)
    if arguments.engine == "ray" and is_staged and files.is_url(str(out)):
        raise UserError(
            f"{arguments.source} is unpacked on this machine, where Ray's other nodes do not see it; give a folder "
            "that they share as OUT, or leave --engine ray out"
        )


def _pack_listing(arguments: argparse.Namespace, listing: Listing, out: Folder) -> None:
    if arguments.split_val is None:
        _pack_one(arguments, listing, out, arguments.name or Options.name)
        return
    for name, half in zip(_HALVES, subset.split(listing, arguments.split_val, arguments.seed), strict=True):
        with (folder := out_folder(f"{out}/{name}")).held(TAKEN):
            _pack_one(arguments, half, folder, name)
    out.remove_parts()


def _listed(arguments: argparse.Namespace, stage: Path) -> Listing:
    """The pictures that are to be packed, labelled."""
    with progress("listing") as tell:
        listing = scan(arguments.source, arguments.format, stage, lambda found: tell(found, 0))
    if arguments.labels:
        listing = labels.from_file(listing, arguments.labels)
    if arguments.subset_classes is not None:
        listing = subset.classes(listing, subset.names(arguments.subset_classes, listing.classes))
    if arguments.classes:
        listing = labels.as_in(listing, _classes(arguments.classes), arguments.classes)
    if arguments.limit:
        listing = subset.limit(listing, arguments.limit, arguments.seed)
    return listing


def _classes(path: str) -> tuple[str, ...]:
    """The classes that a manifest, or that of a folder, knows. Raises UserError where there is none."""
    file = f"{path.rstrip('/')}/{MANIFEST_FILE}" if os.path.isdir(path) or not path.endswith(".json") else path
    mend = f"give the {MANIFEST_FILE} of the packed train set, or its folder"
    if not files.is_url(file) and not os.path.isfile(file):
        raise UserError(f"--classes {path}: no {MANIFEST_FILE} there; {mend}")
    try:
        return Manifest.from_json(files.read_whole(file).decode()).classes
    except ValueError as error:
        raise UserError(f"--classes {path}: no manifest of make-shards ({error}); {mend}") from error


def _pack_one(arguments: argparse.Namespace, listing: Listing, out: Folder, name: str) -> None:
    began = time.monotonic()
    options = Options(
        seed=arguments.seed,
        shard_size=arguments.shard_size,
        name=name,
        judge=_judge(arguments),
        max_short_side=arguments.max_short_side,
        quality=arguments.quality or Options.quality,
    )
    with progress("packing") as tell:
        packed = pack(listing, out, options, arguments.workers, tell, _engine(arguments.engine))
    for line in messages.packed(packed, str(out), time.monotonic() - began):
        say(line)


def _engine(name: str) -> Engine:
    if name == "local":
        return workers.run_tasks
    from shards.packing import ray_engine

    return ray_engine.run_tasks


def _index(arguments: argparse.Namespace) -> int:
    began = time.monotonic()
    folder = _existing(arguments.folder)
    names = [name for name in folder.names() if name.lower().endswith(".tar")]
    if not names:
        raise UserError(f"{folder} holds no tars; give the folder that does, or pack its pictures into another")
    if folder.size(MANIFEST_FILE) is not None and not load_manifest(folder).foreign:
        raise UserError(
            f"{folder} holds another packing, of make-shards itself and with its index; nothing is to be done"
        )
    with folder.held(TAKEN):
        with progress("listing") as tell:
            listing = scan_tars(str(folder), names, arguments.format, lambda found: tell(found, 0))
        if arguments.classes:
            listing = labels.as_in(listing, _classes(arguments.classes), arguments.classes)
        say(messages.listed(listing))
        with progress("indexing") as tell:
            manifest = index(listing, folder, _judge(arguments), arguments.workers, tell)
    for line in (*messages.described(manifest, str(folder)), f"{time.monotonic() - began:.1f} s"):
        say(line)
    return 0


def _existing(path: str) -> Folder:
    """The folder to look at. Raises UserError for a file."""
    if os.path.isfile(path):
        raise UserError(f"{path} is a file; give the folder that it lies in")
    return out_folder(path)


def _judge(arguments: argparse.Namespace) -> Judge:
    return Judge(arguments.check, arguments.max_pixels, arguments.picture_seconds)


def _check(arguments: argparse.Namespace) -> int:
    began = time.monotonic()
    folder = str(_existing(arguments.folder))
    if arguments.report and not os.path.isdir(os.path.dirname(arguments.report) or "."):
        raise UserError(f"--report {arguments.report}: no such folder; make it first")
    with progress("checking") as tell:
        report = check(folder, arguments.workers, tell)
    for line in messages.checked(report, folder, time.monotonic() - began):
        say(line)
    if arguments.report:
        Path(arguments.report).write_text(report.to_json())
    return 1 if report.problems else 0


def _info(arguments: argparse.Namespace) -> int:
    folder = _existing(arguments.folder)
    manifest = load_manifest(folder)
    for line in describe(manifest, open_records(folder, manifest)):
        say(line)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    if files.is_url(arguments.folder):
        raise UserError(f"{arguments.folder}: pictures are drawn from local shards; copy the folder here first")
    with ShardIndex(str(_existing(arguments.folder))) as samples:
        save(contact_sheet(samples, arguments.count, arguments.seed), arguments.grid)
    say(str(arguments.grid))
    return 0


if __name__ == "__main__":
    sys.exit(main())
