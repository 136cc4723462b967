"""ShardIndex: what it reads, and what it refuses."""

import gc
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from shards import index as index_module
from shards.errors import UserError
from shards.index import BadSample, ShardIndex
from tests.shards.manifests import forge


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))


def test_reads_in_the_order_asked_for(packed: Path) -> None:
    with ShardIndex(packed) as index:
        everything = index.read(range(len(index)))
        ids = random.Random(0).choices(range(len(index)), k=60)
        assert index.read(ids) == [everything[id] for id in ids]
        assert index.read(np.array(ids)) == index.read(ids)
        assert index.read([]) == []


@pytest.mark.parametrize("id", [-1, 21])
def test_ids_out_of_range(packed: Path, id: int) -> None:
    with pytest.raises(IndexError, match="of 21"):
        ShardIndex(packed).read([id])


def open_tars() -> int:
    return sum(".tar" in os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if link(fd))


def link(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_files_are_opened_late_few_at_a_time_and_closed(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    monkeypatch.setattr(index_module, "_OPEN_FILES", 2)
    before = open_tars()
    with ShardIndex(packed) as index:
        assert open_tars() == before
        assert len(index.manifest.shards) > 2
        everything = index.read(range(len(index)))
        assert open_tars() == before + 2
        with ThreadPoolExecutor(8) as threads:
            ids = [random.Random(n).randrange(len(index)) for n in range(2000)]
            assert list(threads.map(lambda id: index.read([id])[0], ids)) == [everything[id] for id in ids]
    assert open_tars() == before
    assert index.read([3]) == [everything[3]]
    index.close()


def test_a_pickle_reads_the_same(packed: Path) -> None:
    index = ShardIndex(packed)
    index.read([0])
    again = pickle.loads(pickle.dumps(index))
    assert again.fingerprint == index.fingerprint
    assert again.read(range(5)) == index.read(range(5))


def test_fingerprint_knows_the_data_and_not_the_place(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "moved")
    assert ShardIndex(tmp_path / "moved").fingerprint == ShardIndex(packed).fingerprint


def test_damaged_bytes_are_named(packed: Path) -> None:
    index = ShardIndex(packed)
    record = index.records[4]
    shard = index.manifest.shards[record["shard"]].file
    flip(packed / shard, int(record["offset"]) + 7)
    assert index.read([3, 5])
    with pytest.raises(BadSample) as caught:
        index.read([3, 4, 5])
    bad = caught.value
    assert (bad.id, bad.shard, bad.key, bad.offset) == (4, shard, index.read_key(4), record["offset"])
    for part in (shard, index.read_key(4), str(record["offset"]), "crc32"):
        assert part in str(bad)
    assert "\n" not in str(bad)
    assert str(pickle.loads(pickle.dumps(bad))) == str(bad)
    assert index.describe(4) == f"{shard}, key {index.read_key(4)}, offset {record['offset']}"


def test_a_file_that_got_shorter_or_vanished_later(packed: Path) -> None:
    index = ShardIndex(packed)
    last = len(index) - 1
    path = packed / index.manifest.shards[-1].file
    os.truncate(path, int(index.records[last]["offset"]) + 10)
    with pytest.raises(BadSample, match=rf"{path.name}, key .*ends after 10 of"):
        index.read([last])
    index.close()
    path.unlink()
    with pytest.raises(UserError, match=rf"{path.name}: No such file or directory\. Check the storage"):
        index.read([last])


def test_a_damaged_header_leaves_the_image_readable(packed: Path) -> None:
    index = ShardIndex(packed)
    image = index.read([0])
    with (packed / index.manifest.shards[0].file).open("r+b") as file:
        file.write(bytes(100))
    assert index.read([0]) == image
    assert "key ?" in index.describe(0)
    with pytest.raises(BadSample, match="header unreadable"):
        index.read_key(0)


def remove_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def break_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 40)


def age_program(folder: Path) -> None:
    forge(folder, format_version=3)


def damage_index(folder: Path) -> None:
    flip(folder / "index.npy", 500)


def cut_index(folder: Path) -> None:
    os.truncate(folder / "index.npy", 200)


def remove_index(folder: Path) -> None:
    (folder / "index.npy").unlink()


def miscount(folder: Path) -> None:
    first, *others = json.loads((folder / "manifest.json").read_text())["shards"]
    forge(folder, samples=20, shards=[{**first, "samples": first["samples"] - 1}, *others])


def cut_shard(folder: Path) -> None:
    os.truncate(folder / "train-000001.tar", 1024)


def remove_shard(folder: Path) -> None:
    (folder / "train-000001.tar").unlink()


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (remove_folder, "packed: no such folder"),
        (remove_manifest, r"packed: .*no manifest\.json"),
        (break_manifest, r"manifest\.json: .*Pack again"),
        (age_program, r"manifest\.json: format version 3 is newer"),
        (damage_index, r"index\.npy does not belong to this manifest: its sha256 differs"),
        (cut_index, r"index\.npy does not belong to this manifest: its sha256 differs"),
        (remove_index, r"index\.npy: no such file"),
        (miscount, r"index\.npy does not belong to this manifest: it has not 20 records"),
        (cut_shard, r"train-000001\.tar: the file has 1024 bytes, the manifest says"),
        (remove_shard, r"train-000001\.tar: no such file"),
    ],
)
def test_refused_in_one_line(packed: Path, harm: Callable[[Path], None], complaint: str) -> None:
    harm(packed)
    with pytest.raises(UserError, match=complaint) as caught:
        ShardIndex(packed)
    assert "\n" not in str(caught.value)
