"""Batches are pure functions of (index, recipe, seed, step, rank), and bad samples are replaced and reported."""

import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.crops import CropRecipe
from pipelines.loader import Batch, DataRecipe, Loader, open_index
from pipelines.photometric import MEAN, STD, PhotometricRecipe
from shards.__main__ import main as make_shards
from shards.errors import UserError
from shards.index import ShardIndex
from tests.pipelines.conftest import write_images
from tests.shards.manifests import forge

CROPS = CropRecipe(global_size=48, local_size=32, locals=2)


def load(index: ShardIndex, start: int, stop: int, **changes) -> list[Batch]:
    return list(build(index, **changes).batches(start, stop))


def build(
    index: ShardIndex, *, batch: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32, rank: int = 0,
    world: int = 1, crops: CropRecipe = CROPS, **data,
) -> Loader:  # fmt: skip
    return Loader(
        index, DataRecipe(threads=2, **data), crops, PhotometricRecipe(), batch=batch, seed=seed,
        device=torch.device("cpu"), dtype=dtype, rank=rank, world=world,
    )  # fmt: skip


def is_same(one: Batch, other: Batch) -> bool:
    return (
        one.step == other.step
        and np.array_equal(one.ids, other.ids)
        and torch.equal(one.globals, other.globals)
        and torch.equal(one.locals, other.locals)
    )


def test_batches_are_normalized_by_the_recipe(index: ShardIndex):
    [plain], [told] = load(index, 0, 1), load(index, 0, 1, mean=(0.1, 0.5, 0.9), std=(0.05, 0.25, 1.5))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    new_mean, new_std = torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1), torch.tensor([0.05, 0.25, 1.5]).view(3, 1, 1)
    for ours, other in ((told.globals, plain.globals), (told.locals, plain.locals)):
        assert (ours - (other * std + mean - new_mean) / new_std).abs().max() < 1e-4


@pytest.mark.parametrize("decode", ["dali", "torch"])
@pytest.mark.parametrize("wrong", ["doubled", "swapped"])
def test_an_image_smaller_than_its_record_is_replaced_and_reported(index: ShardIndex, decode: str, wrong: str):
    heights, widths = index.heights.copy(), index.widths.copy()
    forged = np.arange(len(index)) % 3 == 0
    if wrong == "doubled":
        index.heights = np.where(forged, 2 * heights, heights)
    else:
        index.heights, index.widths = np.where(forged, widths, heights), np.where(forged, heights, widths)
    changed = forged & ((index.heights > heights) | (index.widths > widths))
    assert changed.any()
    loader = build(index, decode=decode, max_bad_samples=1000)
    batches = list(loader.batches(0, 3))
    assert all(batch.globals.isfinite().all() for batch in batches)
    assert loader.bad_samples
    assert all(changed[number] for number in loader.bad_samples)
    assert all("smaller than" in report or "out of bounds" in report for report in loader.bad_samples.values())


