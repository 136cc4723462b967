"""Find out what an archive is: its type by its first bytes, whether it holds samples, whether make-shards made it."""

import os
from collections.abc import Sequence
from typing import BinaryIO

from shards.errors import UserError
from shards.layout import MANIFEST_FILE
from shards.manifest import Manifest
from shards.sources import tars, webdataset
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
        members = (member for _, member in zip(range(_MEMBERS_TO_LOOK_AT), tars.list_members(file, name), strict=False))
        return any(sample.image and _has_label(file, sample) for sample in webdataset.group_samples(members))


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
