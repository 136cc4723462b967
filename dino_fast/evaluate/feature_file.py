"""Features of many images in one file that grows: a pass that was killed goes on, and later protocols read it."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from shards.errors import UserError

CHUNK = 256  # images that are recorded as done together

_FEATURES, _DONE, _ABOUT = "features.npy", "done.npy", "about.json"


class FeatureFile:
    """Features [N, D] in a folder of their own, written by any number of processes, a chunk of rows at a time.

    `features.npy` and `done.npy` are created whole, with zeros in them, by whoever comes first. A chunk is recorded as
    done after its rows are on the disk. So nothing that is recorded is lost, whenever a process is killed. `about` says
    in `about.json`, for people, what the features are of. Raises UserError where the folder cannot be written, or
    holds features of another shape.
    """

    def __init__(self, folder: Path, shape: tuple[int, int], dtype: type[np.generic], about: Mapping[str, Any]) -> None:
        self.folder = folder
        chunks = -(-shape[0] // CHUNK)
        arrays = ((_FEATURES, shape, np.dtype(dtype)), (_DONE, (chunks,), np.dtype(np.uint8)))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _create(folder / _ABOUT, lambda file: file.write((json.dumps(about, indent=1) + "\n").encode()))
            for name, size, kind in arrays:
                self._create_zeros(name, size, kind)
        except OSError as error:
            raise UserError(
                f"--cache: {folder} cannot be written ({error.strerror}). Pass --cache with a folder that can."
            ) from error
        self._features, self._done = (self._open(*array) for array in arrays)

    def find_missing_chunks(self) -> list[int]:
        """Return the numbers of the chunks that are not done, sorted. Chunk i has the rows from i · CHUNK on."""
        return np.flatnonzero(self._done == 0).tolist()

    def write(self, row: int, features: Tensor) -> None:
        """Write features [n, D] of any floating type at the rows from `row` on, and record a chunk that they complete.

        A chunk's rows are written in order, so a chunk is complete with its last row.
        """
        end = row + len(features)
        _write(self._features, row, features.cpu().numpy().astype(self._features.dtype))
        if end % CHUNK == 0 or end == len(self._features):
            _write(self._done, (end - 1) // CHUNK, np.ones(1, np.uint8))

    def read(self) -> Tensor:
        """Return all features [N, D], memory-mapped. What is written into the tensor does not reach the file."""
        return torch.from_numpy(np.lib.format.open_memmap(self.folder / _FEATURES, mode="c"))

    def _create_zeros(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Create an array of zeros that takes no room on the disk until it is written."""

        def fill(file: BinaryIO) -> None:
            about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, about)
            file.truncate(file.tell() + int(np.prod(shape)) * dtype.itemsize)

        _create(self.folder / name, fill)

    def _open(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.memmap[Any, Any]:
        path = self.folder / name
        try:
            array = np.lib.format.open_memmap(path, mode="r")
            if (array.shape, array.dtype) != (shape, dtype):
                raise ValueError(f"it has the shape {array.shape} of {array.dtype}, not {shape} of {dtype}")
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}). Delete the folder {self.folder}, and run again.") from error
        return array


def _write(array: np.memmap[Any, Any], row: int, values: np.ndarray) -> None:
    """Write values into an array's file at the rows from `row` on, and wait until they are on the disk."""
    path = str(array.filename)
    try:
        with open(path, "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), values.tobytes(), array.offset + row * array.strides[0])
            os.fdatasync(file.fileno())
    except OSError as error:
        raise UserError(
            f"--cache: {path} cannot be written ({error.strerror}). Free some space, or pass another folder."
        ) from error


def _create(path: Path, fill: Callable[[BinaryIO], Any]) -> None:
    """Create a file whole, unless it is there: of several processes at once, one creates it."""
    if path.exists():
        return
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "wb") as file:
            fill(file)
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
    finally:
        os.unlink(name)
