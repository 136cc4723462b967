"""Hugging Face's tables as tars of samples, held against what was written."""

import builtins
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from shards.errors import UserError
from shards.sources.fields import AS_FOUND, Fields
from shards.sources.parquet import convert_to_tar, find_label_column, list_label_columns

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pq = pytest.importorskip("pyarrow.parquet")

ROOT = Path(__file__).resolve().parents[3]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
IMAGES = [os.urandom(number * 97 % 2000 + 1) for number in range(250)]


def class_names(source: io.BytesIO, name: str) -> tuple[str, ...] | None:
    """The names of the label column, if there are a column and names."""
    label = find_label_column(source, name)
    return label.names if label else None


def rows_of(images: list[bytes]) -> Any:
    return pa.array([{"bytes": data, "path": f"{n}.jpg"} for n, data in enumerate(images)], IMAGE)


def features(**columns: dict[str, Any]) -> dict[bytes, bytes]:
    return {b"huggingface": json.dumps({"info": {"features": columns}}).encode()}


def parquet_of(columns: dict[str, Any], metadata: dict[bytes, bytes] | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    table = pa.table(columns).replace_schema_metadata(metadata)
    pq.write_table(table, file, **{"row_group_size": 100, **options})
    return file.getvalue()


def tar_of(data: bytes, fields: Fields = AS_FOUND) -> bytes:
    target = io.BytesIO()
    convert_to_tar(io.BytesIO(data), "x.parquet", target, lambda rows: None, fields)
    return target.getvalue()


def samples(data: bytes, fields: Fields = AS_FOUND) -> list[tuple[bytes, str | None]]:
    """Image and label of each row, as tarfile reads what was written."""
    with tarfile.open(fileobj=io.BytesIO(tar_of(data, fields)), mode="r:") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    count = sum(name.endswith(".jpg") for name in files)
    found = [(files.pop(f"{row:09d}.jpg"), files.pop(f"{row:09d}.cls", None)) for row in range(count)]
    assert not files
    return [(image, None if label is None else label.decode()) for image, label in found]


def refused(data: bytes, message: str, fields: Fields = AS_FOUND) -> None:
    for attempt in (
        lambda data: tar_of(data, fields),
        lambda data: find_label_column(io.BytesIO(data), "x.parquet", fields),
    ):
        with pytest.raises(UserError, match=message) as caught:
            attempt(data)
        assert "\n" not in str(caught.value)


CLASSES = {"_type": "ClassLabel", "names": ["cat", "süßer Hund", "n01440764"]}


@pytest.mark.parametrize(
    "options", [{}, {"compression": "zstd"}, {"use_dictionary": False, "write_page_checksum": True}]
)
def test_rows_become_samples_in_order(options: dict[str, Any]) -> None:
    labels = [row % 3 for row in range(250)]
    data = parquet_of({"image": rows_of(IMAGES), "label": labels}, features(label=CLASSES), **options)
    assert pq.ParquetFile(io.BytesIO(data)).num_row_groups == 3
    assert samples(data) == [(image, str(label)) for image, label in zip(IMAGES, labels, strict=True)]
    assert class_names(io.BytesIO(data), "x") == ("cat", "süßer Hund", "n01440764")


def test_written_tar_is_webdataset_in_ustar() -> None:
    data = tar_of(parquet_of({"image": rows_of(IMAGES[:2]), "label": [7, 8]}))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [info.name for info in tar] == ["000000000.jpg", "000000000.cls", "000000001.jpg", "000000001.cls"]
        assert tar.pax_headers == {}
    assert len(data) % 512 == 0
    assert data.endswith(bytes(1024))


def test_source_stays_open_and_progress_is_heard() -> None:
    source, heard = io.BytesIO(parquet_of({"image": rows_of(IMAGES)})), []
    convert_to_tar(source, "x", io.BytesIO(), heard.append)
    assert not source.closed
    assert heard == sorted(heard)
    assert heard[-1] == len(IMAGES)
    assert len(heard) >= 250 // 32


def test_rows_without_image_are_empty_members() -> None:
    values = [None, {"bytes": None, "path": "a.jpg"}, {"bytes": b"", "path": None}, {"bytes": b"x", "path": None}]
    assert samples(parquet_of({"image": pa.array(values, IMAGE)})) == [(b"", None)] * 3 + [(b"x", None)]


@pytest.mark.parametrize(
    ("labels", "texts"),
    [
        (pa.array([3, None, -1], pa.int64()), ["3", None, None]),
        (pa.array([3, 200, 0], pa.uint8()), ["3", "200", "0"]),
        (pa.array(["cat", "", None]), ["cat", None, None]),
        (pa.array(["cat", "dog", "cat"]).dictionary_encode(), ["cat", "dog", "cat"]),
        (pa.array(["cat", "dog", "猫"], pa.large_string()), ["cat", "dog", "猫"]),
        (pa.array([True, False, None]), ["1", "0", None]),
        (pa.nulls(3), [None, None, None]),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_labels_of_all_types(labels: Any, texts: list[str | None]) -> None:
    data = parquet_of({"image": rows_of(IMAGES[:3]), "label": labels})
    assert [label for _, label in samples(data)] == texts


@pytest.mark.parametrize("labels", [[1.0, 2.0], [[1], [2]], [b"a", b"b"]])
def test_labels_of_other_types_are_refused(labels: list[Any]) -> None:
    refused(parquet_of({"image": rows_of(IMAGES[:2]), "label": labels}), "^x.parquet: column 'label' holds ")


def test_the_only_other_class_label_is_the_label() -> None:
    columns = {"image": rows_of(IMAGES[:2]), "id": [5, 6], "breed": [1, 0]}
    breed = features(breed=CLASSES, id={"_type": "Value", "dtype": "int64"}, image={"_type": "Image"})
    assert [label for _, label in samples(parquet_of(columns, breed))] == ["1", "0"]
    assert class_names(io.BytesIO(parquet_of(columns, breed)), "x") == ("cat", "süßer Hund", "n01440764")
    both = parquet_of({**columns, "label": [8, 9]}, breed)
    assert [label for _, label in samples(both)] == ["8", "9"]
    assert class_names(io.BytesIO(both), "x") is None


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {b"pandas": b"{}"},
        {b"huggingface": b"no json"},
        {b"huggingface": b"[]"},
        {b"huggingface": b'{"info": {"features": [{"name": "label"}]}}'},
        features(label={"_type": "ClassLabel"}),
        features(label={"_type": "Value", "dtype": "int64"}),
        {b"huggingface": b'{"info": {"features": {"label": "ClassLabel"}}}'},
    ],
)
def test_no_class_names_without_metadata(metadata: dict[bytes, bytes] | None) -> None:
    data = parquet_of({"image": rows_of(IMAGES[:2]), "label": [4, 5]}, metadata)
    assert class_names(io.BytesIO(data), "x") is None
    assert [label for _, label in samples(data)] == ["4", "5"]


@pytest.mark.parametrize(
    "columns",
    [
        {"image": rows_of(IMAGES[:2]), "id": [1, 2]},
        {"image": rows_of(IMAGES[:2]), "mask": rows_of(IMAGES[2:4])},
        {"image": IMAGES[:2], "other": IMAGES[2:4]},
        {"jpg": pa.array(IMAGES[:2], pa.large_binary()), "other": IMAGES[2:4]},
        {"jpg": IMAGES[2:4], "photo": rows_of(IMAGES[:2])},
        {"a.b": rows_of(IMAGES[:2]), "a": [1, 2]},
    ],
)
def test_column_of_the_images(columns: dict[str, Any]) -> None:
    assert [image for image, _ in samples(parquet_of(columns))] == IMAGES[:2]


def test_ambiguous_and_missing_columns_are_named() -> None:
    rows = rows_of(IMAGES[:2])
    refused(
        parquet_of({"left": rows, "right": rows, "id": [1, 2]}),
        r"^x\.parquet: several columns may hold the images \('left', 'right'\)\. Pass --image-column NAME\.$",
    )
    refused(parquet_of({"jpg": IMAGES[:2], "png": IMAGES[:2]}), r"several columns .*'jpg', 'png'")
    refused(
        parquet_of({"url": ["a", "b"], "data": IMAGES[:2]}),
        r"^x\.parquet: no column holds images \('url', 'data'\)\. Pass --image-column NAME\.$",
    )


COLUMNS = {"img": rows_of(IMAGES[:2]), "fine_label": [5, 6], "coarse_label": [1, 0], "caption": ["a", "b"]}


def test_labels_of_other_names_are_named_with_the_flag_that_takes_one() -> None:
    words = r"^x\.parquet: no column 'label', but 'fine_label', 'coarse_label' may hold the labels\. Pass --label-col"
    two = features(fine_label=CLASSES, coarse_label=CLASSES)
    for metadata in (None, two, features(img={"_type": "Image"})):
        data = parquet_of(COLUMNS, metadata)
        refused(data, words)
        for column, labels in (("fine_label", ["5", "6"]), ("coarse_label", ["1", "0"]), ("caption", ["a", "b"])):
            chosen = Fields(label_column=column)
            assert samples(data, chosen) == list(zip(IMAGES[:2], labels, strict=True))
        assert samples(data, Fields(labeled=False)) == [(image, None) for image in IMAGES[:2]]
    found = find_label_column(io.BytesIO(parquet_of(COLUMNS, two)), "x", Fields(label_column="coarse_label"))
    assert found is not None
    assert found.names == tuple(CLASSES["names"])


@pytest.mark.parametrize("column", ["class_name", "Category", "target", "species", "cls", "y", "superclass"])
def test_likely_names_of_labels(column: str) -> None:
    refused(parquet_of({"image": rows_of(IMAGES[:2]), column: [1, 2]}), f"but '{column}' may hold the labels")


def test_other_columns_are_no_labels() -> None:
    data = parquet_of({"image": rows_of(IMAGES[:2]), "caption": ["a", "b"], "width": [1, 2], "score": [1.0, 2.0]})
    assert [label for _, label in samples(data)] == [None, None]
    assert list_label_columns(io.BytesIO(data), "x") == ["caption", "width"]


def test_columns_that_are_chosen() -> None:
    two = parquet_of({"left": rows_of(IMAGES[:2]), "right": rows_of(IMAGES[2:4]), "label": [1, 2], "score": [1.0, 2.0]})
    assert [image for image, _ in samples(two, Fields(image_column="right"))] == IMAGES[2:4]
    refused(two, r"no column 'mid' \('left', 'right', 'label', 'score'\)\. Correct --image-col", Fields((), "mid"))
    refused(two, r"no column 'x' \(.*\)\. Correct --label-column", Fields((), "left", "x"))
    refused(two, r"column 'label' holds int64, not the bytes of images", Fields((), "label"))
    refused(two, r"column 'score' holds double, neither whole numbers nor text", Fields((), "left", "score"))
    blob = parquet_of({"blob": IMAGES[:2]})
    assert [image for image, _ in samples(blob, Fields((), "blob"))] == IMAGES[:2]


def test_a_table_of_paths_says_so() -> None:
    words = r"^x\.parquet: column 'image' holds string, not the bytes of images\. If these are paths, give the folder"
    refused(parquet_of({"image": ["a.jpg", "b.jpg"]}), words)
    rows = pa.array([{"bytes": None, "path": f"train/{n}.jpg"} for n in range(3)], IMAGE)
    with pytest.raises(UserError, match=r"column 'image' holds only paths, such as train/0\.jpg, and not the bytes"):
        tar_of(parquet_of({"image": rows}))


def test_half_a_character_in_the_name_of_a_class_is_refused() -> None:
    bad = {"_type": "ClassLabel", "names": ["cat", "\ud800"]}
    with pytest.raises(UserError, match=r"^x is not a parquet file, or is damaged .*surrogates"):
        class_names(io.BytesIO(parquet_of({"image": rows_of(IMAGES[:1]), "label": [0]}, features(label=bad))), "x")


WHOLE = parquet_of({"image": rows_of(IMAGES), "label": [1] * 250}, features(label=CLASSES))


@pytest.mark.parametrize("data", [b"", b"PAR1", b"<html>" * 300, WHOLE[:5000], WHOLE[:-1], b"PAR1" * 10])
def test_damaged_and_other_files(data: bytes) -> None:
    refused(data, r"^x\.parquet is not a parquet file, or is damaged or cut off \(.*\)\. Download it again\.$")


def test_flipped_bit_is_found_by_the_pages_checksum() -> None:
    data = bytearray(parquet_of({"image": rows_of(IMAGES)}, compression="none", write_page_checksum=True))
    data[data.index(IMAGES[200]) + 1] ^= 1
    with pytest.raises(UserError, match=r"^x\.parquet is not a parquet file, or is damaged .*CRC"):
        tar_of(bytes(data))


def test_table_without_its_beginning() -> None:
    assert class_names(io.BytesIO(WHOLE[100:]), "x") is not None  # it is at the end
    with pytest.raises(UserError, match=r"^x\.parquet is not a parquet file, or is damaged"):
        tar_of(WHOLE[100:])


def test_disk_errors_are_not_taken_for_damage() -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="Input/output error"):
        convert_to_tar(Failing(WHOLE), "x", io.BytesIO(), lambda rows: None)
    with pytest.raises(OSError, match="No space left"):
        convert_to_tar(io.BytesIO(WHOLE), "x", Failing(), lambda rows: None)


def test_without_pyarrow_the_mend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    whole_import = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return whole_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    refused(WHOLE, r"^x\.parquet: reading parquet needs pyarrow\. Install it with 'pip install pyarrow'\.$")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_is_that_of_a_few_rows(tmp_path: Path) -> None:
    path = tmp_path / "big.parquet"
    options = {"compression": "none", "use_dictionary": False, "write_batch_size": 16}  # the latter makes small pages
    with pq.ParquetWriter(path, pa.schema([("image", IMAGE)]), **options) as writer:
        for group in range(2):
            rows = [{"bytes": bytes([group, row % 256]) * 50_000, "path": None} for row in range(800)]
            writer.write_table(pa.table({"image": pa.array(rows, IMAGE)}), row_group_size=800)
    assert path.stat().st_size > 160e6
    script = """
import re, sys, pyarrow.parquet
from shards.sources.parquet import convert_to_tar
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
convert_to_tar(open(sys.argv[1], "rb"), "x", open("/dev/null", "wb"), lambda rows: None)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script, path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 50e6
