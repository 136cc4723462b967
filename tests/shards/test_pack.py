"""Packing: the bytes that come out, what is left out, and that neither depends on the number of workers."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.errors import UserError
from shards.index import ShardIndex
from shards.layout import RECORD, load_manifest
from shards.pack import Options, pack
from shards.sources import CANDIDATES, scan

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
    """Picture bytes → label for what must be kept, and the sorted paths of what must not."""
    classes = sorted(path.name for path in root.iterdir() if path.is_dir())
    kept, out = {}, []
    for path in root.rglob("*"):
        if path.suffix.lower() in CANDIDATES and not path.name.startswith("."):
            relative = path.relative_to(root)
            if decodes(path):
                kept[path.read_bytes()] = classes.index(relative.parts[0])
            else:
                out.append(relative.as_posix())
    return kept, sorted(out)


def test_what_decodes_is_kept_and_the_rest_named(tree: Path, packed: Path) -> None:
    kept, left_out = expectation(tree)
    index = ShardIndex(packed)
    data = index.read(range(len(index)))
    assert dict(zip(data, index.labels.tolist(), strict=True)) == kept
    assert len(index) == len(kept) == 21
    manifest = load_manifest(packed)
    assert [entry.source for entry in manifest.rejected] == left_out
    reasons = {entry.source: entry.reason for entry in manifest.rejected}
    assert reasons["dog/empty.png"] == "empty file"
    assert reasons["dog/moving.gif"].startswith("GIF picture")
    assert "truncated" in reasons["cat/cut.jpg"].lower()
    assert reasons["dog/text.JPEG"].startswith("no JPEG, PNG or WebP picture")
    assert (manifest.classes, manifest.ignored, manifest.samples) == (("cat", "dog"), 2, 21)
    assert len(manifest.shards) > 3


def test_heights_and_widths_are_the_pictures(packed: Path) -> None:
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
        pictures, labels = members[::2], members[1::2]
        assert [p.name.partition(".")[0] + ".cls" for p in pictures] == [c.name for c in labels]
        data = path.read_bytes()
        assert all(data[member.offset + 257 : member.offset + 265] == b"ustar\00000" for member in members)


def test_nothing_but_shards_index_and_manifest_remains(packed: Path, contents: Contents) -> None:
    shards = {shard.file for shard in load_manifest(packed).shards}
    assert set(contents(packed)) == shards | {"index.npy", "manifest.json"}
    assert np.load(packed / "index.npy").dtype == RECORD


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_change_no_byte(tree: Path, packed: Path, tmp_path: Path, contents: Contents, workers: int) -> None:
    pack(scan(tree), tmp_path / "again", Options(seed=5, shard_size=12_000), workers)
    assert contents(tmp_path / "again") == contents(packed)


def test_the_seed_changes_the_order_only(tree: Path, packed: Path, tmp_path: Path) -> None:
    pack(scan(tree), tmp_path / "other", Options(seed=6, shard_size=12_000), 2)
    one, other = ShardIndex(packed), ShardIndex(tmp_path / "other")
    data, other_data = one.read(range(len(one))), other.read(range(len(other)))
    assert data != other_data
    assert sorted(data) == sorted(other_data)
    assert one.fingerprint != other.fingerprint


def test_flat_folder_has_no_label_members(tree: Path, tmp_path: Path) -> None:
    pack(scan(tree / "cat" / "deep"), tmp_path / "out", Options(name="val"), 1)
    index = ShardIndex(tmp_path / "out")
    assert index.labels.tolist() == [-1] * 10
    assert index.classes == ()
    with tarfile.open(tmp_path / "out" / "val-000000.tar") as tar:
        assert sorted({name.partition(".")[2] for name in tar.getnames()}) == ["jpg", "png", "webp"]


def test_a_shard_may_come_out_empty(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for number in range(5):
        (tmp_path / "src" / f"{number}.jpg").write_bytes(b"no picture")
    Image.new("RGB", (4, 4)).save(tmp_path / "src" / "5.png")
    packed = pack(scan(tmp_path / "src"), tmp_path / "out", Options(shard_size=1), 2)
    assert sorted(shard.samples for shard in packed.manifest.shards) == [0, 0, 0, 0, 0, 1]
    index = ShardIndex(tmp_path / "out")
    assert index.read([0]) == [(tmp_path / "src" / "5.png").read_bytes()]
    for shard in packed.manifest.shards:
        with tarfile.open(tmp_path / "out" / shard.file) as tar:
            assert len(tar.getmembers()) == shard.samples


def test_nothing_decodes(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "1.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"not one of 1 pictures decodes \(1\.jpg: no JPEG"):
        pack(scan(tmp_path / "src"), tmp_path / "out", Options(), 1)
    assert list((tmp_path / "out").iterdir()) == []


def test_manifest_names_no_place_time_or_machine(packed: Path, tmp_path: Path) -> None:
    fields = json.loads((packed / "manifest.json").read_text())
    assert str(tmp_path) not in json.dumps(fields)
    assert fields["options"] == {"format": "folders", "seed": 5, "shard_size": 12_000}


def test_progress_ends_at_all_pictures(tree: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    pack(scan(tree), tmp_path / "out", Options(shard_size=12_000), 2, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (25, 25)
    assert seen == sorted(seen)


def test_awkward_pictures(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "awkward"
    pack(scan(source), tmp_path / "out", Options(), 2)
    kept, left_out = expectation(source)
    index = ShardIndex(tmp_path / "out")
    data = index.read(range(len(index)))
    assert set(data) == set(kept)
    assert len(data) == 43 - len(left_out)  # some of them are equal
    assert [entry.source for entry in index.manifest.rejected] == left_out
    told = json.loads((source / "made" / "manifest.json").read_text())
    for name, about in told.items():
        if about["decodable"] is not None:
            assert about["decodable"] == (f"made/{name}" not in left_out)
