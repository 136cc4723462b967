"""List the images in archives: in class folders, in none, or as samples with labels."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from shards.errors import UserError
from shards.layout import UNLABELED
from shards.sources import tar_conversion, tars, webdataset, zips
from shards.sources.archive_type import (
    FORMATS_OF_TYPE,
    GIVE_SRC,
    detect_archive_type,
    is_webdataset,
    list_other_extensions,
    load_class_names,
    refuse_other_images,
)
from shards.sources.class_folders import count_common_folders, refuse_mixed_splits, strip_common_folder
from shards.sources.fields import Fields
from shards.sources.file_types import ARCHIVES, is_image
from shards.sources.labels import label_by_folder, number_classes
from shards.sources.listing import MAX_LISTED_SIZE, NOT_COMPRESSED, Listing, ListingBuilder
from shards.storage import files
from shards.text import list_first

_OTHER_EXTENSION = "no image of a sample by its extension; --image-extension takes it"

Tick = Callable[[int], None]  # called with the number of images found


def list_archives(root: str, paths: list[str], format: str, work_folder: Path, tick: Tick, fields: Fields) -> Listing:
    """List the images in archives, which must be of one type. The other arguments are as in `scan`."""
    kind = _require_one_type(root, paths)
    if format not in FORMATS_OF_TYPE[kind]:
        raise UserError(f"{paths[0]} is a {kind} file, which --format {format} does not fit. Leave --format out.")
    fields.refuse_unused(root, kind, format)
    if format == "auto":
        refuse_mixed_splits(root, paths)
    if kind == "parquet":
        fields = dataclasses.replace(fields, labeled=format != "flat")
        listing = _list_parquet(root, paths, work_folder, tick, fields)
        return label_by_folder(listing, "flat", 0, ()) if format == "flat" else listing
    if kind == "zip":
        return _list_in_folders(root, paths, paths, _list_zip, format, tick)
    plain = paths if kind == "tar" else [tar_conversion.decompress_tar(path, work_folder) for path in paths]
    if format in ("auto", "webdataset"):
        has_samples = bool(fields.image_extensions) or is_webdataset(plain[0], paths[0])
        if not has_samples:
            refuse_other_images(plain[0], paths[0])
        if has_samples or format == "webdataset":
            return _list_webdataset(root, paths, plain, tick, fields.image_extensions)
    return _list_in_folders(root, paths, plain, _list_tar, format, tick)


def _require_one_type(root: str, paths: list[str]) -> str:
    kinds = {path: detect_archive_type(path) for path in paths}
    first = kinds[paths[0]]
    for path, kind in kinds.items():
        if kind != first:
            raise UserError(
                f"{root}: {paths[0]} is a {first} file, {path} is a {kind} file. Give one type at a time as SRC."
            )
    return first


class _Found(NamedTuple):
    """An image in an archive. The fields are those of `ListingBuilder.add`."""

    name: str
    """path in the archive"""
    size: int
    """bytes"""
    offset: int
    """bytes, in the archive"""
    packed: int = NOT_COMPRESSED
    """compressed bytes in a zip archive"""
    crc32: int = 0
    """CRC-32 in a zip archive's directory"""


def _list_tar(path: str, name: str) -> Iterator[_Found]:
    with files.open_input(path) as file:
        for member in tars.list_nested_members(file, name):
            yield _Found(member.name, member.size, member.offset)


def _list_zip(path: str, name: str) -> Iterator[_Found]:
    with files.open_input(path) as file:
        for member in zips.list_members(file, name):
            yield _Found(member.name, member.size, member.offset, min(member.packed, MAX_LISTED_SIZE), member.crc)


def _list_in_folders(
    root: str,
    paths: list[str],
    plain: list[str],
    list_members: Callable[[str, str], Iterator[_Found]],
    format: str,
    tick: Tick,
) -> Listing:
    """List archives whose members lie in class folders, or in none.

    `plain` are the files to read instead of `paths`. In several archives, names begin with those of the archives.
    """
    builder, ignored = ListingBuilder(in_containers=True), 0
    for container, (path, prefix) in enumerate(zip(paths, _make_prefixes(paths), strict=True)):
        for found in list_members(plain[container], path):
            if _is_hidden(found.name) or not is_image(found.name):
                ignored += 1
                continue
            name = os.fsencode(prefix + found.name)
            builder.add(name, found.size, None, container, found.offset, found.packed, found.crc32)
            tick(len(builder))
    if not len(builder):
        raise UserError(f"{root}: no images (JPEG, PNG or WebP files) in it. {GIVE_SRC}")
    listing = builder.finish(root, "flat", "", tuple(plain), ignored)
    if len(paths) == 1:
        depth = count_common_folders(listing, 0, 1 if format == "folders" else 0)
        return label_by_folder(listing, format, depth, ())
    if _archives_are_classes(listing, format):
        return label_by_folder(listing, "folders", 0, ())
    return label_by_folder(listing, format, count_common_folders(listing, 1), ())


