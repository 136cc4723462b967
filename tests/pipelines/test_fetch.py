"""The fetcher has the shards of a step in the cache when they are read. It never waits without a limit."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipelines import fetch
from pipelines.fetch import Fetcher, choose_cache
from pipelines.order import ShardOrder
from shards.cache.copies import list_copies
from shards.cache.interface import Outcome
from shards.cache.page_cache import PageCache
from shards.errors import UserError
from shards.index import ShardIndex
from tests.shards.s3 import s3_server

SHARDS = 12


class FakeCache:
    """A cache with room for some shards. It keeps a list of what happens."""

    def __init__(self, room: int = SHARDS) -> None:
        self.room = room
        self.there: set[int] = set()
        self.events: list[tuple[str, int]] = []
        self.busy: set[int] = set()
        self.broken: set[int] = set()
        self.go_on = threading.Event()
        self.go_on.set()
        self._lock = threading.Lock()

    def acquire(self, number: int) -> Outcome:
        assert self.go_on.wait(30)
        with self._lock:
            if number in self.broken:
                raise UserError(f"shard {number} is broken")
            if number in self.busy:
                return Outcome.BUSY
            assert number not in self.there
            if len(self.there) >= self.room:
                return Outcome.FULL
            self.there.add(number)
            self.events.append(("acquire", number))
            return Outcome.HELD

    def release(self, number: int) -> None:
        with self._lock:
            self.there.remove(number)
            self.events.append(("release", number))

    def require_room(self, count: int) -> None:
        if min(count, SHARDS) > self.room:
            raise UserError("too small")

    def explain_delay(self, number: int, outcome: Outcome, seconds: float) -> str:
        return f"shard {number} is {outcome.value}"


@pytest.fixture(autouse=True)
def poll_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(fetch, "_FULL_POLL_SECONDS", 0.02)


@pytest.fixture
def order() -> ShardOrder:
    """An epoch of four windows of three shards each. A step is a third of a window."""
    return ShardOrder([10] * SHARDS, 10, seed=4, window=3)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def list_needed_shards(order: ShardOrder, step: int) -> set[int]:
    """Return the shards of a step and of the window after it."""
    return {*order.shards(step).tolist(), *order.shards_in_window(order.windows(step)[-1] + 1).tolist()}


def test_the_shards_of_a_step_are_there_and_those_of_the_next_window_follow(order: ShardOrder) -> None:
    cache = FakeCache()
    with Fetcher(order, cache, timeout=20) as fetcher:
        for step in range(3 * order.steps_per_epoch):  # past the ends of epochs
            fetcher.wait_for(step)
            assert set(order.shards(step).tolist()) <= cache.there
            wait_until(lambda step=step: cache.there == list_needed_shards(order, step))
    assert cache.there == set()


def test_shards_are_fetched_in_the_order_of_their_use(order: ShardOrder) -> None:
    cache = FakeCache()
    with Fetcher(order, cache, ahead=2, threads=1, timeout=20) as fetcher:
        fetcher.wait_for(0)
        wait_until(lambda: len(cache.events) == 9)
    expected = [("acquire", int(shard)) for window in range(3) for shard in order.shards_in_window(window)]
    assert cache.events[:9] == expected


def test_steps_may_jump(order: ShardOrder) -> None:
    cache = FakeCache(6)
    with Fetcher(order, cache, timeout=20) as fetcher:
        for step in np.random.default_rng(0).integers(0, 100, 40).tolist():
            fetcher.wait_for(step)
            assert set(order.shards(step).tolist()) <= cache.there <= list_needed_shards(order, step)


def test_a_shard_that_arrives_after_a_jump_is_released(order: ShardOrder) -> None:
    cache = FakeCache()
    cache.go_on.clear()
    near, far = 0, 6
    with Fetcher(order, cache, timeout=0.05) as fetcher:
        with pytest.raises(UserError, match="shard"):
            fetcher.wait_for(near)
        with pytest.raises(UserError, match="shard"):
            fetcher.wait_for(far)
        cache.go_on.set()
        fetcher.wait_for(far)
        wait_until(lambda: cache.there == list_needed_shards(order, far))


def test_room_for_two_windows_is_enough_and_less_is_refused(order: ShardOrder) -> None:
    sizes = np.random.default_rng(0).integers(3, 20, SHARDS)
    order = ShardOrder(sizes, 7, seed=4, window=3)
    cache = FakeCache(6)
    with Fetcher(order, cache, ahead=3, timeout=20) as fetcher:
        for step in range(2 * order.steps_per_epoch):
            fetcher.wait_for(step)
            assert set(order.shards(step).tolist()) <= cache.there
    with pytest.raises(UserError, match="too small"):
        Fetcher(order, FakeCache(5))


def test_a_step_of_more_windows_than_fit_is_refused() -> None:
    order = ShardOrder([2] * SHARDS, 12, seed=0, window=1)
    with Fetcher(order, FakeCache(5)) as fetcher, pytest.raises(UserError, match="too small"):
        fetcher.wait_for(0)


def test_an_error_in_a_thread_is_raised_when_its_shard_is_needed(order: ShardOrder) -> None:
    cache = FakeCache()
    cache.broken = set(order.shards_in_window(1).tolist())
    with Fetcher(order, cache, threads=1, timeout=20) as fetcher:
        fetcher.wait_for(0)
        for step in (3, 3, 4):
            with pytest.raises(UserError, match="is broken"):
                fetcher.wait_for(step)
    assert cache.there == set()


@pytest.mark.parametrize("outcome", [Outcome.BUSY, Outcome.FULL])
def test_a_timeout_names_the_shard(order: ShardOrder, outcome: Outcome) -> None:
    cache = FakeCache(6)
    first = order.shards_in_window(0).tolist()
    if outcome is Outcome.BUSY:
        cache.busy = set(first)
    else:
        cache.require_room = lambda count: None
        cache.room = 0
    with Fetcher(order, cache, timeout=0.1) as fetcher:
        with pytest.raises(UserError, match=rf"shard ({'|'.join(map(str, first))}) is {outcome.value}"):
            fetcher.wait_for(0)
        cache.busy, cache.room = set(), 6
        fetcher.wait_for(0)


def test_close_ends_all_waits_and_leaves_no_thread(order: ShardOrder) -> None:
    before = threading.active_count()
    cache = FakeCache()
    cache.busy = set(range(SHARDS))
    fetcher = Fetcher(order, cache, timeout=20)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(fetcher.wait_for, 0)
        wait_until(lambda: bool(fetcher._wanted))
        fetcher.close()
        with pytest.raises(RuntimeError, match="closed"):
            waiting.result(timeout=20)
    assert threading.active_count() == before


# Over real shards


@pytest.fixture
def cached(shard_folder: Path, tmp_path: Path) -> Iterator[Callable[..., ShardIndex]]:
    """A function that opens an index. All of them keep their copies in one folder."""
    made = []

    def make(**options) -> ShardIndex:
        made.append(ShardIndex(shard_folder, tmp_path / "cache", **options))
        return made[-1]

    yield make
    for index in made:
        index.close()


def count_cached_bytes(index: ShardIndex) -> int:
    with index.cache.lock_directory():  # others come and go
        return sum(file.size for file in list_copies(index.cache.directory))


def test_ranks_that_share_a_cache_read_the_same_as_without_it(
    index: ShardIndex, cached: Callable[..., ShardIndex]
) -> None:
    room = 2 * max(shard.bytes for shard in index.manifest.shards)  # two windows of one shard
    order = ShardOrder(index.count_samples_per_shard(), 4, seed=1, window=1)
    together = threading.Barrier(2)

    def train(rank: int) -> int:
        mine, most = cached(cache_bytes=room), 0
        with Fetcher(order, choose_cache(mine, order, rank, 2)) as fetcher:
            for step in range(2 * order.steps_per_epoch):
                fetcher.wait_for(step)
                ids = order.ids(step, rank, 2)
                assert mine.read(ids) == index.read(ids)
                most = max(most, count_cached_bytes(mine))
                together.wait(timeout=60)  # the step, which no rank passes alone
        return most

    with ThreadPoolExecutor(2) as threads:
        assert max(threads.map(train, range(2))) <= room


def test_a_cache_too_small_for_two_windows_is_refused_at_once(cached: Callable[..., ShardIndex]) -> None:
    index = cached()
    order = ShardOrder(index.count_samples_per_shard(), 4, seed=1, window=2)
    small = sum(shard.bytes for shard in index.manifest.shards[:2])
    with pytest.raises(UserError, match=r"4 shards .*--data\.cache_bytes.*--data\.shuffle_window"):
        choose_cache(cached(cache_bytes=small), order)


def test_a_local_folder_is_read_ahead_and_a_remote_one_needs_a_cache(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = ShardOrder(index.count_samples_per_shard(), 4, seed=1, window=2)
    cache = choose_cache(index, order)
    assert isinstance(cache, PageCache)
    with Fetcher(order, cache) as fetcher:
        for step in range(2 * order.steps_per_epoch):
            fetcher.wait_for(step)
    monkeypatch.setattr(index, "folder", "s3://bucket/folder")
    with pytest.raises(UserError, match=r"s3://bucket/folder: .*--data\.cache FOLDER"):
        choose_cache(index, order)


def test_a_run_from_a_store_reads_the_same_as_a_local_one(index: ShardIndex, tmp_path: Path) -> None:
    with s3_server() as server:
        url = f"{server.bucket()}/train"
        for path in Path(index.folder).iterdir():
            server.put(f"{url}/{path.name}", path.read_bytes())
        order = ShardOrder(index.count_samples_per_shard(), 4, seed=1, window=2)
        with ShardIndex(url, tmp_path / "cache") as remote, Fetcher(order, choose_cache(remote, order)) as fetcher:
            for step in (0, 1, 2, order.steps_per_epoch - 1, order.steps_per_epoch, 100, 0):
                fetcher.wait_for(step)
                assert remote.read(order.ids(step)) == index.read(order.ids(step))
