"""What SRC is, told by looking: a folder of pictures or of archives, an archive, an object store; and what is in it."""

import glob
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from shards.errors import UserError
from shards.layout import UNLABELLED
from shards.sources import staged_tars, tars, zips
from shards.sources.archive_kinds import FITTING, GIVE, classes_beside, is_webdataset, kind_of
from shards.sources.class_levels import below_common_folder, common_depth, refuse_splits
from shards.sources.labels import by_folder, number
from shards.sources.listing import LARGEST, STORED, Collector, Listing
from shards.sources.tree import Entry, Tree, in_order
from shards.storage import files

# Looked at as well, to be left out by name and reason: shards hold JPEG, PNG and WebP.
_OTHERS = (".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl", ".jp2")
PICTURES = frozenset((".jpg", ".jpeg", ".jfif", ".png", ".webp", *_OTHERS))
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip", ".parquet")
FORMATS = ("auto", "folders", "flat", "webdataset", "parquet")

Tick = Callable[[int], None]


def scan(source: str | os.PathLike[str], format: str, stage: Path, tick: Tick = lambda found: None) -> Listing:
    """List a source.

    `format` "folders": each folder directly below the root (in an archive: below the folder that all share) is a class;
    "flat": all pictures at any depth, without labels; "webdataset": tars of samples with cls or json labels; "parquet":
    Hugging Face's tables; "auto" looks. Archives that cannot be read by offsets become plain tars in `stage`. `tick`
    hears how many pictures were found.

    Raises UserError for whatever is missing, unreadable, damaged or ambiguous.
    """
    source = os.fspath(source)
    if _is_folder(source):
        return _folder(source, format, stage, tick)
    return _archives(source, _matching(source), format, stage, tick)


def require(source: str) -> None:
    """Raises UserError where there is no such local file, folder or pattern; a URL is believed until it is read."""
    if not _is_folder(source):
        _matching(source)


def scan_tars(folder: str, names: list[str], format: str, tick: Tick = lambda found: None) -> Listing:
    """List the plain tars `names` of a folder, where they are. Raises UserError as `scan` does."""
    paths = [f"{folder}/{name}" for name in names]
    for path in paths:
        if (kind := kind_of(path)) != "tar":
            raise UserError(f"{path}: {kind}, which cannot be read by offsets; pack it instead")
    return _archives(folder, paths, format, Path(), tick)


def is_picture(name: str) -> bool:
    """Whether a file is a picture by its name."""
    return os.path.splitext(name)[1].lower() in PICTURES


def is_archive(name: str) -> bool:
    """Whether a file is an archive of pictures by its name."""
    return name.lower().endswith(ARCHIVES)


def _is_folder(source: str) -> bool:
    if files.is_url(source):
        return not is_archive(source) and not glob.has_magic(source)
    return os.path.isdir(source)


def _matching(source: str) -> list[str]:
    """The archives that SRC names: one, or those that match a pattern."""
    if files.is_url(source):
        found = files.matching(source) if glob.has_magic(source) else [source]
    elif os.path.exists(source):
        if not os.path.isfile(source):
            raise UserError(f"{source} is neither a folder nor a file; {GIVE}")
        found = [source]
    else:
        found = sorted(filter(os.path.isfile, glob.glob(source)), key=os.fsencode)
    if not found:
        raise UserError(f"{source}: no such folder or file; {GIVE}")
    return found


def _folder(root: str, format: str, stage: Path, tick: Tick) -> Listing:
    """A folder's pictures, or the archives in it."""
    tree = Tree(root, lambda name: is_picture(name) or is_archive(name))
    collector = Collector(in_containers=False)
    archives: list[str] = []
    for name, size in in_order(_counted(tree.files(), tick)):
        if is_archive(os.fsdecode(name)):
            archives.append(os.fsdecode(name))
        else:
            collector.add(name, size)
    _refuse_both(root, format, len(collector), archives)
    if format in ("webdataset", "parquet") or not len(collector):
        if not archives and len(collector):
            raise UserError(f"{root}: no archives in it; leave --format {format} out to pack its pictures")
        if not archives:
            raise UserError(f"{root}: no pictures (JPEG, PNG or WebP files) and no archives of them in it; {GIVE}")
        return _archives(root, [f"{root}/{name}" for name in archives], format, stage, tick)
    listing = collector.finish(root, "flat", root, (), tree.ignored + len(archives))
    return by_folder(listing, format, 0, tree.folders)


def _counted(entries: Iterator[Entry], tick: Tick) -> Iterator[Entry]:
    for count, entry in enumerate(entries, 1):
        tick(count)
        yield entry


def _refuse_both(root: str, format: str, pictures: int, archives: list[str]) -> None:
    if format == "auto" and pictures and archives:
        raise UserError(
            f"{root} holds {pictures} pictures and {len(archives)} archives ({archives[0]}, …); say which with "
            "--format: folders or flat for the pictures, webdataset or parquet for the archives"
        )


