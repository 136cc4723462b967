"""ShardCache: verified copies within a limit, shared by processes that may die at any time; ShardIndex over stores."""

import errno
import fcntl
import hashlib
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from shards.cache import page_cache as page_cache_module
from shards.cache import shard_cache as cache_module
from shards.cache.interface import Outcome
from shards.cache.page_cache import PageCache, read_ahead
from shards.cache.shard_cache import ShardCache
from shards.errors import UserError
from shards.index import BadSample, ShardIndex
from shards.manifest import Shard
from shards.storage import remote
from shards.storage.local_folder import LocalFolder
from tests.shards.manifests import forge
from tests.shards.s3 import Server, s3_server

ROOT = Path(__file__).resolve().parents[2]
SIZE = 10_000  # bytes, of each shard here
SHARDS = 6


@dataclass(frozen=True)
class Watched(LocalFolder):
    """Writes down what is opened, for all processes."""

    log: str

    def open(self, name: str) -> BinaryIO:
        with open(self.log, "a") as log:
            log.write(f"{name}\n")
        return super().open(name)


@dataclass(frozen=True)
class Storage:
    """A folder of shards that hold anything."""

    folder: Watched
    shards: list[Shard]

    def data(self, number: int) -> bytes:
        return Path(self.folder.path, self.shards[number].file).read_bytes()

    def fetched(self) -> list[int]:
        """The shards that were downloaded, in that order."""
        log = Path(self.folder.log)
        names = log.read_text().split() if log.exists() else []
        return [[shard.file for shard in self.shards].index(name) for name in names]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return made_storage(tmp_path)


def made_storage(place: Path) -> Storage:
    """The same in every process."""
    (place / "there").mkdir(exist_ok=True)
    shards = []
    for number in range(SHARDS):
        data = np.random.default_rng(number).bytes(SIZE)
        path = place / "there" / f"t-{number}.tar"
        if not path.exists():
            path.write_bytes(data)
        shards.append(Shard(path.name, 3, SIZE, hashlib.sha256(data).hexdigest()))
    return Storage(Watched(str(place / "there"), str(place / "log")), shards)


@pytest.fixture
def open_cache(storage: Storage, tmp_path: Path) -> Iterator[Callable[..., ShardCache]]:
    """Makes caches over one directory with room for so many shards."""
    made = []

    def make(room: int = 3) -> ShardCache:
        made.append(ShardCache(storage.folder, storage.shards, tmp_path / "cache", room * SIZE))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def used(cache: ShardCache) -> int:
    return sum(path.stat().st_size for path in cache.directory.iterdir())


def copy_of(cache: ShardCache, storage: Storage, number: int) -> Path:
    return cache.directory / f"{storage.shards[number].sha256}.tar"


def present(cache: ShardCache, storage: Storage) -> set[int]:
    return {number for number in range(SHARDS) if copy_of(cache, storage, number).exists()}


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_PAUSE", 0.01)


# One process


def test_what_is_fetched_has_the_bytes_of_the_storage_and_is_fetched_once(
    storage: Storage, open_cache: Callable[..., ShardCache]
) -> None:
    cache = open_cache()
    for number in (2, 0, 2):
        cache.fetch(number)
        assert cache.read(number, 0, SIZE + 5) == storage.data(number)
        assert cache.read(number, 100, 7) == storage.data(number)[100:107]
    assert storage.fetched() == [2, 0]
    assert not list(cache.directory.glob("*.part"))


def test_the_limit_holds_and_what_was_released_first_goes_first(
    storage: Storage, open_cache: Callable[..., ShardCache]
) -> None:
    cache = open_cache(3)
    for number in (0, 1, 2):
        cache.fetch(number)
    assert cache.acquire(3) is Outcome.FULL
    assert present(cache, storage) == {0, 1, 2}
    for number in (1, 0):
        cache.release(number)
        time.sleep(0.02)  # the clock of the file system ticks
    assert present(cache, storage) == {0, 1, 2}  # there is room for them yet
    cache.fetch(3)
    assert present(cache, storage) == {0, 2, 3}
    cache.fetch(0)
    assert storage.fetched() == [0, 1, 2, 3]
    assert used(cache) <= 3 * SIZE


def test_all_shards_pass_through_a_small_cache(storage: Storage, open_cache: Callable[..., ShardCache]) -> None:
    cache = open_cache(2)
    for number in range(SHARDS):
        cache.fetch(number)
        assert used(cache) <= 2 * SIZE
        assert cache.read(number, 0, SIZE) == storage.data(number)
        cache.release(number)


