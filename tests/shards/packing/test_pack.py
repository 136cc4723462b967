"""Packing: the bytes that come out, what is left out, and that neither depends on the number of workers."""

import csv
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.errors import UserError
from shards.images.reencode import Changes
from shards.images.rules import ImageRules
from shards.index import ShardIndex
from shards.layout import RECORD
from shards.packing.plan import Options
from shards.sources.file_types import IMAGES
from tests.shards.packing_helpers import pack_tree

Contents = Callable[[Path], dict[str, bytes]]


def decodes(path: Path) -> bool:
    """Whether Pillow decodes every pixel, and the format is one that shards hold."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.format in ("JPEG", "MPO", "PNG", "WEBP")
    except (OSError, SyntaxError, ValueError):
        return False


def expectation(root: Path) -> tuple[dict[bytes, int], list[str]]:
    """Image bytes → label for what must be kept, and the sorted paths of what must not."""
    classes = sorted(path.name for path in root.iterdir() if path.is_dir())
    kept, out = {}, []
    for path in root.rglob("*"):
        if path.suffix.lower() in IMAGES and not path.name.startswith("."):
            relative = path.relative_to(root)
            if decodes(path):
                kept[path.read_bytes()] = classes.index(relative.parts[0])
            else:
                out.append(relative.as_posix())
    return kept, sorted(out)


def test_what_decodes_is_kept_and_the_rest_named(tree: Path, packed: Path) -> None:
    kept, rejected_names = expectation(tree)
    index = ShardIndex(packed)
    data = index.read(range(len(index)))
    assert dict(zip(data, index.labels.tolist(), strict=True)) == kept
    assert len(index) == len(kept) == 21
    manifest = ShardIndex(packed).manifest
    assert [entry.source for entry in manifest.rejected] == rejected_names
    reasons = {entry.source: entry.reason for entry in manifest.rejected}
    assert reasons["dog/empty.png"] == "empty file"
    assert reasons["dog/moving.gif"].startswith("GIF image")
    assert "ends too early" in reasons["cat/cut.jpg"]
    assert reasons["dog/text.JPEG"].startswith("not a JPEG, PNG or WebP image")
    assert (manifest.classes, manifest.ignored, manifest.samples) == (("cat", "dog"), 2, 21)
    assert len(manifest.shards) > 3


def test_heights_and_widths_are_the_images(packed: Path) -> None:
    index = ShardIndex(packed)
    tars = {shard.file: tarfile.open(packed / shard.file) for shard in index.manifest.shards}  # noqa: SIM115
    for id in range(len(index)):
        file, key, _ = index.describe(id).split(", ")
        (member,) = [m for m in tars[file] if m.name.startswith(key.removeprefix("key ")) and "cls" not in m.name]
        payload = tars[file].extractfile(member)
        assert payload is not None
        with Image.open(payload) as image:
            assert (image.height, image.width) == (index.heights[id], index.widths[id])
            assert member.name.endswith({"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}[image.format or ""])
    for tar in tars.values():
        tar.close()


def test_tars_are_plain_ustar(packed: Path) -> None:
    for path in packed.glob("*.tar"):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        assert {(member.mtime, member.uid, member.gid, member.mode) for member in members} == {(0, 0, 0, 0o644)}
        assert not any(member.pax_headers for member in members)
        images, labels = members[::2], members[1::2]
        assert [p.name.partition(".")[0] + ".cls" for p in images] == [c.name for c in labels]
        data = path.read_bytes()
        assert all(data[member.offset + 257 : member.offset + 265] == b"ustar\00000" for member in members)


def test_nothing_but_shards_index_manifest_and_lists_remains(packed: Path, contents: Contents) -> None:
    shards = {shard.file for shard in ShardIndex(packed).manifest.shards}
    assert set(contents(packed)) == shards | {"index.npy", "manifest.json", "rejected.csv", "duplicates.csv"}
    assert np.load(packed / "index.npy").dtype == RECORD


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_change_no_byte(tree: Path, packed: Path, tmp_path: Path, contents: Contents, workers: int) -> None:
    pack_tree(tree, tmp_path / "again", Options(seed=5, shard_size=12_000), workers)
    assert contents(tmp_path / "again") == contents(packed)


def test_the_seed_changes_the_order_only(tree: Path, packed: Path, tmp_path: Path) -> None:
    pack_tree(tree, tmp_path / "other", Options(seed=6, shard_size=12_000), 2)
    one, other = ShardIndex(packed), ShardIndex(tmp_path / "other")
    data, other_data = one.read(range(len(one))), other.read(range(len(other)))
    assert data != other_data
    assert sorted(data) == sorted(other_data)
    assert one.fingerprint != other.fingerprint


def test_flat_folder_has_no_label_members(tree: Path, tmp_path: Path) -> None:
    pack_tree(tree / "cat" / "deep", tmp_path / "out", Options(name="val"), 1)
    index = ShardIndex(tmp_path / "out")
    assert index.labels.tolist() == [-1] * 10
    assert index.classes == ()
    with tarfile.open(tmp_path / "out" / "val-000000.tar") as tar:
        assert sorted({name.partition(".")[2] for name in tar.getnames()}) == ["jpg", "png", "webp"]


def test_a_shard_that_came_out_empty_goes(tmp_path: Path) -> None:
    """DALI's own reader would count a sample in it."""
    (tmp_path / "src").mkdir()
    for number in range(5):
        (tmp_path / "src" / f"{number}.jpg").write_bytes(b"no image")
    for number in (5, 6):
        Image.new("RGB", (4, number)).save(tmp_path / "src" / f"{number}.png")
    packed = pack_tree(tmp_path / "src", tmp_path / "out", Options(shard_size=1))
    assert [shard.samples for shard in packed.manifest.shards] == [1, 1]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == [s.file for s in packed.manifest.shards]
    index = ShardIndex(tmp_path / "out")
    images = {(tmp_path / "src" / f"{number}.png").read_bytes() for number in (5, 6)}
    assert set(index.read([0, 1])) == images
    assert pack_tree(tmp_path / "src", tmp_path / "out", Options(shard_size=1)).was_complete


