"""Forged manifests and indexes: a download cut short, a bit of a disk, a hostile data set. Each ends in one line."""

import hashlib
import json
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.__main__ import main
from shards.errors import UserError
from shards.index import ShardIndex
from shards.layout import RECORD
from shards.record_checks import find_record_problem
from tests.shards.archives import tar_of
from tests.shards.manifests import forge

LENGTHS = [4096, 2048]
Found = Callable[..., str | None]


def records_of(count: int, **fields: object) -> np.ndarray:
    """Right records, with these fields changed in the last one."""
    records = np.zeros(count, RECORD)
    records["offset"], records["size"], records["height"], records["width"] = 512, 100, 20, 30
    for name, value in fields.items():
        records[name][-1] = value
    return records


def forge_index(folder: Path, data: bytes) -> None:
    """Replace the index, and make the manifest vouch for it."""
    (folder / "index.npy").write_bytes(data)
    forge(folder, index_sha256=hashlib.sha256(data).hexdigest())


def forge_record(folder: Path, place: int, **fields: int) -> None:
    records = np.load(folder / "index.npy")
    for name, value in fields.items():
        records[name][place] = value
    np.save(folder / "index.npy", records)
    forge_index(folder, (folder / "index.npy").read_bytes())


WRONG = [
    {"shard": 2},
    {"shard": 2**32 - 1},
    {"offset": 0},
    {"offset": 511},
    {"offset": 4096 - 99},
    {"offset": 2**63},
    {"offset": 2**64 - 1},
    {"offset": 2**64 - 50},
    {"size": 0},
    {"size": 2**32 - 1},
    {"size": 3585},
    {"shard": 1, "size": 1537},
    {"height": 0},
    {"width": 0},
    {"height": 2**32 - 1},
    {"width": 1_000_001},
    {"height": 200, "width": 51},
    {"label": -2},
    {"label": -(2**31)},
    {"label": 3},
    {"label": 2**31 - 1},
]
RIGHT = [
    {},
    {"shard": 1, "size": 1536},
    {"size": 3584},
    {"offset": 4096 - 100},
    {"height": 200, "width": 50},
    {"height": 1, "width": 10_000},
    {"label": -1},
    {"label": 2},
]


@pytest.mark.parametrize("count", [1, 100_000])
@pytest.mark.parametrize("fields", WRONG, ids=str)
def test_a_record_that_packing_never_writes_is_found_and_named(fields: dict[str, int], count: int) -> None:
    problem = find_record_problem(records_of(count, **fields), LENGTHS, 3, 10_000)
    assert problem is not None
    assert problem.startswith(f"sample {count - 1} has ")
    field, value = list(fields.items())[-1]
    assert f"{field} {value}" in problem


@pytest.mark.parametrize("fields", RIGHT, ids=str)
def test_right_records_pass(fields: dict[str, int]) -> None:
    assert find_record_problem(records_of(5, **fields), LENGTHS, 3, 10_000) is None


def test_an_unknown_limit_of_pixels_is_none() -> None:
    assert find_record_problem(records_of(1, height=999_999, width=999_999), LENGTHS, 3, None) is None


@given(st.binary(min_size=RECORD.itemsize, max_size=RECORD.itemsize))
def test_whatever_passes_can_be_read(data: bytes) -> None:
    records = np.concatenate([records_of(2), np.frombuffer(data, RECORD)])
    (record,) = records[2:].tolist()
    shard, offset, size, height, width, label, _ = record
    right = (
        shard < 2
        and offset >= 512
        and 0 < size <= 1 << 30
        and offset + size <= LENGTHS[shard]
        and min(height, width) > 0
        and max(height, width) <= 1_000_000
        and height * width <= 10_000
        and -1 <= label < 3
    )
    assert (find_record_problem(records, LENGTHS, 3, 10_000) is None) == right


@pytest.mark.slow
def test_as_many_records_as_imagenet_has_are_right() -> None:
    """It prints the time: about 15 ms."""
    records = np.resize(records_of(1), 1_281_167)
    assert find_record_problem(records, LENGTHS, 3, 10_000) is None
    times = []
    for _ in range(5):
        began = time.perf_counter()
        find_record_problem(records, LENGTHS, 3, 10_000)
        times.append(1e3 * (time.perf_counter() - began))
    print(f"{min(times):.1f} ms")


def make_npy(shape: str, descr: str | None = None, data: bytes = b"") -> bytes:
    """An index with this text in its header."""
    descr = descr or repr(np.lib.format.dtype_to_descr(RECORD))
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + data


