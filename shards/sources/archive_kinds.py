"""What an archive is: its kind by its first bytes, samples or pictures by its members, ours by what lies beside it."""

import os
from collections.abc import Sequence
from typing import BinaryIO

from shards.errors import UserError
from shards.layout import MANIFEST_FILE, Manifest
from shards.sources import tars
from shards.storage import files
from shards.storage.output import out_folder

FITTING = {  # kind → formats that it may be read as
    "tar": ("auto", "folders", "flat", "webdataset"),
    "compressed tar": ("auto", "folders", "flat", "webdataset"),
    "zip": ("auto", "folders", "flat"),
    "parquet": ("auto", "flat", "parquet"),
}
GIVE = "give the folder, archive or URL that holds the pictures as SRC"
_LOOKED_AT = 1_000  # members of a tar, to tell what it is


def kind_of(path: str) -> str:
    """One of `FITTING`. Raises UserError for a file that is none of them."""
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
        raise UserError(f"{path} is empty; get it anew")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} only points to the archive that Git LFS keeps; get that with 'git lfs pull'")
    raise UserError(f"{path}: neither tar, zip nor parquet, or damaged; {GIVE}")


def is_webdataset(path: str, name: str) -> bool:
    """Whether samples with labels are among the first members; other JSON beside pictures tells nothing."""
    with files.open_input(path) as file:
        members = (member for _, member in zip(range(_LOOKED_AT), tars.members(file, name), strict=False))
        return any(sample.picture and _is_labelled(file, sample) for sample in tars.samples(members))


def _is_labelled(file: BinaryIO, sample: tars.Sample) -> bool:
    try:
        return tars.label_of(file, sample) is not None
    except ValueError:  # packing says which sample it is
        return True


def classes_beside(root: str, paths: Sequence[str]) -> tuple[str, ...] | None:
    """The classes of packings of ours, whose tars hold numbers alone; None for tars of other makers.

    Raises UserError where `paths`, found in `root`, are of packings whose classes differ.
    """
    found = {_classes_in(folder) for folder in {os.path.dirname(path) for path in paths}}
    if len(found) > 1:
        raise UserError(f"{root} holds shards of several packings, whose classes differ; pack each by itself")
    return found.pop()


def _classes_in(folder: str) -> tuple[str, ...] | None:
    try:
        manifest = Manifest.from_json(out_folder(folder or ".").read(MANIFEST_FILE).decode())
    except (FileNotFoundError, ValueError, UserError):
        return None
    return None if manifest.foreign else manifest.classes
