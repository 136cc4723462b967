"""What each command of make-shards does. Every function returns the exit status."""

import argparse
import contextlib
import os
import time
from pathlib import Path

from shards import messages
from shards.errors import UserError
from shards.images.reencode import Changes
from shards.images.rules import ImageRules
from shards.index import ShardIndex, open_records
from shards.inspect.channels import measure_channels
from shards.inspect.check import check
from shards.inspect.info import describe
from shards.inspect.show import draw_contact_sheet, save_sheet
from shards.layout import MANIFEST_FILE, PARTS_FOLDER, PLAN_FILE
from shards.manifest import Manifest, load_manifest
from shards.messages import print_line
from shards.packing import workers
from shards.packing.index_tars import index_tars
from shards.packing.ownership import CHOOSE_OUT, refuse_other_files
from shards.packing.pack import IF_LOCKED, Engine, pack, refuse_overlap
from shards.packing.plan import Options
from shards.progress import show_progress
from shards.sources import subset
from shards.sources.fields import Fields
from shards.sources.label_files import label_from_file
from shards.sources.labels import number_as_in
from shards.sources.listing import Listing
from shards.sources.scan import require_source, scan, scan_tars
from shards.storage import files
from shards.storage.folders import Folder, open_folder
from shards.text import format_count

_SPLIT_NAMES = ("train", "val")  # of --split-val


def run_pack(arguments: argparse.Namespace) -> int:
    require_source(arguments.source)
    refuse_overlap(arguments.source, arguments.out)
    is_new = not os.path.exists(arguments.out)
    try:
        with (out := open_folder(arguments.out)).lock(IF_LOCKED):
            _pack_into(out, arguments)
    finally:
        if is_new:  # remove it where it is still empty
            for empty in (os.path.join(arguments.out, PARTS_FOLDER), arguments.out):
                with contextlib.suppress(OSError):
                    os.rmdir(empty)
    return 0


