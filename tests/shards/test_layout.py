"""The format: names, headers, the manifest."""

import io
import json
import re
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.layout import (
    RECORD,
    Manifest,
    Rejected,
    Shard,
    member_bytes,
    padding,
    sample_key,
    shard_name,
    tar_header,
)

MANIFEST = Manifest(
    name="train",
    fingerprint="ab" * 32,
    samples=3,
    classes=("cat", "d\udce9j\u00e0"),
    options={"format": "folders", "seed": 1, "shard_size": 10},
    shards=(Shard("train-000000.tar", 2, 4096, "cd" * 32), Shard("train-000001.tar", 1, 2048, "ef" * 32)),
    index_sha256="01" * 32,
    ignored=7,
    rejected=(Rejected("cat/\udcff.jpg", "empty file"),),
)


def test_manifest_survives_its_json() -> None:
    text = MANIFEST.to_json()
    assert Manifest.from_json(text) == MANIFEST
    text.encode("ascii")  # names that are no UTF-8 included


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": "1"}', '{"format_version": 1}', "null"])
def test_other_json_is_no_manifest(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Manifest.from_json(text)


def test_newer_manifest_is_named_so() -> None:
    newer = json.dumps({**json.loads(MANIFEST.to_json()), "format_version": 2})
    with pytest.raises(ValueError, match="format version 2, newer"):
        Manifest.from_json(newer)


def test_a_million_samples_index_below_50_mb() -> None:
    assert RECORD.itemsize * 1_281_167 < 50e6


@given(st.integers(0, 10**9 - 1), st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=200))
def test_keys_fit_every_reader(number: int, name: str) -> None:
    key = sample_key(number, f"a.class/{name}")
    assert re.fullmatch(r"\d{9}-[A-Za-z0-9_-]{0,60}", key)
    assert int(key[:9]) == number


def test_key_keeps_the_stem_readable() -> None:
    assert sample_key(12, "n01/space in name \u00e9.v2.jpg") == "000000012-space_in_name___v2"
    assert shard_name("val", 3) == "val-000003.tar"


@given(st.integers(0, 5000), st.from_regex(r"[a-z0-9-]{1,75}\.jpg", fullmatch=True))
def test_header_is_ustar_that_tarfile_reads(size: int, name: str) -> None:
    data = tar_header(name, size) + bytes(size) + padding(size)
    assert len(data) == member_bytes(size)
    with tarfile.open(fileobj=io.BytesIO(data + bytes(1024))) as tar:
        (member,) = tar.getmembers()
        assert tar.pax_headers == {}
    assert (member.name, member.size, member.mtime, member.mode) == (name, size, 0, 0o644)
    assert (member.uid, member.gid, member.uname, member.gname) == (0, 0, "", "")
    assert data[257:265] == b"ustar\00000"