def test_nothing_decodes(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "1.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"none of 1 images can be decoded \(1\.jpg: not a JPEG"):
        pack_tree(tmp_path / "src", tmp_path / "out", Options(), 1)
    assert list((tmp_path / "out").iterdir()) == []


def test_manifest_names_no_place_time_or_machine(packed: Path, tmp_path: Path) -> None:
    fields = json.loads((packed / "manifest.json").read_text())
    assert str(tmp_path) not in json.dumps(fields)
    assert fields["options"] == {
        "format": "folders",
        "seed": 5,
        "shard_size": 12_000,
        "check": "full",
        "max_pixels": 2**27,
        "image_seconds": 30.0,
        "max_short_side": None,
        "quality": 92,
    }


def test_progress_ends_at_all_images(tree: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    pack_tree(tree, tmp_path / "out", Options(shard_size=12_000), 2, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (25, 25)
    assert seen == sorted(seen)


def test_awkward_images(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "awkward"
    pack_tree(source, tmp_path / "out", Options(), 2)
    kept, rejected_names = expectation(source)
    index = ShardIndex(tmp_path / "out")
    data = index.read(range(len(index)))
    assert set(data) == set(kept)
    assert len(data) == 43 - len(rejected_names)  # some of them are equal
    assert [entry.source for entry in index.manifest.rejected] == rejected_names
    told = json.loads((source / "made" / "manifest.json").read_text())
    for name, about in told.items():
        if about["decodable"] is not None:
            assert about["decodable"] == (f"made/{name}" not in rejected_names)


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_the_list_of_rejected_images_is_the_manifests(packed: Path) -> None:
    manifest = ShardIndex(packed).manifest
    assert rows(packed / "rejected.csv") == [
        ["image", "reason"],
        *([entry.source, entry.reason] for entry in manifest.rejected),
    ]
    assert len(manifest.rejected) == 4


def test_duplicates_are_counted_named_and_kept(tmp_path: Path, make_class_folders: Callable[..., Path]) -> None:
    source = make_class_folders(classes=2, per_class=6)
    original = (source / "class_0" / "0000.jpg").read_bytes()
    names = ["class_1/again.jpg", 'class_0/and, "again"\n.jpg', os.fsdecode(b"class_0/\xff.jpg")]
    for name in names:
        (source / name).write_bytes(original)
    for number in range(2):
        (source / "class_0" / f"broken{number}.jpg").write_bytes(b"equal, but left out")
    manifest = pack_tree(source, tmp_path / "out", Options(shard_size=9_000)).manifest
    head, *listed = rows(tmp_path / "out" / "duplicates.csv")
    assert head == ["image", "same_bytes_as"]
    assert manifest.duplicates == len(listed) == 3
    assert manifest.samples == 15
    group = {"class_0/0000.jpg", *names[:2], "class_0/\\udcff.jpg"}
    (first,) = {same for _, same in listed}
    assert {first, *(image for image, _ in listed)} == group


def test_without_duplicates_the_list_is_empty(packed: Path) -> None:
    assert rows(packed / "duplicates.csv") == [["image", "same_bytes_as"]]
    assert ShardIndex(packed).manifest.duplicates == 0


def test_headers_alone_find_the_same_sizes(tree: Path, packed: Path, tmp_path: Path) -> None:
    options = Options(seed=5, shard_size=12_000, rules=ImageRules(check="header"))
    manifest = pack_tree(tree, tmp_path / "out", options).manifest
    assert {entry.source for entry in manifest.rejected} >= {"dog/empty.png", "dog/moving.gif", "dog/text.JPEG"}
    trusted, judged = ShardIndex(tmp_path / "out"), ShardIndex(packed)
    sizes = [
        dict(zip(i.read(range(len(i))), zip(i.heights, i.widths, strict=True), strict=True)) for i in (trusted, judged)
    ]
    assert len(sizes[1]) == 21
    assert sizes[1].items() <= sizes[0].items()


def test_images_beyond_the_pixel_limit_are_rejected(tree: Path, tmp_path: Path) -> None:
    manifest = pack_tree(tree, tmp_path / "out", Options(rules=ImageRules(max_pixels=600))).manifest
    reasons = [entry.reason for entry in manifest.rejected if "--max-pixels" in entry.reason]
    index = ShardIndex(tmp_path / "out")
    assert len(reasons) == 21 - len(index) > 0
    assert int((index.heights.astype(int) * index.widths).max()) <= 600


def test_large_images_are_re_encoded_when_told(tree: Path, packed: Path, tmp_path: Path) -> None:
    manifest = pack_tree(tree, tmp_path / "out", Options(changes=Changes(max_short_side=22, quality=80))).manifest
    assert (manifest.options["max_short_side"], manifest.options["quality"]) == (22, 80)
    index, untouched = ShardIndex(tmp_path / "out"), ShardIndex(packed)
    assert int(np.minimum(index.heights, index.widths).max()) == 22
    before = dict(zip(untouched.read(range(21)), np.minimum(untouched.heights, untouched.widths).tolist(), strict=True))
    after = index.read(range(len(index)))
    assert len(after) == 21
    assert {data for data, side in before.items() if side <= 22} == set(before) & set(after)
    for data, height, width in zip(after, index.heights, index.widths, strict=True):
        with Image.open(io.BytesIO(data)) as image:
            assert (image.height, image.width) == (height, width)
            assert data in before or (image.format == "JPEG" and min(image.size) == 22)
