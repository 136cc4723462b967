"""Fetcher: the shards of a step are at hand when it reads them, ahead of need, within the limit, and never for ever."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipelines import fetch
from pipelines.fetch import Fetcher, shelf_of
from pipelines.order import ShardOrder
from shards.cache import Outcome, PageCache, _files
from shards.errors import UserError
from shards.index import ShardIndex
from tests.shards.s3 import s3_server

SHARDS = 12


class Shelf:
    """Room for so many shards; writes down what happens."""

    def __init__(self, room: int = SHARDS) -> None:
        self.room = room
        self.there: set[int] = set()
        self.events: list[tuple[str, int]] = []
        self.busy: set[int] = set()
        self.broken: set[int] = set()
        self.go_on = threading.Event()
        self.go_on.set()
        self._lock = threading.Lock()

    def take(self, number: int) -> Outcome:
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
            self.events.append(("take", number))
            return Outcome.HELD

    def release(self, number: int) -> None:
        with self._lock:
            self.there.remove(number)
            self.events.append(("release", number))

    def require(self, count: int) -> None:
        if min(count, SHARDS) > self.room:
            raise UserError("too small")

    def late(self, number: int, outcome: Outcome, seconds: float) -> str:
        return f"shard {number} is {outcome.value}"


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_POLL", 0.01)
    monkeypatch.setattr(fetch, "_FULL_POLL", 0.02)


@pytest.fixture
def order() -> ShardOrder:
    """Two windows of three shards in half an epoch, a step of a third of a window."""
    return ShardOrder([10] * SHARDS, 10, seed=4, window=3)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def ahead_of(order: ShardOrder, step: int) -> set[int]:
    """The shards of a step and of the window after it."""
    return {*order.shards(step).tolist(), *order.shards_of(order.windows(step)[-1] + 1).tolist()}


def test_a_step_finds_its_shards_and_the_next_window_follows(order: ShardOrder) -> None:
    shelf = Shelf()
    with Fetcher(order, shelf, limit=20) as fetching:
        for step in range(3 * order.steps_per_epoch):  # past the ends of epochs
            fetching.need(step)
            assert set(order.shards(step).tolist()) <= shelf.there
            until(lambda step=step: shelf.there == ahead_of(order, step))
    assert shelf.there == set()


def test_shards_are_fetched_in_the_order_of_their_use(order: ShardOrder) -> None:
    shelf = Shelf()
    with Fetcher(order, shelf, ahead=2, threads=1, limit=20) as fetching:
        fetching.need(0)
        until(lambda: len(shelf.events) == 9)
    expected = [("take", int(shard)) for window in range(3) for shard in order.shards_of(window)]
    assert shelf.events[:9] == expected


def test_steps_may_leap(order: ShardOrder) -> None:
    shelf = Shelf(6)
    with Fetcher(order, shelf, limit=20) as fetching:
        for step in np.random.default_rng(0).integers(0, 100, 40).tolist():
            fetching.need(step)
            assert set(order.shards(step).tolist()) <= shelf.there <= ahead_of(order, step)


def test_what_arrives_after_a_leap_is_let_go(order: ShardOrder) -> None:
    shelf = Shelf()
    shelf.go_on.clear()
    near, far = 0, 6
    with Fetcher(order, shelf, limit=0.05) as fetching:
        with pytest.raises(UserError, match="shard"):
            fetching.need(near)
        with pytest.raises(UserError, match="shard"):
            fetching.need(far)
        shelf.go_on.set()
        fetching.need(far)
        until(lambda: shelf.there == ahead_of(order, far))


def test_the_room_of_two_windows_is_enough_and_less_is_refused(order: ShardOrder) -> None:
    sizes = np.random.default_rng(0).integers(3, 20, SHARDS)
    order = ShardOrder(sizes, 7, seed=4, window=3)
    shelf = Shelf(6)
    with Fetcher(order, shelf, ahead=3, limit=20) as fetching:
        for step in range(2 * order.steps_per_epoch):
            fetching.need(step)
            assert set(order.shards(step).tolist()) <= shelf.there
    with pytest.raises(UserError, match="too small"):
        Fetcher(order, Shelf(5))


def test_a_step_of_more_windows_than_fit_is_refused() -> None:
    order = ShardOrder([2] * SHARDS, 12, seed=0, window=1)
    with Fetcher(order, Shelf(5)) as fetching, pytest.raises(UserError, match="too small"):
        fetching.need(0)


def test_an_error_of_a_thread_is_raised_where_its_shard_is_needed(order: ShardOrder) -> None:
    shelf = Shelf()
    shelf.broken = set(order.shards_of(1).tolist())
    with Fetcher(order, shelf, threads=1, limit=20) as fetching:
        fetching.need(0)
        for step in (3, 3, 4):
            with pytest.raises(UserError, match="is broken"):
                fetching.need(step)
    assert shelf.there == set()


@pytest.mark.parametrize("outcome", [Outcome.BUSY, Outcome.FULL])
def test_waiting_ends_with_the_name_of_the_shard(order: ShardOrder, outcome: Outcome) -> None:
    shelf = Shelf(6)
    first = order.shards_of(0).tolist()
    if outcome is Outcome.BUSY:
        shelf.busy = set(first)
    else:
        shelf.require = lambda count: None
        shelf.room = 0
    with Fetcher(order, shelf, limit=0.1) as fetching:
        with pytest.raises(UserError, match=rf"shard ({'|'.join(map(str, first))}) is {outcome.value}"):
            fetching.need(0)
        shelf.busy, shelf.room = set(), 6
        fetching.need(0)


def test_close_frees_whoever_waits_and_leaves_no_thread(order: ShardOrder) -> None:
    before = threading.active_count()
    shelf = Shelf()
    shelf.busy = set(range(SHARDS))
    fetching = Fetcher(order, shelf, limit=20)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(fetching.need, 0)
        until(lambda: bool(fetching._wanted))
        fetching.close()
        with pytest.raises(RuntimeError, match="closed"):
            waiting.result(timeout=20)
    assert threading.active_count() == before


# Over real shards


@pytest.fixture
def cached(shard_folder: Path, tmp_path: Path) -> Iterator[Callable[..., ShardIndex]]:
    """Makes indices whose copies lie in one directory."""
    made = []

    def make(**options) -> ShardIndex:
        made.append(ShardIndex(shard_folder, tmp_path / "cache", **options))
        return made[-1]

    yield make
    for index in made:
        index.close()


def used(index: ShardIndex) -> int:
    with index.cache._locked():  # others come and go
        return sum(file.size for file in _files(index.cache.directory))


def test_ranks_over_one_cache_read_what_a_plain_index_reads(
    index: ShardIndex, cached: Callable[..., ShardIndex]
) -> None:
    room = 2 * max(shard.bytes for shard in index.manifest.shards)  # two windows of one shard
    order = ShardOrder(index.shard_sizes(), 4, seed=1, window=1)
    together = threading.Barrier(2)

    def train(rank: int) -> int:
        mine, most = cached(cache_bytes=room), 0
        with Fetcher(order, shelf_of(mine, order, rank, 2)) as fetching:
            for step in range(2 * order.steps_per_epoch):
                fetching.need(step)
                ids = order.ids(step, rank, 2)
                assert mine.read(ids) == index.read(ids)
                most = max(most, used(mine))
                together.wait(timeout=60)  # the step, which no rank passes alone
        return most

    with ThreadPoolExecutor(2) as threads:
        assert max(threads.map(train, range(2))) <= room


def test_a_cache_too_small_for_two_windows_is_refused_at_once(cached: Callable[..., ShardIndex]) -> None:
    index = cached()
    order = ShardOrder(index.shard_sizes(), 4, seed=1, window=2)
    small = sum(shard.bytes for shard in index.manifest.shards[:2])
    with pytest.raises(UserError, match=r"4 shards must fit at once.*--data\.cache_bytes.*--data\.window"):
        shelf_of(cached(cache_bytes=small), order)


def test_a_local_folder_is_read_ahead_and_a_remote_one_wants_a_cache(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = ShardOrder(index.shard_sizes(), 4, seed=1, window=2)
    shelf = shelf_of(index, order)
    assert isinstance(shelf, PageCache)
    with Fetcher(order, shelf) as fetching:
        for step in range(2 * order.steps_per_epoch):
            fetching.need(step)
    monkeypatch.setattr(index, "folder", "s3://bucket/folder")
    with pytest.raises(UserError, match=r"s3://bucket/folder: .*--data\.cache FOLDER"):
        shelf_of(index, order)


def test_a_run_over_a_store_reads_what_a_local_one_reads(index: ShardIndex, tmp_path: Path) -> None:
    with s3_server() as server:
        url = f"{server.bucket()}/train"
        for path in Path(index.folder).iterdir():
            server.put(f"{url}/{path.name}", path.read_bytes())
        order = ShardOrder(index.shard_sizes(), 4, seed=1, window=2)
        with ShardIndex(url, tmp_path / "cache") as remote, Fetcher(order, shelf_of(remote, order)) as fetching:
            for step in (0, 1, 2, order.steps_per_epoch - 1, order.steps_per_epoch, 100, 0):
                fetching.need(step)
                assert remote.read(order.ids(step)) == index.read(order.ids(step))
