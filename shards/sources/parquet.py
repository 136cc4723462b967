"""Convert tables of images in parquet files, as Hugging Face writes them, into tars of samples."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from shards.errors import UserError
from shards.layout import TAR_END, make_padding, make_tar_header

_ROWS = 32  # in memory at a time
_BUFFER = 1 << 20  # bytes, of each column
# Names of columns in tables of other people.
_BINARY_NAMES = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "image_bytes", "bytes")


class LabelColumn(NamedTuple):
    """Where a table's labels are, and what they stand for."""

    column: str
    """name of the column"""
    type: str
    """arrow's name of its type"""
    names: tuple[str, ...] | None
    """names of the classes that its numbers stand for, where Hugging Face's metadata have them"""


def convert_to_tar(source: BinaryIO, name: str, target: BinaryIO, tick: Callable[[int], None]) -> None:
    """Write a table as a WebDataset tar: ``ROW.jpg``, whatever the bytes are, and ``ROW.cls`` where there is a label.

    A row without an image becomes an empty image. A label that is null or negative is none. `tick` is called with the
    number of rows done. Memory is some rows and three times the table's largest page (100 rows from Hugging Face).
    Raises UserError where the table, called `name` in the message, is damaged, or no single column holds the images.
    """
    with _convert_errors(name):
        table = _open_table(source, name)
        image, label = _find_columns(table.schema_arrow, name)
    row = 0
    for images, labels in _read_batches(table, image, label, name):
        for data, text in zip(images, labels, strict=True):
            target.write(_make_member(f"{row:09d}.jpg", data))
            if text is not None:
                target.write(_make_member(f"{row:09d}.cls", text))
            row += 1
        tick(row)
    target.write(TAR_END)


def find_label_column(source: BinaryIO, name: str) -> LabelColumn | None:
    """Return the label column of a table, or None where there is none. Raises as `convert_to_tar`."""
    with _convert_errors(name):
        schema = _open_table(source, name).schema_arrow
        _, label = _find_columns(schema, name)
    if label is None:
        return None
    names = _read_features(schema).get(label, {}).get("names")
    return LabelColumn(
        label, str(schema.field(label).type), tuple(map(str, names)) if isinstance(names, list) else None
    )


def _open_table(source: BinaryIO, name: str) -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{name}: reading parquet needs pyarrow. Install it with 'pip install pyarrow'.") from None
    # Without the buffer a row group's whole column is read at once. With it, pages are: some writers make one of that.
    return parquet.ParquetFile(source, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True)


@contextlib.contextmanager
def _convert_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, NotImplementedError) as error:  # pyarrow's are all of these
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the data
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name} is not a parquet file, or is damaged or cut off ({reason}). Download it again."
        ) from error


def _find_columns(schema: Any, name: str) -> tuple[str, str | None]:
    """Return the columns of the images and of the labels."""
    from pyarrow import types

    def holds_images(field: Any) -> bool:
        return types.is_struct(field.type) and any(
            inner.name == "bytes" and _is_binary(inner.type) for inner in field.type
        )

    images = [field.name for field in schema if holds_images(field)]
    images = images or [field.name for field in schema if field.name in _BINARY_NAMES and _is_binary(field.type)]
    if "image" in images:
        images = ["image"]
    if len(images) != 1:
        problem = "several columns may hold the images" if images else "no column holds images"
        columns = ", ".join(map(repr, images or schema.names))
        raise UserError(f"{name}: {problem} ({columns}). Rename the right one to 'image'.")
    return images[0], _find_label_name(schema, name)


def _find_label_name(schema: Any, name: str) -> str | None:
    from pyarrow import types

    if "label" not in schema.names:
        numbers = {field.name for field in schema if types.is_integer(field.type)}
        features = _read_features(schema).items()
        classes = [key for key, feature in features if feature.get("_type") == "ClassLabel" and key in numbers]
        return classes[0] if len(classes) == 1 else None
    kind = schema.field("label").type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    known = (types.is_integer, types.is_boolean, types.is_string, types.is_large_string, types.is_null)
    if not any(is_of(kind) for is_of in known):
        raise UserError(f"{name}: column 'label' holds {kind}, neither whole numbers nor text. Rename or convert it.")
    return "label"


def _is_binary(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _read_features(schema: Any) -> dict[str, dict[str, Any]]:
    """Return what Hugging Face's metadata say of the columns; empty where there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {column: feature for column, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _read_batches(
    table: Any, image: str, label: str | None, name: str
) -> Iterator[tuple[list[bytes], Sequence[bytes | None]]]:
    """Yield images and labels of a few rows at a time."""
    columns = [image] if label is None else [image, label]
    with _convert_errors(name):
        for batch in table.iter_batches(_ROWS, columns=columns, use_threads=False):
            images = [_read_image(value) for value in batch.column(image).to_pylist()]
            values = [None] * len(images) if label is None else batch.column(label).to_pylist()
            yield images, [_read_label(value) for value in values]


def _read_image(value: bytes | dict[str, Any] | None) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    return data or b""


def _read_label(value: int | str | None) -> bytes | None:
    """Return the label's text, or None. Hugging Face writes -1 for a missing label where nulls are not allowed."""
    if value is None or value == "" or (isinstance(value, int) and value < 0):
        return None
    return str(int(value) if isinstance(value, bool) else value).encode()


def _make_member(name: str, data: bytes) -> bytes:
    return make_tar_header(name, len(data)) + data + make_padding(len(data))