def _archives_are_classes(listing: Listing, format: str) -> bool:
    """Return whether each archive is a class.

    So it is if asked for, and in ILSVRC, whose images have names such as n01440764_10026.JPEG.
    """
    parts = (name.split(b"/") for name in listing.read_names())
    if format == "folders":
        return all(len(part) == 2 for part in parts)
    return format == "auto" and all(len(part) == 2 and part[1].startswith(part[0] + b"_") for part in parts)


def _make_prefixes(paths: list[str]) -> list[str]:
    """Return what the names of images in several archives begin with.

    It is the archive's name without its extension, or its path where two archives have the same name.
    """
    if len(paths) == 1:
        return [""]
    stems = [_strip_extension(PurePosixPath(path).name) for path in paths]
    if len(set(stems)) < len(stems):
        stems = [_strip_extension(path).replace("/", "_") for path in strip_common_folder(paths)]
    return [f"{stem}/" for stem in stems]


def _strip_extension(name: str) -> str:
    return next((name[: -len(end)] for end in ARCHIVES if name.lower().endswith(end)), name)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _list_webdataset(
    root: str, paths: list[str], plain: list[str], tick: Tick, image_extensions: Sequence[str]
) -> Listing:
    names = load_class_names(root, paths)
    listing = _list_samples(root, "webdataset", paths, plain, names, tick, image_extensions)
    if not listing.classes and (others := list_other_extensions(plain[0], paths[0])):
        hint = f"labels are cls or json; beside the images lie {list_first(others)}"
        return dataclasses.replace(listing, hint=hint)
    return listing


def _list_samples(
    root: str,
    format: str,
    paths: list[str],
    plain: list[str],
    names: tuple[str, ...] | None,
    tick: Tick,
    image_extensions: Sequence[str] = (),
) -> Listing:
    """List WebDataset tars. `names` are those of the classes whose numbers are the labels, where they are known."""
    builder, ignored = ListingBuilder(in_containers=True), 0
    left_out: list[tuple[str, str]] = []
    for container, (path, prefix) in enumerate(zip(paths, _make_prefixes(paths), strict=True)):
        with files.open_input(plain[container]) as file:
            for sample in webdataset.group_samples(tars.list_members(file, path), image_extensions):
                if sample.image is None:
                    ignored += 1
                    if sample.other is not None:
                        left_out.append((prefix + sample.other.name, _OTHER_EXTENSION))
                    continue
                name = os.fsencode(prefix + sample.image.name)
                label = _read_label(file, path, sample)
                builder.add(name, sample.image.size, label, container, sample.image.offset)
                tick(len(builder))
    if not len(builder):
        wanted = ", ".join(image_extensions) or "jpg, jpeg, png or webp"
        other = f" There is {left_out[0][0]}: pass --image-extension with what follows its key." if left_out else ""
        raise UserError(f"{root}: no samples with a {wanted} in it.{other or f' {GIVE_SRC}'}")
    listing = builder.finish(root, format, "", tuple(plain), ignored - len(left_out))
    listing = dataclasses.replace(listing, left_out=tuple(left_out))
    return number_classes(listing, listing.labels, builder.list_label_texts(), named=False, names=names)


def _read_label(file: BinaryIO, name: str, sample: webdataset.Sample) -> str | None:
    try:
        text = webdataset.read_label(file, sample)
        return None if text == str(UNLABELED) else text
    except ValueError as error:
        raise UserError(
            f"{name}: the label of sample {sample.key} cannot be read ({error}). Correct it, or use --format flat."
        ) from error


def _list_parquet(root: str, paths: list[str], work_folder: Path, tick: Tick, fields: Fields) -> Listing:
    labels = {path: tar_conversion.find_label_column(path, fields) for path in paths}
    label = labels[paths[0]]
    for path in paths:
        if labels[path] != label:
            raise UserError(f"{path} has another label column, or other classes, than {paths[0]}. Give one set as SRC.")
    plain = [tar_conversion.convert_parquet(path, work_folder, tick, fields) for path in paths]
    listing = _list_samples(root, "parquet", paths, plain, label.names if label else None, tick)
    if label is None and fields.labeled and (columns := tar_conversion.list_columns(paths[0])):
        return dataclasses.replace(listing, hint=f"--label-column NAME takes one of {', '.join(columns)} as labels")
    return listing
