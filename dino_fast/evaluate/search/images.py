"""Images by number, wherever they lie: the files of a folder, or the samples of shards."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image

from pipelines.decode_torch import decode
from pipelines.decoder import DecodeError
from shards.errors import UserError
from shards.images.decode import read_info
from shards.images.image_info import UndecodableError
from shards.index import BadSample, ShardIndex
from shards.layout import MANIFEST_FILE
from shards.sources.file_types import is_image
from shards.sources.folder_walk import FolderWalk
from shards.text import escape_unprintable


class UnreadableImage(Exception):
    """An image cannot be read or decoded. The message names it, and says why."""


class Images(Protocol):
    """Images that are numbered from 0."""

    @property
    def where(self) -> str:
        """Return the folder or URL that they are in."""

    @property
    def names(self) -> Sequence[str]:
        """Return the name of each."""

    def read(self, number: int) -> Image.Image:
        """Return an image as 8-bit RGB, without EXIF rotation. Raises UnreadableImage. Is called by several threads."""

    def read_file(self, number: int) -> tuple[bytes, str]:
        """Return an image's file as it is, and its extension. Raises UnreadableImage."""

    def compute_fingerprint(self) -> str:
        """Return what tells these images from others."""


class ImageFiles:
    """Image files below a folder."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.where = folder, str(folder)
        self.names = names
        """paths relative to the folder"""

    def read(self, number: int) -> Image.Image:
        """Return an image as 8-bit RGB, without EXIF rotation. Raises UnreadableImage."""
        return read_image_file(self.folder / self.names[number])

    def read_file(self, number: int) -> tuple[bytes, str]:
        """Return an image's file as it is, and its extension. Raises UnreadableImage."""
        path = self.folder / self.names[number]
        return _read_bytes(path), path.suffix.lower()

    def compute_fingerprint(self) -> str:
        """Return a hash of the files' names, sizes and times."""
        return fingerprint_files([self.folder / name for name in self.names])


class ShardImages:
    """The samples of shards."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self.where = str(index.folder)
        self.names = _SampleNames(index)

    def read(self, number: int) -> Image.Image:
        """Return an image as 8-bit RGB. Raises UnreadableImage, and UserError where the storage does not answer."""
        try:
            return decode_image(self.read_file(number)[0])
        except DecodeError as error:
            raise UnreadableImage(str(self.index.make_bad_sample(number, str(error)))) from error

    def read_file(self, number: int) -> tuple[bytes, str]:
        """Return an image's bytes, and the extension of its format. Raises what `read` does."""
        try:
            (data,) = self.index.read([number])
            return data, f".{read_info(data).extension}"
        except (BadSample, UndecodableError) as error:
            raise UnreadableImage(str(error)) from error

    def compute_fingerprint(self) -> str:
        """Return the fingerprint of the shards."""
        return self.index.fingerprint


class _SampleNames(Sequence[str]):
    """The keys of the samples with their shards. Each is read from its shard when it is asked for."""

    def __init__(self, index: ShardIndex) -> None:
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int) -> str:  # type: ignore[override]  # slices are not needed
        shard, key = self._index.describe(number).split(", ")[:2]
        return f"{shard}/{key.removeprefix('key ')}"


def open_images(folder: str, flag: str) -> Images:
    """Open a folder of image files, or a folder or URL of shards. Raises UserError, which names the flag."""
    path = Path(folder)
    if not path.is_dir() or (path / MANIFEST_FILE).is_file():
        if path.exists() or "://" in folder:
            return ShardImages(_open_shards(folder, flag))
        raise UserError(f"{flag} {folder}: there is no such folder. Pass a folder of images or of shards.")
    names = list_image_files(path)
    if not names:
        raise UserError(f"{flag} {folder}: there are no images in it. Pass a folder of images or of shards.")
    return ImageFiles(path, names)


def open_if_named(folder: str | None, flag: str) -> Images | None:
    """Open the images of a flag that may be left out."""
    return None if folder is None else open_images(folder, flag)


def _open_shards(folder: str, flag: str) -> ShardIndex:
    try:
        return ShardIndex(folder)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error


def list_image_files(folder: Path) -> tuple[str, ...]:
    """Return the image files below a folder by their extensions, sorted: paths relative to it, with slashes.

    Links are followed, and hidden files are left out. Raises UserError for what cannot be listed.
    """
    walk = FolderWalk(str(folder), is_image)
    return tuple(sorted(os.fsdecode(name) for name, _ in walk.files()))


def fingerprint_files(paths: Sequence[Path]) -> str:
    """Return a hash of the files' names, sizes and times of change. A missing file counts as empty."""
    digest = hashlib.sha256()
    for path in paths:
        about = path.stat() if path.exists() else None
        digest.update(f"{path.name}\0{about and (about.st_size, about.st_mtime_ns)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def read_image_file(path: Path) -> Image.Image:
    """Return an image file as 8-bit RGB, without EXIF rotation. Raises UnreadableImage."""
    try:
        return decode_image(_read_bytes(path))
    except DecodeError as error:
        raise UnreadableImage(escape_unprintable(f"{path}: {error}")) from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnreadableImage(escape_unprintable(f"{path}: {error.strerror}")) from error


def decode_image(data: bytes) -> Image.Image:
    """Decode an image to 8-bit RGB, without EXIF rotation. Raises DecodeError."""
    return Image.fromarray(decode(data).permute(1, 2, 0).numpy())