def _archives(root: str, paths: list[str], format: str, stage: Path, tick: Tick) -> Listing:
    """What is in archives, all of one kind."""
    kinds = {path: kind_of(path) for path in paths}
    for path, kind in kinds.items():
        if kind != kinds[paths[0]]:
            raise UserError(
                f"{root}: {paths[0]} is {kinds[paths[0]]}, {path} is {kind}; give one kind at a time as SRC"
            )
    kind = kinds[paths[0]]
    if format not in FITTING[kind]:
        raise UserError(f"{paths[0]} is {kind}, which --format {format} does not fit; leave --format out")
    if format == "auto":
        refuse_splits(root, paths)
    if kind == "parquet":
        listing = _parquet(root, paths, stage, tick)
        return by_folder(listing, "flat", 0, ()) if format == "flat" else listing
    if kind == "zip":
        return _in_folders(root, paths, paths, _zip_members, format, tick)
    if kind == "compressed tar":
        plain = [staged_tars.decompressed(path, stage) for path in paths]
    else:
        plain = paths
    if format == "webdataset" or (format == "auto" and is_webdataset(plain[0], paths[0])):
        return _samples(root, "webdataset", paths, plain, classes_beside(root, paths), tick)
    return _in_folders(root, paths, plain, _tar_members, format, tick)


class _Found(NamedTuple):
    """A picture in an archive: what `Collector.add` takes of it."""

    name: str
    size: int
    offset: int
    packed: int = STORED
    crc32: int = 0


def _tar_members(path: str, name: str) -> Iterator[_Found]:
    with files.open_input(path) as file:
        for member in tars.nested(file, name):
            yield _Found(member.name, member.size, member.offset)


def _zip_members(path: str, name: str) -> Iterator[_Found]:
    with files.open_input(path) as file:
        for member in zips.members(file, name):
            yield _Found(member.name, member.size, member.offset, min(member.packed, LARGEST), member.crc)


def _in_folders(
    root: str,
    paths: list[str],
    plain: list[str],
    members_of: Callable[[str, str], Iterator[_Found]],
    format: str,
    tick: Tick,
) -> Listing:
    """Archives whose members lie in class folders, or in none. Where there are several, names begin with theirs."""
    collector, ignored = Collector(in_containers=True), 0
    for container, (path, prefix) in enumerate(zip(paths, _prefixes(paths), strict=True)):
        for found in members_of(plain[container], path):
            if _is_hidden(found.name) or not is_picture(found.name):
                ignored += 1
                continue
            name = os.fsencode(prefix + found.name)
            collector.add(name, found.size, None, container, found.offset, found.packed, found.crc32)
            tick(len(collector))
    if not len(collector):
        raise UserError(f"{root}: no pictures (JPEG, PNG or WebP files) in it; {GIVE}")
    listing = collector.finish(root, "flat", "", tuple(plain), ignored)
    if len(paths) == 1:
        return by_folder(listing, format, common_depth(listing, 0, 1 if format == "folders" else 0), ())
    if _archives_are_classes(listing, format):
        return by_folder(listing, "folders", 0, ())
    return by_folder(listing, format, common_depth(listing, 1), ())


def _archives_are_classes(listing: Listing, format: str) -> bool:
    """Whether each archive is a class: asked for, or ILSVRC's, whose pictures are called n01440764_10026.JPEG."""
    parts = (name.split(b"/") for name in listing.names())
    if format == "folders":
        return all(len(part) == 2 for part in parts)
    return format == "auto" and all(len(part) == 2 and part[1].startswith(part[0] + b"_") for part in parts)


def _prefixes(paths: list[str]) -> list[str]:
    """What the names in several archives begin with: the archive's own without its ending; its path where two agree."""
    if len(paths) == 1:
        return [""]
    stems = [_stem(PurePosixPath(path).name) for path in paths]
    if len(set(stems)) < len(stems):
        stems = [_stem(path).replace("/", "_") for path in below_common_folder(paths)]
    return [f"{stem}/" for stem in stems]


def _stem(name: str) -> str:
    return next((name[: -len(end)] for end in ARCHIVES if name.lower().endswith(end)), name)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _samples(
    root: str, format: str, paths: list[str], plain: list[str], names: tuple[str, ...] | None, tick: Tick
) -> Listing:
    """WebDataset tars. `names`: of the classes that labels are numbers of, where known."""
    collector, ignored = Collector(in_containers=True), 0
    for container, (path, prefix) in enumerate(zip(paths, _prefixes(paths), strict=True)):
        with files.open_input(plain[container]) as file:
            for sample in tars.samples(tars.members(file, path)):
                if sample.picture is None:
                    ignored += 1
                    continue
                name = os.fsencode(prefix + sample.picture.name)
                label = _label(file, path, sample)
                collector.add(name, sample.picture.size, label, container, sample.picture.offset)
                tick(len(collector))
    if not len(collector):
        raise UserError(f"{root}: no samples with a jpg, jpeg, png or webp in it; {GIVE}")
    listing = collector.finish(root, format, "", tuple(plain), ignored)
    return number(listing, listing.labels, collector.texts(), named=False, names=names)


def _label(file: BinaryIO, name: str, sample: tars.Sample) -> str | None:
    try:
        text = tars.label_of(file, sample)
        return None if text == str(UNLABELLED) else text
    except ValueError as error:
        raise UserError(
            f"{name}: sample {sample.key}: label unreadable ({error}); mend it, or use --format flat"
        ) from error


def _parquet(root: str, paths: list[str], stage: Path, tick: Tick) -> Listing:
    labels = {path: staged_tars.label_column(path) for path in paths}
    for path in paths:
        if labels[path] != labels[paths[0]]:
            raise UserError(f"{path} has another label column, or other classes, than {paths[0]}; give one set as SRC")
    label = labels[paths[0]]
    plain = [staged_tars.from_parquet(path, stage, tick) for path in paths]
    return _samples(root, "parquet", paths, plain, label.names if label else None, tick)