def test_a_read_of_what_is_not_held_fetches_it_and_holds_nothing(
    storage: Storage, open_cache: Callable[..., ShardCache]
) -> None:
    cache = open_cache(2)
    numbers = np.random.default_rng(0).integers(0, SHARDS, 40).tolist()
    for number in numbers:
        assert cache.read(number, 5, 50) == storage.data(number)[5:55]
        assert used(cache) <= 2 * SIZE
    cache.fetch(0)
    cache.fetch(1)  # so nothing else is held


def test_a_read_goes_on_while_its_shard_is_removed(storage: Storage, open_cache: Callable[..., ShardCache]) -> None:
    cache = open_cache(2)

    def read(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, SHARDS, 60).tolist():
            cache.fetch(number)
            assert cache.read(number, 1, SIZE) == storage.data(number)[1:]
            cache.release(number)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(read, range(4)))
    assert used(cache) <= 2 * SIZE


def test_a_shard_that_is_larger_than_the_limit_is_refused(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 shards.*10000 bytes, more than --data\.cache_bytes 9999"):
        ShardCache(storage.folder, storage.shards, tmp_path / "cache", SIZE - 1)


def test_waiting_for_room_ends_with_one_line(storage: Storage, open_cache: Callable[..., ShardCache]) -> None:
    cache, other = open_cache(2), open_cache(2)
    cache.fetch(0)
    cache.fetch(1)
    with pytest.raises(UserError, match=r"t-2\.tar: no room.*Raise --data\.cache_bytes.*lower --data\.shuffle_window"):
        other.fetch(2, timeout=0.1)
    releasing = threading.Timer(0.2, cache.release, [0])
    releasing.start()
    other.fetch(2, timeout=30)
    releasing.join()
    assert present(cache, storage) == {1, 2}


def test_damaged_in_the_storage_is_tried_twice_and_named(
    storage: Storage, open_cache: Callable[..., ShardCache]
) -> None:
    cache = open_cache()
    path = Path(storage.folder.path, "t-1.tar")
    for harm in (b"x" + storage.data(1)[1:], storage.data(1)[:-1], storage.data(1) + b"x", b""):
        path.write_bytes(harm)
        before = len(storage.fetched())
        with pytest.raises(UserError, match=r"t-1\.tar: twice not the bytes .* Run 'make-shards check"):
            cache.fetch(1)
        assert storage.fetched()[before:] == [1, 1]
    path.unlink()
    with pytest.raises(UserError, match=r"t-1\.tar: no such file\. Put it back"):
        cache.fetch(1)
    assert used(cache) == 0


def test_damage_on_the_way_is_mended_by_the_second_attempt(
    storage: Storage, open_cache: Callable[..., ShardCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, opened = open_cache(), Watched.open

    def damage_once(folder: Watched, name: str) -> BinaryIO:
        file = opened(folder, name)
        if len(storage.fetched()) == 1:
            file.seek(1)
        return file

    monkeypatch.setattr(Watched, "open", damage_once)
    cache.fetch(4)
    assert cache.read(4, 0, SIZE) == storage.data(4)
    assert storage.fetched() == [4, 4]


def test_a_full_disk_is_one_line_and_leaves_nothing(
    storage: Storage, open_cache: Callable[..., ShardCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache()

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(
        UserError,
        match=r"cache: No space left on device\. Make it writable or free some space there, lower --data\.cache",
    ):
        cache.fetch(0)
    assert storage.fetched() == [0]  # trying again would not help
    assert used(cache) == 0


def test_a_directory_that_cannot_be(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/cache: Not a directory\. .*--data\.cache"):
        ShardCache(storage.folder, storage.shards, tmp_path / "file" / "cache")


def test_the_lock_of_the_folder_is_waited_for_so_long(
    open_cache: Callable[..., ShardCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache()
    monkeypatch.setattr(cache_module, "_TIMEOUT", 0.05)
    with (cache.directory / ".lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"\.lock: locked by another process"):
            cache.fetch(0)
    cache.fetch(0)


def test_other_files_in_the_directory_are_let_be(storage: Storage, open_cache: Callable[..., ShardCache]) -> None:
    cache = open_cache(1)
    (cache.directory / "thesis.tar").write_bytes(bytes(5 * SIZE))
    for number in (0, 1):
        cache.fetch(number)
        cache.release(number)
    assert (cache.directory / "thesis.tar").stat().st_size == 5 * SIZE


def test_a_pickle_reads_the_same_and_holds_nothing(storage: Storage, open_cache: Callable[..., ShardCache]) -> None:
    cache = open_cache()
    cache.fetch(0)
    again = pickle.loads(pickle.dumps(cache))
    assert (again.directory, again.limit) == (cache.directory, cache.limit)
    assert again.read(0, 0, SIZE) == storage.data(0)
    assert storage.fetched() == [0]


# Leftovers


def test_leftovers_that_verify_are_reused_and_others_fetched_anew(
    storage: Storage, open_cache: Callable[..., ShardCache]
) -> None:
    cache = open_cache()
    for number in (0, 1, 2):
        cache.fetch(number)
    cache.close()
    copy_of(cache, storage, 1).write_bytes(bytes(SIZE))
    copy_of(cache, storage, 2).write_bytes(storage.data(2)[:-1])
    for taker in (cache, open_cache()):  # the one that found it right before, and one that did not
        for number in (0, 1, 2):
            taker.fetch(number)
            assert taker.read(number, 0, SIZE) == storage.data(number)
        taker.close()
    assert storage.fetched() == [0, 1, 2, 1, 2]


def test_an_unfinished_download_of_nobody_takes_no_room(
    storage: Storage, open_cache: Callable[..., ShardCache]
) -> None:
    cache = open_cache(1)
    for left in (0, 1):  # of the very shard that is fetched, and of another
        part = cache.directory / f"{storage.shards[left].sha256}.part"
        part.write_bytes(bytes(SIZE))
        cache.fetch(2 * left)
        cache.release(2 * left)
        assert used(cache) == SIZE


# Several processes

_HOLDER = """
import sys
from pathlib import Path
from tests.shards.test_cache import SIZE, Watched, made_storage
from shards.cache.shard_cache import ShardCache
place, room, numbers = Path(sys.argv[1]), int(sys.argv[2]), [int(number) for number in sys.argv[3:]]
storage = made_storage(place)
cache = ShardCache(storage.folder, storage.shards, place / "cache", room * SIZE)
if numbers[0] < 0:  # stop in the middle of a download
    def stuck(folder, name):
        print("there", flush=True)
        sys.stdin.read()
    Watched.open = stuck
    cache.fetch(-numbers[0])
for number in numbers:
    cache.fetch(number)
    assert cache.read(number, 0, SIZE) == storage.data(number)
print("there", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a process that fetches shards (-3: stops while it fetches shard 3) and holds them until its stdin ends."""
    started = []

    def start(room: int, *numbers: int) -> subprocess.Popen[str]:
        call = [sys.executable, "-c", _HOLDER, str(tmp_path), str(room), *map(str, numbers)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started.append(subprocess.Popen(call, cwd=ROOT, text=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def is_there(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"


def killed(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_processes_fetch_each_shard_once_between_them(
    storage: Storage, holder: Callable[..., subprocess.Popen[str]]
) -> None:
    several = [holder(6, *range(SHARDS)) for _ in range(3)]
    for process in several:
        is_there(process)
    assert sorted(storage.fetched()) == list(range(SHARDS))


def test_what_another_process_holds_stays_until_it_is_killed(
    storage: Storage, open_cache: Callable[..., ShardCache], holder: Callable[..., subprocess.Popen[str]]
) -> None:
    process = holder(2, 0, 1)
    is_there(process)
    cache = open_cache(2)
    assert cache.acquire(2) is Outcome.FULL
    assert cache.acquire(0) is Outcome.HELD
    cache.release(0)
    assert cache.acquire(2) is Outcome.FULL
    killed(process)
    cache.fetch(1, timeout=1)
    cache.fetch(2, timeout=1)
    assert present(cache, storage) == {1, 2}
    assert storage.fetched() == [0, 1, 2]


def test_a_process_killed_in_the_middle_of_a_download_leaves_it_to_others(
    storage: Storage, open_cache: Callable[..., ShardCache], holder: Callable[..., subprocess.Popen[str]]
) -> None:
    process = holder(1, -3)
    is_there(process)
    cache = open_cache(1)
    assert cache.acquire(3) is Outcome.BUSY
    assert cache.acquire(4) is Outcome.FULL
    with pytest.raises(UserError, match=r"t-3\.tar: not read within 0 s\. Check the storage"):
        cache.fetch(3, timeout=0.1)
    killed(process)
    cache.fetch(3, timeout=1)
    assert cache.read(3, 0, SIZE) == storage.data(3)


# The page cache


def test_the_page_cache_reads_its_part_of_the_shards(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(page_cache_module, "read_ahead", lambda path: read.append(path.name))
    for rank in range(2):
        shelf = PageCache(storage.folder.path, storage.shards, rank, 2)
        shelf.require_room(10**9)
        assert {shelf.acquire(number) for number in range(SHARDS)} == {Outcome.HELD}
        shelf.release(0)
    assert read == ["t-0.tar", "t-2.tar", "t-4.tar", "t-1.tar", "t-3.tar", "t-5.tar"]
    assert "there/t-3.tar: not read within 5 s" in shelf.explain_delay(3, Outcome.BUSY, 5.0)


def test_readahead_reads_all_or_says_why_not(storage: Storage) -> None:
    read_ahead(Path(storage.folder.path, "t-0.tar"))
    with pytest.raises(UserError, match=r"t-9\.tar: No such file or directory\. Check the storage"):
        read_ahead(Path(storage.folder.path, "t-9.tar"))


# ShardIndex over stores, and over a cache


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server() as running:
        yield running


def to_memory(folder: Path) -> str:
    """A copy of a folder in fsspec's own memory; its URL."""
    url = f"memory://{folder.parent.name}/packed"
    for path in folder.iterdir():
        remote.open_file_system(url).pipe_file(f"{url}/{path.name}", path.read_bytes())
    return url


def to_s3(server: Server, folder: Path) -> str:
    url = f"{server.bucket()}/packed"
    for path in folder.iterdir():
        server.put(f"{url}/{path.name}", path.read_bytes())
    return url


@pytest.fixture(params=["s3", "memory", "local"])
def url(request: pytest.FixtureRequest, packed: Path) -> str:
    """A folder of shards as an URL, or a path."""
    if request.param == "local":
        return str(packed)
    if request.param == "memory":
        pytest.importorskip("fsspec")
        return to_memory(packed)
    return to_s3(request.getfixturevalue("server"), packed)


@pytest.mark.parametrize("cached", [False, True])
def test_an_index_reads_the_same_wherever_the_shards_lie(
    packed_once: Path, url: str, tmp_path: Path, cached: bool
) -> None:
    cache = {"cache": tmp_path / "cache", "cache_bytes": 40_000} if cached else {}
    with ShardIndex(packed_once) as local, ShardIndex(url, **cache) as index:
        ids = np.random.default_rng(1).permutation(len(local)).tolist()
        assert index.read(ids) == local.read(ids)
        assert index.fingerprint == local.fingerprint
        assert [index.describe(id) for id in ids] == [local.describe(id) for id in ids]
        assert np.array_equal(index.heights, local.heights)
        again = pickle.loads(pickle.dumps(index))
        assert again.read(ids) == local.read(ids)
        assert (again.cache is None) == (not cached)
        if index.cache is not None:
            assert 0 < used(index.cache) <= 40_000
        assert str(index.folder) == url
        assert index.is_remote == ("://" in url)


def test_a_damaged_object_is_named_at_its_shard_or_its_sample(server: Server, packed: Path, tmp_path: Path) -> None:
    url = to_s3(server, packed)
    plain, cached = ShardIndex(url), ShardIndex(url, tmp_path / "cache")
    shard = plain.manifest.shards[1].file
    data = bytearray(server.get(f"{url}/{shard}"))
    id = int(np.flatnonzero(plain.records["shard"] == 1)[0])
    data[int(plain.records[id]["offset"]) + 3] ^= 1
    server.put(f"{url}/{shard}", bytes(data))
    with pytest.raises(BadSample, match=rf"{shard}, key .*crc32"):
        plain.read([id])
    with pytest.raises(UserError, match=rf"{re.escape(url)}/{shard}: twice not the bytes that the manifest describes"):
        cached.read([id])
    server.remove(f"{url}/{shard}")
    for index in (plain, cached):
        with pytest.raises(UserError, match=rf"{re.escape(url)}/{shard}: no such "):
            index.read([id])
    with pytest.raises(UserError, match=rf"{shard}: no such file\. Run 'make-shards check"):
        ShardIndex(url)


def test_a_url_that_holds_no_shards(server: Server) -> None:
    bucket = server.bucket()
    with pytest.raises(UserError, match=rf"{bucket}/nothing: no such folder, or no shards in it"):
        ShardIndex(f"{bucket}/nothing")


def test_shard_sizes_are_those_of_the_index(packed: Path) -> None:
    index = ShardIndex(packed)
    sizes = index.count_samples_per_shard()
    assert sizes.tolist() == np.bincount(index.records["shard"]).tolist()
    assert (sizes.dtype, int(sizes.sum())) == (np.int64, len(index))


def test_an_index_that_numbers_samples_otherwise_is_refused_for_this_order(packed: Path) -> None:
    path = packed / "index.npy"
    records = np.load(path)
    np.save(path, records[::-1])
    forge(packed, index_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    index = ShardIndex(packed)
    assert index.read([0])
    with pytest.raises(UserError, match=r"index\.npy does not number .*--data\.order global"):
        index.count_samples_per_shard()
