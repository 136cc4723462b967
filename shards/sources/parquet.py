"""Tables of pictures in parquet files, as Hugging Face lays them out, rewritten as tars of samples."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from shards.errors import UserError
from shards.layout import TAR_END, padding, tar_header

_ROWS = 32  # in memory at a time
_BUFFER = 1 << 20  # bytes, of each column
_BINARY_NAMES = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "image_bytes", "bytes")


def to_tar(source: BinaryIO, name: str, target: BinaryIO, tick: Callable[[int], None]) -> None:
    """Write a table as a WebDataset tar: ``ROW.jpg``, whatever the bytes are, and ``ROW.cls`` where there is a label.

    A row without picture becomes an empty one. Rows without label are those where it is null or negative. `tick` hears
    how many rows are done. Memory is some rows and three times the table's largest page (Hugging Face: 100 rows).
    Raises UserError where the table, called `name` in the message, is damaged or its columns leave open where the
    pictures are.
    """
    with _damage_named(name):
        table = _opened(source, name)
        image, label = _columns(table.schema_arrow, name)
    row = 0
    for pictures, labels in _batches(table, image, label, name):
        for picture, text in zip(pictures, labels, strict=True):
            target.write(_member(f"{row:09d}.jpg", picture))
            if text is not None:
                target.write(_member(f"{row:09d}.cls", text))
            row += 1
        tick(row)
    target.write(TAR_END)


class LabelColumn(NamedTuple):
    """Where a table's labels are, and what they stand for."""

    column: str
    type: str  # arrow's name of it
    names: tuple[str, ...] | None  # of the classes that its numbers are places of, where Hugging Face's metadata say so


def label_column(source: BinaryIO, name: str) -> LabelColumn | None:
    """The labels of a table; None where there are none. Raises as `to_tar`."""
    with _damage_named(name):
        schema = _opened(source, name).schema_arrow
        _, label = _columns(schema, name)
    if label is None:
        return None
    names = _features(schema).get(label, {}).get("names")
    return LabelColumn(
        label, str(schema.field(label).type), tuple(map(str, names)) if isinstance(names, list) else None
    )


def _opened(source: BinaryIO, name: str) -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{name}: reading parquet needs pyarrow; pip install pyarrow") from None
    # Without the buffer a row group's whole column is read at once. With it, pages are: some writers make one of that.
    return parquet.ParquetFile(source, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True)


@contextlib.contextmanager
def _damage_named(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, NotImplementedError) as error:  # pyarrow's are all of these
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the data's
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"{name} is no parquet file, or damaged or cut off ({reason}); get it anew") from error


def _columns(schema: Any, name: str) -> tuple[str, str | None]:
    """The columns of the pictures and of the labels."""
    from pyarrow import types

    def holds_pictures(field: Any) -> bool:
        return types.is_struct(field.type) and any(
            inner.name == "bytes" and _is_binary(inner.type) for inner in field.type
        )

    images = [field.name for field in schema if holds_pictures(field)]
    images = images or [field.name for field in schema if field.name in _BINARY_NAMES and _is_binary(field.type)]
    if "image" in images:
        images = ["image"]
    if len(images) != 1:
        found = "several columns may hold the pictures" if images else "no column holds pictures"
        columns = ", ".join(map(repr, images or schema.names))
        raise UserError(f"{name}: {found} ({columns}); call the right one 'image'")
    return images[0], _label_column(schema, name)


def _label_column(schema: Any, name: str) -> str | None:
    from pyarrow import types

    if "label" not in schema.names:
        numbers = {field.name for field in schema if types.is_integer(field.type)}
        features = _features(schema).items()
        classes = [key for key, feature in features if feature.get("_type") == "ClassLabel" and key in numbers]
        return classes[0] if len(classes) == 1 else None
    kind = schema.field("label").type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    known = (types.is_integer, types.is_boolean, types.is_string, types.is_large_string, types.is_null)
    if not any(is_of(kind) for is_of in known):
        raise UserError(f"{name}: column 'label' holds {kind}, neither whole numbers nor text; rename or convert it")
    return "label"


def _is_binary(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What Hugging Face's metadata say of the columns; nothing where there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {column: feature for column, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _batches(
    table: Any, image: str, label: str | None, name: str
) -> Iterator[tuple[list[bytes], Sequence[bytes | None]]]:
    """Pictures and labels of a few rows at a time."""
    columns = [image] if label is None else [image, label]
    with _damage_named(name):
        for batch in table.iter_batches(_ROWS, columns=columns, use_threads=False):
            pictures = [_picture(value) for value in batch.column(image).to_pylist()]
            values = [None] * len(pictures) if label is None else batch.column(label).to_pylist()
            yield pictures, [_label(value) for value in values]


def _picture(value: bytes | dict[str, Any] | None) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    return data or b""


def _label(value: int | str | None) -> bytes | None:
    """The label's text; None where there is none, which Hugging Face writes as -1 where nulls are not allowed."""
    if value is None or value == "" or (isinstance(value, int) and value < 0):
        return None
    return str(int(value) if isinstance(value, bool) else value).encode()


def _member(name: str, data: bytes) -> bytes:
    return tar_header(name, len(data)) + data + padding(len(data))
