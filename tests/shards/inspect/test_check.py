"""make-shards check finds what was damaged, and names it."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.errors import UserError
from shards.images.rules import ImageRules
from shards.index import ShardIndex
from shards.inspect.check import check
from shards.packing.plan import Options
from tests.shards.manifests import forge
from tests.shards.packing_helpers import pack_tree


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def rehash(folder: Path) -> None:
    """Make the manifest agree with index and tars as they are now, so that only a real look finds the lie."""
    fields = json.loads((folder / "manifest.json").read_text())
    for shard in fields["shards"]:
        data = (folder / shard["file"]).read_bytes()
        shard.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    index_sha256 = hashlib.sha256((folder / "index.npy").read_bytes()).hexdigest()
    forge(folder, shards=fields["shards"], index_sha256=index_sha256)


def place(folder: Path, id: int) -> tuple[Path, int, int, str]:
    """Path of the tar, offset, size, and how a report begins that is about this sample."""
    index = ShardIndex(folder)
    record = index.records[id]
    path = folder / index.manifest.shards[record["shard"]].file
    return path, int(record["offset"]), int(record["size"]), f"{index.describe(id)}: "


def test_a_sound_folder(packed: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = check(packed, 2, lambda done, total: seen.append((done, total)))
    assert report.problems == ()
    assert (report.images, report.shards) == (21, len(ShardIndex(packed).manifest.shards))
    assert report.bytes == sum(path.stat().st_size for path in packed.glob("*.tar"))
    assert seen[-1] == (21, 21)


def test_every_byte_counts(packed: Path) -> None:
    """One wrong byte anywhere in a shard is found, and put down to the sample it belongs to."""
    path, offset, size, where = place(packed, 0)
    whole = path.read_bytes()
    label = offset + size + -size % 512
    spots = {
        offset - 512: "tar header",
        offset - 300: "tar header",
        offset: "crc32",
        offset + size - 1: "crc32",
        label - 1: "padding",
        label: "label",
        label + 512: "label",
        label + 900: "label",
    }
    for spot, what in spots.items():
        overwrite(path, spot, bytes([whole[spot] ^ 1]))
        problems = check(packed, 1).problems
        assert problems[-1] == f"{path.name}: sha256 differs from the manifest's"
        assert len(problems) == 2
        assert what in problems[0]
        if what != "tar header":
            assert problems[0].startswith(where)
        else:
            assert f"offset {offset}" in problems[0]
        overwrite(path, spot, whole[spot : spot + 1])
    assert check(packed, 1).problems == ()


def test_an_image_that_no_longer_decodes_but_whose_sums_are_right(packed: Path) -> None:
    import zlib

    path, offset, size, where = place(packed, 2)
    overwrite(path, offset, bytes(size))
    records = np.load(packed / "index.npy")
    records["crc32"][2] = zlib.crc32(bytes(size))
    np.save(packed / "index.npy", records)
    rehash(packed)
    (problem,) = check(packed, 2).problems
    assert problem.startswith(where + "the image cannot be decoded (")


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("height", 999, "x 999"),
        ("width", 999, "the index says 999 x"),
        ("crc32", 0, "crc32 differs"),
        ("size", 3, "crc32 differs"),
    ],
)
def test_an_index_that_lies(packed: Path, field: str, value: int, complaint: str) -> None:
    _, _, _, where = place(packed, 1)
    records = np.load(packed / "index.npy")
    records[field][1] = value
    np.save(packed / "index.npy", records)
    rehash(packed)
    about = [problem for problem in check(packed, 2).problems if complaint in problem]
    assert about
    assert any(problem.split(", ")[0] == where.split(", ")[0] for problem in about)


@pytest.mark.parametrize("label", [1000, -5])
def test_a_label_without_a_class_makes_the_index_useless(packed: Path, label: int) -> None:
    records = np.load(packed / "index.npy")
    records["label"][1] = label
    np.save(packed / "index.npy", records)
    rehash(packed)
    (problem,) = check(packed, 2).problems
    assert f"sample 1 has label {label}, which packing never writes" in problem
    assert problem.endswith("(Without the index, only the hashes of the shards are checked.)")


def test_members_that_the_index_does_not_know(packed: Path) -> None:
    """A record less in the index: the tar then holds a sample nobody would ever read."""
    records = np.load(packed / "index.npy")
    fields = json.loads((packed / "manifest.json").read_text())
    for gone, complaint in (
        (1, "the tar holds data at offset"),
        (fields["shards"][0]["samples"] - 1, "data follow that are not in the index"),
    ):
        np.save(packed / "index.npy", np.delete(records, gone))
        first, *others = fields["shards"]
        forge(packed, samples=20, shards=[{**first, "samples": first["samples"] - 1}, *others])
        rehash(packed)
        (problem,) = check(packed, 2).problems
        assert complaint in problem
        assert fields["shards"][0]["file"] in problem


def test_foreign_cut_and_missing_shards(packed: Path) -> None:
    names = [shard.file for shard in ShardIndex(packed).manifest.shards]
    (packed / "train-000099.tar").write_bytes(bytes(1024))
    os.truncate(packed / names[0], 700)
    (packed / names[1]).unlink()
    problems = check(packed, 2).problems
    assert "train-000099.tar: a tar that the manifest does not list" in problems
    assert any(problem.startswith(f"{names[0]}: the file has 700 bytes, the manifest says") for problem in problems)
    assert any(problem.startswith(names[0]) and "ends after" in problem for problem in problems)
    assert f"{names[1]}: no such file" in problems


def test_a_stale_index_leaves_the_hashes_to_check(packed: Path) -> None:
    path, offset, _, _ = place(packed, 3)
    overwrite(packed / "index.npy", 400, b"\xff\xfe\xfd\xfc")
    overwrite(path, offset, b"\0\0\0")
    first, second = check(packed, 2).problems
    assert "index.npy does not belong to this manifest" in first
    assert second == f"{path.name}: sha256 differs from the manifest's"


@pytest.mark.parametrize(
    ("was", "is_now"),
    [
        ('"cat"', '"cau"'),
        ('"foreign": false', '"foreign": true'),
        ('"samples": 21', '"samples": -1'),
        ('"ignored": 2', '"ignored": "2"'),
        ('"seed": 5', '"seed": 4'),
    ],
)
def test_a_damaged_manifest(packed: Path, was: str, is_now: str) -> None:
    manifest = packed / "manifest.json"
    text = manifest.read_text()
    assert was in text
    manifest.write_text(text.replace(was, is_now))
    with pytest.raises(UserError, match=r"manifest\.json: .*damaged or was edited by hand\. Pack again"):
        check(packed, 1)


@pytest.mark.parametrize("name", ["rejected.csv", "duplicates.csv"])
def test_the_lists_for_people_count(packed: Path, name: str) -> None:
    with (packed / name).open("a") as file:
        file.write("more")
    assert check(packed, 1).problems == (f"{name}: sha256 differs from the manifest's",)
    (packed / name).unlink()
    assert check(packed, 1).problems == (f"{name}: no such file",)


def test_images_are_judged_by_what_they_were_packed_by(tree: Path, tmp_path: Path) -> None:
    Image.new("RGB", (5000, 5000)).save(tree / "cat" / "large.png")  # takes 0.1 s and more
    judge = ImageRules(max_pixels=25_000_000, image_seconds=1234.5)
    pack_tree(tree, tmp_path / "out", Options(rules=judge))
    assert check(tmp_path / "out", 1).problems == ()
    forge(tmp_path / "out", options={"max_pixels": 25_000_000, "image_seconds": 0.02})
    (problem,) = check(tmp_path / "out", 1).problems
    assert problem.endswith("takes more than 0.02 s of CPU time (--image-seconds))")