@pytest.mark.parametrize("decode", ["dali", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_have_their_shape_layout_and_dtype(index: ShardIndex, decode: str, dtype: torch.dtype):
    for number, batch in enumerate(load(index, 3, 6, decode=decode, dtype=dtype)):
        assert batch.step == 3 + number
        assert batch.ids.shape == (8,)
        assert batch.globals.shape == (16, 3, 48, 48)
        assert batch.locals.shape == (16, 3, 32, 32)
        for views in (batch.globals, batch.locals):
            assert views.dtype == dtype
            assert views.is_contiguous(memory_format=torch.channels_last)
            assert views.isfinite().all()
            assert 0.3 < views.float().std() < 3


@pytest.mark.parametrize(
    "data", [{"decode": "dali"}, {"decode": "torch"}, {"decode": "torch", "order": "shards", "shuffle_window": 2}]
)
def test_a_run_resumed_at_any_step_sees_the_same_batches(index: ShardIndex, data: dict):
    whole = load(index, 0, 12, **data)  # over two epochs' ends
    for start in (1, 5, 9):
        part = load(index, start, 12, prefetch=start, **data)
        assert all(is_same(one, other) for one, other in zip(whole[start:], part, strict=True))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("order", ["global", "shards"])
def test_the_union_of_the_ranks_is_the_global_batch(index: ShardIndex, world: int, order: str):
    whole = load(index, 4, 7, order=order, shuffle_window=2)
    shares = [load(index, 4, 7, rank=rank, world=world, order=order, shuffle_window=2) for rank in range(world)]
    for number, batch in enumerate(whole):
        parts = [share[number] for share in shares]
        assert np.array_equal(np.concatenate([part.ids for part in parts]), batch.ids)
        assert len(set(batch.ids.tolist())) == 8
        by_view = [part.globals.unflatten(0, (2, -1)) for part in parts]
        assert torch.equal(torch.cat(by_view, 1).flatten(0, 1), batch.globals)
        by_view = [part.locals.unflatten(0, (2, -1)) for part in parts]
        assert torch.equal(torch.cat(by_view, 1).flatten(0, 1), batch.locals)


def test_views_epochs_and_seeds_differ(index: ShardIndex):
    [first], [again], [other_seed] = load(index, 0, 1), load(index, 5, 6), load(index, 0, 1, seed=1)
    views = [*first.globals.split(8), *again.globals.split(8), *other_seed.globals.split(8)]
    flat = torch.cat(views).flatten(1)
    assert len(torch.unique(flat, dim=0)) == len(flat)


def test_dali_and_torch_differ_by_less_than_a_level(index: ShardIndex):
    plain = PhotometricRecipe(
        jitter=0, grayscale=0, blur_global_1=0, blur_global_2=0, blur_locals=0, solarize_global_2=0
    )
    batches = []
    for decode in ("dali", "torch"):
        data = DataRecipe(threads=2, decode=decode)
        loader = Loader(index, data, CROPS, plain, batch=16, seed=0, device=torch.device("cpu"), dtype=torch.float32)
        batches += list(loader.batches(0, 1))
    level = 1 / (255 * 0.226)
    assert (batches[0].globals - batches[1].globals).abs().mean() < 0.5 * level


def test_no_local_views(index: ShardIndex):
    [batch] = load(index, 0, 1, crops=CropRecipe(global_size=32, locals=0))
    assert batch.locals is None
    assert batch.globals.shape == (16, 3, 32, 32)


def damage_copy(shard_folder: Path, tmp_path: Path, ids: list[int], keep_crc: bool = False) -> Path:
    """Copy the shards, and overwrite the samples `ids` with zeros. Returns the copy's folder.

    Their crc32 is then wrong, or with `keep_crc` right, as if they had been packed like this.
    """
    import hashlib
    import json
    import zlib

    folder = tmp_path / "damaged"
    shutil.copytree(shard_folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    records = np.load(folder / "index.npy")
    for number in ids:
        record = records[number]
        path = folder / manifest["shards"][record["shard"]]["file"]
        data = bytearray(path.read_bytes())
        begin, size = int(record["offset"]), int(record["size"])
        data[begin : begin + size] = bytes(size)
        path.write_bytes(data)
        records[number]["crc32"] = zlib.crc32(bytes(size)) if keep_crc else record["crc32"]
    np.save(folder / "index.npy", records)
    forge(folder, index_sha256=hashlib.sha256((folder / "index.npy").read_bytes()).hexdigest())
    return folder


@pytest.mark.parametrize("decode", ["dali", "torch"])
@pytest.mark.parametrize("keep_crc", [False, True], ids=["bad-crc", "undecodable"])
def test_bad_samples_are_replaced_by_rule_and_reported(
    index: ShardIndex, shard_folder: Path, tmp_path: Path, decode: str, keep_crc: bool
):
    whole = load(index, 0, 5, decode=decode)
    bad = [int(whole[1].ids[2]), int(whole[1].ids[5]), int(whole[3].ids[0])]
    with ShardIndex(damage_copy(shard_folder, tmp_path, bad, keep_crc)) as damaged:
        loader = build(damaged, decode=decode)
        found = list(loader.batches(0, 5))
        again = load(damaged, 1, 2, decode=decode)
    assert set(loader.bad_samples) == set(bad)
    for number in bad:
        assert ".tar, key " in loader.bad_samples[number]
        assert "offset " in loader.bad_samples[number]
    assert is_same(found[1], again[0])
    for one, other in zip(whole, found, strict=True):
        replaced = np.isin(one.ids, bad)
        assert np.array_equal(one.ids[~replaced], other.ids[~replaced])
        assert not np.isin(other.ids, bad).any()
        keep = torch.from_numpy(~replaced)
        assert torch.equal(one.globals.unflatten(0, (2, 8))[:, keep], other.globals.unflatten(0, (2, 8))[:, keep])
        assert other.globals.isfinite().all()
    assert found[1].ids[2] == loader.order.substitute(1, 2, 1)


@pytest.mark.parametrize("batch", [8, 64])
def test_unchecked_images_are_validated_before_dali_may_crash_on_them(tmp_path: Path, batch: int):
    write_images(tmp_path / "images", per_class=24)
    for path in sorted(tmp_path.rglob("007.jpg")):
        path.write_bytes(path.read_bytes()[:-200])
    pack = ["pack", str(tmp_path / "images"), str(tmp_path / "shards"), "--check", "header", "--workers", "1"]
    assert make_shards(pack) == 0
    with ShardIndex(tmp_path / "shards") as index:
        loader = build(index, batch=batch, decode="dali")
        found = list(loader.batches(0, 72 // batch))
        assert not build(index, decode="torch").notes
    assert len(found) == 72 // batch
    assert 1 <= len(loader.bad_samples) <= 3
    assert all(
        "key 0000000" in report and "image file is truncated" in report for report in loader.bad_samples.values()
    )
    assert not np.isin(np.concatenate([one.ids for one in found]), list(loader.bad_samples)).any()
    assert "--check header" in loader.notes[0]


def test_too_many_bad_samples_stop_the_run(shard_folder: Path, tmp_path: Path):
    with ShardIndex(damage_copy(shard_folder, tmp_path, list(range(20)))) as damaged:
        loader = build(damaged, max_bad_samples=3)
        with pytest.raises(UserError, match=r"more than --data.max_bad_samples 3\. The last .*make-shards check"):
            list(loader.batches(0, 5))


def test_without_a_readable_sample_the_search_ends_with_an_error(shard_folder: Path, tmp_path: Path):
    with ShardIndex(damage_copy(shard_folder, tmp_path, list(range(42)))) as damaged:
        loader = build(damaged, batch=42, max_bad_samples=60)
        with pytest.raises(UserError, match="no readable sample was found"):
            list(loader.batches(0, 1))


@pytest.mark.parametrize("decode", ["dali", "torch"])
def test_missing_storage_is_an_error_and_not_a_bad_sample(shard_folder: Path, tmp_path: Path, decode: str):
    folder = shutil.copytree(shard_folder, tmp_path / "going")
    with ShardIndex(folder) as index:
        loader = build(index, decode=decode)
        for path in folder.glob("*.tar"):
            path.unlink()
        with pytest.raises(UserError, match="Check the storage"):
            list(loader.batches(0, 1))
        assert not loader.bad_samples


def test_a_gpu_decoder_needs_a_gpu(index: ShardIndex):
    with pytest.raises(UserError, match="needs a run on a GPU"):
        build(index, decode_device="gpu")


def test_wrong_batch_sizes_are_refused(index: ShardIndex):
    with pytest.raises(UserError, match="not a multiple of the 3 ranks"):
        build(index, batch=8, world=3)
    with pytest.raises(UserError, match=r"larger than .* \(42 samples\)"):
        build(index, batch=43)


def test_a_loader_left_early_leaves_no_threads(index: ShardIndex):
    before = threading.active_count()
    batches = build(index, decode="torch").batches(0, 1000)
    next(batches)
    batches.close()
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name in ("reading shards", "making batches")], names
    assert threading.active_count() <= before + 2  # the decoder's idle pool goes with its last reference


def test_figures_count_from_the_last_reading(index: ShardIndex):
    loader = build(index, decode="torch", prefetch=3)
    batches = loader.batches(0, 10)
    read = 0
    for _ in range(5):
        read += sum(int(index.records["size"][number]) for number in next(batches).ids)
    first = loader.read_figures()
    assert first.read_bytes >= read  # some is read ahead
    assert first.stall > 0  # the first batch had to be made
    assert 0 <= first.requests_ready <= 3
    assert 0 <= first.batches_ready <= 3
    list(batches)
    second = loader.read_figures()
    sizes = index.records["size"][np.concatenate([loader.order.ids(step) for step in range(10)])]
    assert first.read_bytes + second.read_bytes == sizes.sum()
    assert loader.read_figures().read_bytes == 0


def test_a_shard_that_is_damaged_while_it_is_read_is_replaced_and_reported(shard_folder: Path, tmp_path: Path):
    folder = shutil.copytree(shard_folder, tmp_path / "damaged-later")
    with ShardIndex(folder) as index:
        loader = build(index, decode="torch", prefetch=1)
        batches = loader.batches(0, 20)
        next(batches)
        path = folder / index.manifest.shards[0].file
        lost = np.flatnonzero(index.records["shard"] == 0)
        with path.open("r+b") as file:
            for number in lost:
                file.seek(int(index.records["offset"][number]))
                file.write(bytes(int(index.records["size"][number])))
        rest = list(batches)
    assert len(rest) == 19
    assert set(loader.bad_samples) == set(lost.tolist())
    assert not np.isin(np.concatenate([batch.ids for batch in rest[6:]]), lost).any()
    assert all(path.name in report and "crc32 differs" in report for report in loader.bad_samples.values())


@pytest.mark.parametrize("decode", ["dali", "torch"])
def test_a_stuck_read_is_an_error_within_the_time_limit(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch, decode: str
):
    release = threading.Event()
    monkeypatch.setattr(index, "read", lambda ids: release.wait() and [])
    batches = build(index, decode=decode, timeout=1).batches(0, 3)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"reading shards: nothing came for 1 s; is the storage stuck\?"):
        next(batches)
    assert time.monotonic() - start < 20
    release.set()


def test_shards_from_a_store_are_copied_and_give_the_same_batches(
    index: ShardIndex, shard_folder: Path, tmp_path: Path
):
    pytest.importorskip("fsspec")
    local = load(index, 0, 12, order="shards", shuffle_window=2, decode="torch")
    cache = tmp_path / "copies"
    data = DataRecipe(
        train=f"file://{shard_folder}", order="shards", shuffle_window=2, cache=str(cache), threads=2, decode="torch"
    )
    with open_index(data) as far:
        loader = Loader(
            far, data, CROPS, PhotometricRecipe(), batch=8, seed=0, device=torch.device("cpu"), dtype=torch.float32
        )
        assert all(is_same(one, other) for one, other in zip(local, loader.batches(0, 12), strict=True))
        assert not loader.notes
    assert list(cache.iterdir())


def test_single_samples_from_a_store_are_slow_and_noted(shard_folder: Path):
    pytest.importorskip("fsspec")
    with open_index(DataRecipe(train=f"file://{shard_folder}")) as far:
        loader = build(far, decode="torch")
        assert len(list(loader.batches(0, 2))) == 2
        assert any("--data.order shards" in note for note in loader.notes)


def test_closing_while_the_storage_is_stuck_does_not_take_long(index: ShardIndex, monkeypatch: pytest.MonkeyPatch):
    release, read = threading.Event(), index.read
    monkeypatch.setattr("pipelines.prefetch._JOIN_SECONDS", 0.5)
    monkeypatch.setattr(index, "read", lambda ids: read(ids) if not stuck.is_set() else release.wait() and [])
    stuck = threading.Event()
    batches = build(index, decode="torch", prefetch=1).batches(0, 1000)
    next(batches)
    stuck.set()
    time.sleep(1)  # both threads come to stand
    start = time.monotonic()
    batches.close()
    assert time.monotonic() - start < 20
    release.set()


def test_figures_start_again_with_a_second_run(index: ShardIndex):
    loader = build(index, decode="torch")
    for _ in range(2):
        list(loader.batches(0, 8))
        figures = loader.read_figures()
        assert figures.requests_ready >= 0
        assert figures.batches_ready >= 0
        assert figures.read_bytes > 0
