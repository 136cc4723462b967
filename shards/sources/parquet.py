"""Convert tables of images in parquet files, as Hugging Face writes them, into tars of samples."""

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from shards.errors import UserError
from shards.layout import TAR_END, make_padding, make_tar_header
from shards.sources.fields import AS_FOUND, Fields

_ROWS = 32  # in memory at a time
_BUFFER = 1 << 20  # bytes, of each column
# Names of columns in tables of other people.
_BINARY_NAMES = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "image_bytes", "bytes")
_LABEL_NAME = re.compile(r"label|class|categor|target|species|synset|^cls$|^y$", re.IGNORECASE)


class LabelColumn(NamedTuple):
    """Where a table's labels are, and what they stand for."""

    column: str
    """name of the column"""
    type: str
    """arrow's name of its type"""
    names: tuple[str, ...] | None
    """names of the classes that its numbers stand for, where Hugging Face's metadata have them"""


def convert_to_tar(
    source: BinaryIO, name: str, target: BinaryIO, tick: Callable[[int], None], fields: Fields = AS_FOUND
) -> None:
    """Write a table as a WebDataset tar: ``ROW.jpg``, whatever the bytes are, and ``ROW.cls`` where there is a label.

    A row without an image becomes an empty image. A label that is null or negative is none. `tick` is called with the
    number of rows done. Memory is some rows and three times the table's largest page (100 rows from Hugging Face).
    Raises UserError where the table, called `name` in the message, is damaged, holds paths in place of images, or where
    neither `fields` nor the table says which column holds the images, or the labels.
    """
    with _convert_errors(name):
        table = _open_table(source, name)
        image, label = _find_columns(table.schema_arrow, name, fields)
    row = 0
    for images, labels in _read_batches(table, image, label, name):
        for data, text in zip(images, labels, strict=True):
            target.write(_make_member(f"{row:09d}.jpg", data))
            if text is not None:
                target.write(_make_member(f"{row:09d}.cls", text))
            row += 1
        tick(row)
    target.write(TAR_END)


def find_label_column(source: BinaryIO, name: str, fields: Fields = AS_FOUND) -> LabelColumn | None:
    """Return the label column of a table, or None where there is none. Raises as `convert_to_tar`."""
    with _convert_errors(name):
        schema = _open_table(source, name).schema_arrow
        _, label = _find_columns(schema, name, fields)
        if label is None:
            return None
        names = _read_features(schema).get(label, {}).get("names")
        texts = tuple(map(str, names)) if isinstance(names, list) else None
        "".join(texts or ()).encode()  # JSON may hold half of a character, which cannot be written
    return LabelColumn(label, str(schema.field(label).type), texts)


def list_label_columns(source: BinaryIO, name: str) -> list[str]:
    """Return the columns of a table that could be labels by their types. Raises as `convert_to_tar`."""
    with _convert_errors(name):
        return [field.name for field in _open_table(source, name).schema_arrow if _holds_labels(field.type)]


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


def _find_columns(schema: Any, name: str, fields: Fields) -> tuple[str, str | None]:
    """Return the columns of the images and of the labels."""
    for flag, column in (("--image-column", fields.image_column), ("--label-column", fields.label_column)):
        if column is not None and schema.names.count(column) != 1:
            raise UserError(f"{name}: no column {column!r} ({_list(schema.names)}). Correct {flag}.")
    image = fields.image_column or _find_image_column(schema, name)
    if not _holds_images(schema.field(image).type):
        raise UserError(
            f"{name}: column {image!r} holds {schema.field(image).type}, not the bytes of images. If these are paths, "
            "give the folder with the files as SRC."
        )
    return image, _find_label_name(schema, name, image, fields) if fields.labeled else None


def _find_image_column(schema: Any, name: str) -> str:
    images = [field.name for field in schema if _holds_images(field.type) and not _is_binary(field.type)]
    images = images or [field.name for field in schema if field.name in _BINARY_NAMES and _is_binary(field.type)]
    if "image" in images:
        return "image"
    if len(images) == 1:
        return images[0]
    if not images and "image" in schema.names:
        return "image"  # which holds something else
    problem = "several columns may hold the images" if images else "no column holds images"
    raise UserError(f"{name}: {problem} ({_list(images or schema.names)}). Pass --image-column NAME.")


def _find_label_name(schema: Any, name: str, image: str, fields: Fields) -> str | None:
    column = fields.label_column or ("label" if "label" in schema.names else None)
    if column is not None:
        if not _holds_labels(kind := schema.field(column).type):
            raise UserError(
                f"{name}: column {column!r} holds {kind}, neither whole numbers nor text. Pass --label-column with "
                "another column, or --format flat to pack without labels."
            )
        return column
    usable = [field.name for field in schema if field.name != image and _holds_labels(field.type)]
    features = _read_features(schema)
    classes = [column for column in usable if features.get(column, {}).get("_type") == "ClassLabel"]
    if len(classes) == 1:
        return classes[0]
    if likely := classes or list(filter(_LABEL_NAME.search, usable)):
        raise UserError(
            f"{name}: no column 'label', but {_list(likely)} may hold the labels. Pass --label-column NAME, or "
            "--format flat to pack without labels."
        )
    return None


def _holds_images(kind: Any) -> bool:
    from pyarrow import types

    is_pair = types.is_struct(kind) and any(inner.name == "bytes" and _is_binary(inner.type) for inner in kind)
    return is_pair or _is_binary(kind)


def _holds_labels(kind: Any) -> bool:
    """Return whether a column of this type holds whole numbers or text."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    known = (types.is_integer, types.is_boolean, types.is_string, types.is_large_string, types.is_null)
    return any(is_of(kind) for is_of in known)


def _list(columns: Iterable[str]) -> str:
    return ", ".join(map(repr, columns))


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
    found = False
    with _convert_errors(name):
        for batch in table.iter_batches(_ROWS, columns=columns, use_threads=False):
            cells = batch.column(image).to_pylist()
            images = [_read_image(cell) for cell in cells]
            found = found or any(images)
            if not found:
                _refuse_paths(cells, image, name)
            values = [None] * len(images) if label is None else batch.column(label).to_pylist()
            yield images, [_read_label(value) for value in values]


def _refuse_paths(cells: Iterable[bytes | dict[str, Any] | None], image: str, name: str) -> None:
    """Raise UserError where cells without bytes have paths."""
    path = next((cell["path"] for cell in cells if isinstance(cell, dict) and cell.get("path")), None)
    if path is not None:
        raise UserError(
            f"{name}: column {image!r} holds only paths, such as {path}, and not the bytes of images. Give the folder "
            "with the files as SRC, or save the table with the bytes in it (datasets: embed_table_storage)."
        )


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
