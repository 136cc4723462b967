"""The format: names, headers, the manifest."""

import contextlib
import dataclasses
import io
import json
import os
import re
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import UserError
from shards.layout import (
    RECORD,
    count_member_bytes,
    make_padding,
    make_sample_key,
    make_shard_name,
    make_tar_header,
)
from shards.manifest import Manifest, Rejected, Shard, load_manifest
from shards.storage.local_folder import LocalFolder
from tests.shards.manifests import sealed

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


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": "2"}', '{"format_version": 2}', "null"])
def test_other_json_is_no_manifest(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Manifest.from_json(text)


NAMES = st.lists(st.binary(max_size=9), unique=True).map(lambda names: [os.fsdecode(name) for name in names])


@given(NAMES, NAMES)
def test_names_of_any_bytes_survive(classes: list[str], sources: list[str]) -> None:
    rejected = tuple(Rejected(source, "empty file") for source in sources)
    manifest = dataclasses.replace(MANIFEST, classes=tuple(classes), rejected=rejected)
    assert Manifest.from_json(manifest.to_json().encode("ascii").decode()) == manifest


def test_every_bit_counts() -> None:
    """Whatever bit is wrong, the manifest is refused; but for the case of a hexadecimal digit, which means the same."""
    text = MANIFEST.to_json().encode()
    same = 0
    for bit in range(8 * len(text)):
        damaged = bytearray(text)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert Manifest.from_json(damaged.decode()) == MANIFEST
            same += 1
        except ValueError:
            pass
    assert same == sum(len(re.findall("[a-f]", digits)) for digits in re.findall(r"\\u([0-9a-f]{4})", text.decode()))


def test_a_change_by_hand_is_named_so() -> None:
    for text in (
        MANIFEST.to_json().replace('"foreign": false', '"foreign": true'),
        MANIFEST.to_json().replace('"cat"', '"dog"'),
        re.sub(r' "sha256": "[0-9a-f]{64}",?\n', "", MANIFEST.to_json(), count=1),
    ):
        assert text != MANIFEST.to_json()
        with pytest.raises(ValueError, match="so it is damaged or was edited by hand"):
            Manifest.from_json(text)


@pytest.mark.parametrize(("version", "what"), [(1, "older"), (3, "newer"), (-1, "older")])
def test_another_version_is_named_so(version: int, what: str, tmp_path: Path) -> None:
    text = json.dumps({**json.loads(MANIFEST.to_json()), "format_version": version})
    with pytest.raises(ValueError, match=f"^format version {version} is {what} than this program's 2$"):
        Manifest.from_json(text)
    (tmp_path / "manifest.json").write_text(text)
    fix = {"older": "Pack again", "newer": r"Update dino_fast\.$"}[what]
    with pytest.raises(UserError, match=rf"manifest\.json: format version {version} is {what} than .*2\. {fix}"):
        load_manifest(LocalFolder(str(tmp_path)))


SHARD = {"file": "train-000000.tar", "samples": 3, "bytes": 4096, "sha256": "cd" * 32}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, value) for name in ("samples", "ignored", "duplicates") for value in (-1, "3", 3.0, True, None)),
        ("samples", 4),
        ("classes", ["cat", "cat"]),
        ("classes", ["cat", 1]),
        ("classes", "cat"),
        ("classes", None),
        ("options", []),
        ("options", None),
        ("options", {"max_pixels": "9"}),
        ("options", {"max_pixels": 0}),
        ("options", {"image_seconds": "9"}),
        ("options", {"image_seconds": float("nan")}),
        ("options", {"image_seconds": 1e300}),
        ("shards", {}),
        ("shards", ["train-000000.tar"]),
        ("shards", [{**SHARD, "samples": "3"}]),
        ("shards", [{**SHARD, "bytes": -1}]),
        ("shards", [{**SHARD, "file": None}]),
        ("shards", [{**SHARD, "file": "../train-000000.tar"}]),
        ("shards", [{**SHARD, "sha256": 0}]),
        ("shards", [{**SHARD, "more": 0}]),
        ("shards", [{**SHARD, "samples": 4}, {**SHARD, "samples": -1}]),
        ("rejected", "cat"),
        ("rejected", [{"source": "cat.jpg"}]),
        ("rejected", [{"source": "cat.jpg", "reason": 1}]),
        ("counts", []),
        ("counts", {"turned_upright": -1}),
        ("counts", {"turned_upright": "1"}),
        ("counts", {"more": 1}),
        ("tables", []),
        ("tables", {"rejected.csv": 1}),
        ("name", 1),
        ("fingerprint", None),
        ("index_sha256", []),
        ("foreign", "yes"),
        ("more", 1),
    ],
)
def test_a_forged_field_is_refused_and_named(field: str, value: object) -> None:
    text = sealed({**json.loads(MANIFEST.to_json()), field: value})
    with pytest.raises(ValueError, match=rf"^not a make-shards manifest \(.*{field}"):
        Manifest.from_json(text)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 10_000, "\x00", "\ufeff{}"])
def test_hostile_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Manifest.from_json(text)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["file", "samples", "source"]), inner),
)


@given(st.sampled_from(sorted(json.loads(MANIFEST.to_json()))), VALUES)
def test_whatever_is_forged_is_read_or_refused(field: str, value: object) -> None:
    with contextlib.suppress(ValueError):
        manifest = Manifest.from_json(sealed({**json.loads(MANIFEST.to_json()), field: value}))
        assert Manifest.from_json(manifest.to_json()).to_json() == manifest.to_json()


def test_a_million_samples_index_below_50_mb() -> None:
    assert RECORD.itemsize * 1_281_167 < 50e6


@given(st.integers(0, 10**9 - 1), st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=200))
def test_keys_fit_every_reader(number: int, name: str) -> None:
    key = make_sample_key(number, f"a.class/{name}")
    assert re.fullmatch(r"\d{9}-[A-Za-z0-9_-]{0,60}", key)
    assert int(key[:9]) == number


def test_key_keeps_the_stem_readable() -> None:
    assert make_sample_key(12, "n01/space in name \u00e9.v2.jpg") == "000000012-space_in_name___v2"
    assert make_shard_name("val", 3) == "val-000003.tar"


@given(st.integers(0, 5000), st.from_regex(r"[a-z0-9-]{1,75}\.jpg", fullmatch=True))
def test_header_is_ustar_that_tarfile_reads(size: int, name: str) -> None:
    data = make_tar_header(name, size) + bytes(size) + make_padding(size)
    assert len(data) == count_member_bytes(size)
    with tarfile.open(fileobj=io.BytesIO(data + bytes(1024))) as tar:
        (member,) = tar.getmembers()
        assert tar.pax_headers == {}
    assert (member.name, member.size, member.mtime, member.mode) == (name, size, 0, 0o644)
    assert (member.uid, member.gid, member.uname, member.gname) == (0, 0, "", "")
    assert data[257:265] == b"ustar\00000"
