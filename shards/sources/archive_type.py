"""Find out what an archive is: its type by its first bytes, whether it holds samples, whether make-shards made it."""

import itertools
import os
from collections.abc import Sequence
from typing import BinaryIO

from shards.errors import UserError
from shards.layout import MANIFEST_FILE
from shards.manifest import Manifest
from shards.sources import tars, webdataset
from shards.sources.file_types import is_image
from shards.storage import files
from shards.storage.folders import open_folder

FORMATS_OF_TYPE = {  # type of archive → values of --format that it may be read as
    "tar": ("auto", "folders", "flat", "webdataset"),
    "compressed tar": ("auto", "folders", "flat", "webdataset"),
    "zip": ("auto", "folders", "flat"),
    "parquet": ("auto", "flat", "parquet"),
}
GIVE_SRC = "Give the folder, archive or URL that holds the images as SRC."
_MEMBERS_TO_LOOK_AT = 1_000  # of a tar, to find out what it is


def detect_archive_type(path: str) -> str:
    """Return one of `FORMATS_OF_TYPE`. Raises UserError for a file that is none of them."""
    with files.open_input(path) as file:
        head = file.read(1024)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return "zip"
    if tars.is_compressed(head):
        return "compressed tar"
    if tars.is_tar(head):
        return "tar"
    if not head:
        raise UserError(f"{path} is empty. Download it again.")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is only a pointer to an archive in Git LFS. Fetch the archive with 'git lfs pull'.")
    raise UserError(f"{path} is not a tar, zip or parquet file, or it is damaged. {GIVE_SRC}")


def is_webdataset(path: str, name: str) -> bool:
    """Return whether samples with labels are among the first members. Other JSON files beside images do not count."""
    with files.open_input(path) as file:
        samples = webdataset.group_samples(_read_first_members(file, name))
        return any(sample.image and _has_label(file, sample) for sample in samples)


def refuse_other_images(path: str, name: str) -> None:
    """Raise UserError where images that samples do not have by their extensions lie beside labels at the beginning."""
    with files.open_input(path) as file:
        found = webdataset.find_other_images(_read_first_members(file, name))
        labeled = {
            extension: (image, label)
            for extension, (image, label) in found.items()
            if _has_label(file, webdataset.Sample("", image, label))
        }
    if labeled:
        image, label = next(iter(labeled.values()))
        others = f" (or {', '.join(list(labeled)[1:])})" if len(labeled) > 1 else ""
        raise UserError(
            f"{name}: images with other extensions than jpg, jpeg, png and webp lie beside labels, such as "
            f"{image.name} and {label.name}. Pass --image-extension {next(iter(labeled))}{others} to pack them as "
            "samples, or --format flat to pack all images without labels."
        )


def list_other_extensions(path: str, name: str) -> list[str]:
    """Return the extensions, sorted, of the first members that are no images by their names."""
    with files.open_input(path) as file:
        bases = [member.name.rpartition("/")[2] for member in _read_first_members(file, name)]
    return sorted({base.partition(".")[2].lower() for base in bases if not is_image(base)} - {""})


def _read_first_members(file: BinaryIO, name: str) -> list[tars.Member]:
    return list(itertools.islice(tars.list_members(file, name), _MEMBERS_TO_LOOK_AT))


def load_class_names(root: str, paths: Sequence[str]) -> tuple[str, ...] | None:
    """Return the class names from the manifests beside tars of make-shards, which themselves hold numbers alone.

    Returns None for tars of other programs. Raises UserError where `paths`, found in `root`, are of packings whose
    classes differ.
    """
    found = {_load_class_names(folder) for folder in {os.path.dirname(path) for path in paths}}
    if len(found) > 1:
        raise UserError(f"{root} holds shards of several packings, whose classes differ. Pack each by itself.")
    return found.pop()


def _has_label(file: BinaryIO, sample: webdataset.Sample) -> bool:
    try:
        return webdataset.read_label(file, sample) is not None
    except ValueError:  # packing says which sample it is
        return True


def _load_class_names(folder: str) -> tuple[str, ...] | None:
    try:
        manifest = Manifest.from_json(open_folder(folder or ".").read(MANIFEST_FILE).decode())
    except (FileNotFoundError, ValueError, UserError):
        return None
    return None if manifest.foreign else manifest.classes
