"""Find out what SRC is, a folder of images or of archives, an archive, an object store, and list the images in it."""

import dataclasses
import glob
import os
from collections.abc import Iterator
from pathlib import Path

from shards.errors import UserError
from shards.sources.archive_type import GIVE_SRC, detect_archive_type
from shards.sources.archives import Tick, list_archives
from shards.sources.fields import AS_FOUND, Fields
from shards.sources.file_types import is_archive, is_image
from shards.sources.folder_walk import Entry, FolderWalk, sort_entries
from shards.sources.labels import label_by_folder
from shards.sources.listing import Listing, ListingBuilder
from shards.storage import files

FORMATS = ("auto", "folders", "flat", "webdataset", "parquet")


def scan(
    source: str | os.PathLike[str],
    format: str,
    work_folder: Path,
    tick: Tick = lambda found: None,
    fields: Fields = AS_FOUND,
) -> Listing:
    """List the images of a source.

    `format` says what the source is. "folders": each folder directly below the root (in an archive: below the folder
    that all images share) is a class. "flat": all images at any depth, without labels. "webdataset": tars of samples
    with cls or json labels. "parquet": tables of Hugging Face. "auto": look at the source. Archives that cannot be read
    by offsets are converted to plain tars in `work_folder`. `tick` is called with the number of images found. `fields`
    say where in a sample image and label are.

    Links that lead nowhere or in circles are left out, with their reasons. Raises UserError for whatever else is
    missing, unreadable, damaged or ambiguous.
    """
    source = os.fspath(source)
    if _is_folder(source):
        return _scan_folder(source, format, work_folder, tick, fields)
    return list_archives(source, _find_archives(source), format, work_folder, tick, fields)


def require_source(source: str) -> None:
    """Raise UserError where there is no such local file, folder or pattern. A URL is not checked here."""
    if not _is_folder(source):
        _find_archives(source)


def scan_tars(
    folder: str, names: list[str], format: str, tick: Tick = lambda found: None, fields: Fields = AS_FOUND
) -> Listing:
    """List the images in the plain tars `names` of a folder, where they are. Raises UserError as `scan` does."""
    paths = [f"{folder}/{name}" for name in names]
    for path in paths:
        if (kind := detect_archive_type(path)) != "tar":
            raise UserError(f"{path} is a {kind} file, which cannot be read by offsets. Pack it instead.")
    return list_archives(folder, paths, format, Path(), tick, fields)


def _is_folder(source: str) -> bool:
    if files.is_url(source):
        return not is_archive(source) and not glob.has_magic(source)
    return os.path.isdir(source)


def _find_archives(source: str) -> list[str]:
    """Return the archives that SRC names: one, or those that match a pattern."""
    if files.is_url(source):
        found = files.find_objects(source) if glob.has_magic(source) else [source]
    elif os.path.exists(source):
        if not os.path.isfile(source):
            raise UserError(f"{source} is neither a folder nor a file. {GIVE_SRC}")
        found = [source]
    else:
        found = sorted(filter(os.path.isfile, glob.glob(source)), key=os.fsencode)
    if not found:
        raise UserError(f"{source}: no such folder or file. {GIVE_SRC}")
    return found


def _scan_folder(root: str, format: str, work_folder: Path, tick: Tick, fields: Fields) -> Listing:
    """List the images of a folder, or those in its archives."""
    walk = FolderWalk(root, lambda name: is_image(name) or is_archive(name))
    builder = ListingBuilder(in_containers=False)
    archives: list[str] = []
    for name, size in sort_entries(_count(walk.files(), tick)):
        if is_archive(os.fsdecode(name)):
            archives.append(os.fsdecode(name))
        else:
            builder.add(name, size)
    left_out = tuple(sorted(walk.broken_links))
    _refuse_both(root, format, len(builder), archives)
    if format in ("webdataset", "parquet") or not len(builder):
        if not archives and len(builder):
            raise UserError(f"{root}: no archives in it. Leave --format {format} out to pack its images.")
        if not archives:
            links = f" that can be read: {left_out[0][0]} is a {left_out[0][1]}" if left_out else ""
            raise UserError(
                f"{root}: no images (JPEG, PNG or WebP files) and no archives of them in it{links}. {GIVE_SRC}"
            )
        listing = list_archives(root, [f"{root}/{name}" for name in archives], format, work_folder, tick, fields)
        left_out += listing.left_out
    else:
        fields.refuse_unused(root, "folder", format)
        listing = builder.finish(root, "flat", root, (), walk.ignored + len(archives))
        listing = label_by_folder(listing, format, 0, walk.folders)
    return dataclasses.replace(listing, left_out=left_out)


def _count(entries: Iterator[Entry], tick: Tick) -> Iterator[Entry]:
    for count, entry in enumerate(entries, 1):
        tick(count)
        yield entry


def _refuse_both(root: str, format: str, images: int, archives: list[str]) -> None:
    if format == "auto" and images and archives:
        raise UserError(
            f"{root} holds {images} images and {len(archives)} archives ({archives[0]}, …). Say which to pack: with "
            "--format folders or flat the images, with --format webdataset or parquet the archives."
        )