INDEXES = {
    "nothing": b"",
    "a zip archive": b"PK\3\4" + bytes(100),
    "a pickle": b"\x80\x04K\x01.",
    "a newer version": b"\x93NUMPY\x09\0" + bytes(90),
    "cut short": make_npy("(21,)"),
    "more than memory": make_npy("(99999999999999,)"),
    "more than 64 bits": make_npy("(99999999999999999999999999,)"),
    "less than none": make_npy("(-1,)"),
    "a truth": make_npy("(True,)", data=bytes(999)),
    "parentheses": make_npy("(" * 3000),
    "no shape": make_npy("()", data=bytes(999)),
    "objects": make_npy("(21,)", "'|O'", bytes(999)),
    "other numbers": make_npy("(21,)", "'<i4'", bytes(999)),
    "no fields": make_npy("(21,)", "[]", bytes(999)),
}


@pytest.mark.parametrize("name", INDEXES)
@pytest.mark.parametrize("command", ["info", "check", "show"])
def test_a_file_that_is_no_index_ends_in_one_line(
    packed: Path, name: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forge_index(packed, INDEXES[name])
    with pytest.raises(UserError, match=r"index\.npy (is not an index|does not belong to this manifest)") as caught:
        ShardIndex(packed)
    assert "\n" not in str(caught.value)
    if command == "check":  # which starts workers
        return
    grid = ["--grid", str(tmp_path / "grid.png")] if command == "show" else []
    assert main([command, str(packed), *grid]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("fields", [{"offset": 2**63}, {"shard": 99}, {"height": 0}, {"label": 2}], ids=str)
def test_a_forged_record_is_refused_when_an_index_is_opened(packed: Path, fields: dict[str, int]) -> None:
    forge_record(packed, 4, **fields)
    ((field, value),) = fields.items()
    words = (
        rf"index\.npy is damaged or forged: sample 4 has .*{field} {value}.*, which packing never writes\. Pack again"
    )
    with pytest.raises(UserError, match=words):
        ShardIndex(packed)


SHARD = {"file": "train-000000.tar", "samples": 21, "bytes": 4096, "sha256": "cd" * 32}
MANIFESTS = [
    ("shards", [{**SHARD, "file": "train\0.tar"}]),
    ("shards", [{**SHARD, "file": "train\ud800.tar"}]),
    ("shards", [{**SHARD, "file": "\udbff.tar"}]),
    ("shards", [{**SHARD, "bytes": 2**63}]),
    ("shards", [{**SHARD, "samples": 2**63}]),
    ("shards", [{**SHARD, "sha256": "../../../../tmp/x"}]),
    ("shards", [{**SHARD, "sha256": "CD" * 32}]),
    ("index_sha256", "\ud800"),
    ("fingerprint", "\ud800"),
    ("fingerprint", "é" * 64),
    ("classes", ["cat", "\ud800"]),
    ("rejected", [{"source": "\ud800", "reason": ""}]),
    ("name", "\udfff"),
    ("samples", 2**64),
]


@pytest.mark.parametrize(("field", "value"), MANIFESTS, ids=repr)
def test_a_forged_manifest_ends_in_one_line(
    packed: Path, field: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    forge(packed, **{field: value})
    with pytest.raises(UserError, match=rf"manifest\.json: not a make-shards manifest \(.*{field}"):
        ShardIndex(packed)
    for command in ("info", "check"):
        assert main([command, str(packed)]) == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_names_whose_bytes_are_not_utf_8_are_no_forgery(packed: Path) -> None:
    (packed / "train-000000.tar").rename(packed / "tr\udce9in-000000.tar")
    shards = json.loads((packed / "manifest.json").read_text())["shards"]
    forge(packed, shards=[{**shards[0], "file": "tr\udce9in-000000.tar"}, *shards[1:]])
    with ShardIndex(packed) as index:
        index.read(range(len(index)))


def test_half_a_character_as_a_label_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = {"1.jpg": b"", "1.json": b'{"label": "\\ud800"}'}
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    assert main(["pack", str(tmp_path / "a.tar"), str(tmp_path / "out")]) == 1
    assert "a.tar: the label of sample 1 cannot be read ('utf-8' codec can't encode" in capsys.readouterr().err


def test_a_size_that_the_image_does_not_have_is_found_by_check(
    packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = np.load(packed / "index.npy")
    place = int(np.flatnonzero(records["height"] != records["width"])[0])
    height, width = int(records["height"][place]), int(records["width"][place])
    for forged in ((width, height), (2 * height, 2 * width)):
        forge_record(packed, place, height=forged[0], width=forged[1])
        assert main(["check", str(packed), "--workers", "1"]) == 1
        words = f"the image is {width} x {height} pixels, the index says {forged[1]} x {forged[0]}"
        assert re.search(words, capsys.readouterr().out)