def run_index(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    folder = _open_existing(arguments.folder)
    names = [name for name in folder.list_files() if name.lower().endswith(".tar")]
    if not names:
        raise UserError(f"{folder} holds no tars. Give the folder that does, or pack its images into another folder.")
    if folder.get_size(MANIFEST_FILE) is not None and not load_manifest(folder).foreign:
        raise UserError(f"{folder} was made by make-shards pack, which also wrote its index. There is nothing to do.")
    with folder.lock(IF_LOCKED):
        with show_progress("listing") as report:
            listing = scan_tars(
                str(folder),
                names,
                arguments.format,
                lambda found: report(found, 0),
                Fields(arguments.image_extension),
            )
        if arguments.classes:
            listing = number_as_in(listing, _load_classes(arguments.classes), arguments.classes)
        for line in messages.describe_listing(listing):
            print_line(line)
        with show_progress("indexing") as report:
            manifest = index_tars(listing, folder, _make_rules(arguments), arguments.workers, report)
    for line in (*messages.describe_shards(manifest, str(folder)), f"{time.monotonic() - started:.1f} s"):
        print_line(line)
    return 0


def run_check(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    folder = str(_open_existing(arguments.folder))
    _refuse_report_without_folder(arguments.report)
    with show_progress("checking") as progress:
        report = check(folder, arguments.workers, progress)
    for line in messages.describe_report(report, folder, time.monotonic() - started):
        print_line(line)
    if arguments.report:
        Path(arguments.report).write_text(report.to_json())
    return 1 if report.problems else 0


def run_info(arguments: argparse.Namespace) -> int:
    folder = _open_existing(arguments.folder)
    manifest = load_manifest(folder)
    for line in describe(manifest, open_records(folder, manifest)):
        print_line(line)
    return 0


def run_show(arguments: argparse.Namespace) -> int:
    if files.is_url(arguments.folder):
        raise UserError(f"{arguments.folder}: only local shards can be shown. Copy the folder to this machine first.")
    with ShardIndex(str(_open_existing(arguments.folder))) as samples:
        save_sheet(draw_contact_sheet(samples, arguments.count, arguments.seed), arguments.grid)
    print_line(str(arguments.grid))
    return 0


def run_stats(arguments: argparse.Namespace) -> int:
    _refuse_report_without_folder(arguments.report)
    with ShardIndex(str(_open_existing(arguments.folder))) as index, show_progress("measuring") as progress:
        found = measure_channels(index, arguments.images, arguments.workers, progress)
    for line in messages.describe_channels(found):
        print_line(line)
    if arguments.report:
        Path(arguments.report).write_text(found.to_json())
    return 0


def _refuse_report_without_folder(report: str | None) -> None:
    if report and not os.path.isdir(os.path.dirname(report) or "."):
        raise UserError(f"--report {report}: its folder does not exist. Make it first.")


def _pack_into(out: Folder, arguments: argparse.Namespace) -> None:
    is_finished = out.get_size(MANIFEST_FILE) is not None
    is_begun = is_finished or out.get_size(PLAN_FILE) is not None
    if arguments.split_val is not None and is_begun:
        raise UserError(f"{out} holds another packing, without --split-val. {CHOOSE_OUT}")
    if not is_begun:
        refuse_other_files(out, () if arguments.split_val is None else _SPLIT_NAMES)  # before it is written to
    try:
        listing = _list_images(arguments, out.work_folder)
        for line in messages.describe_listing(listing, arguments.strict):
            print_line(line)
        if arguments.strict and listing.left_out:
            count = format_count(len(listing.left_out), "image")
            raise UserError(f"--strict: {count} cannot be listed. Repair or remove them, or leave --strict out.")
        _refuse_local_tars(arguments, listing, out)
        _pack_listing(arguments, listing, out)
    finally:
        if is_finished:
            out.remove_parts()  # tars that were converted only to see that all is done, or that OUT is not ours


def _refuse_local_tars(arguments: argparse.Namespace, listing: Listing, out: Folder) -> None:
    """Raise UserError where Ray's nodes cannot see the tars that were converted on this machine."""
    is_converted = any(Path(path).parent == out.work_folder for path in listing.containers)
    if arguments.engine == "ray" and is_converted and files.is_url(str(out)):
        raise UserError(
            f"{arguments.source} is unpacked on this machine, where Ray's other nodes do not see it. Give a folder "
            "that they share as OUT, or leave --engine ray out."
        )


def _pack_listing(arguments: argparse.Namespace, listing: Listing, out: Folder) -> None:
    if arguments.split_val is None:
        _pack_set(arguments, listing, out, arguments.name or Options.name)
        return
    sets = subset.split_train_val(listing, arguments.split_val, arguments.seed)
    for name, images in zip(_SPLIT_NAMES, sets, strict=True):
        with (folder := open_folder(f"{out}/{name}")).lock(IF_LOCKED):
            _pack_set(arguments, images, folder, name)
    out.remove_parts()


def _pack_set(arguments: argparse.Namespace, listing: Listing, out: Folder, name: str) -> None:
    started = time.monotonic()
    options = Options(
        seed=arguments.seed,
        shard_size=arguments.shard_size,
        name=name,
        rules=_make_rules(arguments),
        changes=Changes(
            max_short_side=arguments.max_short_side,
            quality=arguments.quality or Changes.quality,
            upright=arguments.upright,
            gray16=arguments.gray16,
            convert=arguments.convert,
        ),
    )
    with show_progress("packing") as report:
        engine = _get_engine(arguments.engine)
        result = pack(listing, out, options, arguments.workers, report, engine, arguments.strict)
    for line in messages.describe_pack(result, str(out), time.monotonic() - started):
        print_line(line)


def _list_images(arguments: argparse.Namespace, work_folder: Path) -> Listing:
    """Return the images to pack, with their labels."""
    with show_progress("listing") as report:
        fields = Fields(arguments.image_extension, arguments.image_column, arguments.label_column)
        listing = scan(arguments.source, arguments.format, work_folder, lambda found: report(found, 0), fields)
    if arguments.labels:
        listing = label_from_file(listing, arguments.labels)
    if arguments.subset_classes is not None:
        names = subset.read_class_names(arguments.subset_classes, listing.classes)
        listing = subset.select_classes(listing, names)
    if arguments.classes:
        listing = number_as_in(listing, _load_classes(arguments.classes), arguments.classes)
    if arguments.limit:
        listing = subset.draw_images(listing, arguments.limit, arguments.seed)
    return listing


def _load_classes(path: str) -> tuple[str, ...]:
    """Return the classes of a manifest, given its path or its folder. Raises UserError where there is none."""
    file = f"{path.rstrip('/')}/{MANIFEST_FILE}" if os.path.isdir(path) or not path.endswith(".json") else path
    fix = f"Give the {MANIFEST_FILE} of the packed train set, or its folder."
    if not files.is_url(file) and not os.path.isfile(file):
        raise UserError(f"--classes {path}: no {MANIFEST_FILE} there. {fix}")
    try:
        return Manifest.from_json(files.read_whole(file).decode()).classes
    except ValueError as error:
        raise UserError(f"--classes {path} cannot be used ({error}). {fix}") from error


def _get_engine(name: str) -> Engine:
    if name == "local":
        return workers.run_tasks
    from shards.packing import ray_engine

    return ray_engine.run_tasks


def _open_existing(path: str) -> Folder:
    """Return the folder to look at. Raises UserError for a file."""
    if os.path.isfile(path):
        raise UserError(f"{path} is a file. Give the folder that it lies in.")
    return open_folder(path)


def _make_rules(arguments: argparse.Namespace) -> ImageRules:
    return ImageRules(arguments.check, arguments.max_pixels, arguments.image_seconds)
