"""The tensors of a .safetensors file. Its format is simple enough to be read without the package of that name.

A file is the length of a header in 8 bytes, little-endian, then the header, then the bytes of all tensors. The header
is JSON: `{name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}}`, with offsets from the header's end,
and an entry `__metadata__` that has no tensor.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shards.errors import UserError
from shards.text import shorten

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_LONGEST_HEADER = 100_000_000  # bytes, as in the package


def is_safetensors(path: Path) -> bool:
    """Return whether the file begins as a .safetensors file does, whatever its name is. Raises OSError."""
    with open(path, "rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= _LONGEST_HEADER


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name, on the CPU. Raises UserError for a damaged one, OSError without one."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
        values = memoryview(content)[8 + length :]
        return {name: _read_tensor(entry, values) for name, entry in header.items() if name != "__metadata__"}
    except _UnknownType as error:
        raise UserError(f"{path}: {error}. Save its weights as float32.") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: its header does not describe its bytes. Copy it again.") from error


class _UnknownType(Exception):
    """A tensor has a type that is not read here."""


def _read_tensor(entry: dict[str, Any], values: memoryview) -> Tensor:
    """Return a copy of the tensor that an entry of the header describes. Raises ValueError where it cannot be."""
    if entry["dtype"] not in _DTYPES:
        raise _UnknownType(f"tensors of type {shorten(str(entry['dtype']), 20)} are not read")
    dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    numbers = [*shape, begin, end]
    if not all(type(number) is int and number >= 0 for number in numbers) or not begin <= end <= len(values):
        raise ValueError(f"offsets {begin} to {end} of {len(values)}")
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"{shape} in {end - begin} bytes")
    # A bytearray is aligned memory of its own, which torch may write to.
    own = bytearray(values[begin:end])
    return (torch.frombuffer(own, dtype=dtype) if own else torch.empty(0, dtype=dtype)).view(shape)
