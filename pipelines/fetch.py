"""Fetch shards before the step that reads them, one window or more ahead, and release them afterwards."""

import threading
import time

from pipelines.order import ShardOrder
from shards.cache.interface import Cache, Outcome
from shards.cache.page_cache import PageCache
from shards.errors import UserError
from shards.index import ShardIndex

_JOIN_SECONDS = 2.0  # `close` waits for all threads together as long as this, then leaves them behind as daemons
_POLL_SECONDS = 0.1  # between checks on the work of other processes
_FULL_POLL_SECONDS = 0.5  # the same while the cache is full: a check then goes through its whole folder


def choose_cache(index: ShardIndex, order: ShardOrder, rank: int = 0, world: int = 1) -> Cache:
    """Return where one of `world` ranks on this machine keeps shards: in the index's cache, or else the page cache.

    Raises UserError for a remote folder without a cache, and for a cache that cannot hold any two windows: a step may
    need two.
    """
    if index.cache is not None:
        index.cache.require_room(2 * order.window)
        return index.cache
    if index.is_remote:
        raise UserError(
            f"{index.folder}: --data.order shards copies whole shards. Pass --data.cache FOLDER for the copies"
        )
    return PageCache(index.folder, index.manifest.shards, rank, world)


class Fetcher:
    """Keeps the shards of a step, and those of the next `ahead` windows, in a cache. `threads` threads fetch them.

    This fetcher alone uses its cache object. Other ranks have their own, over the same folder of copies. `wait_for`
    raises what a thread raised. A shard may take `timeout` seconds. `progress` is when the last shard came, by
    time.monotonic. `close` releases all shards.

    Raises UserError if the cache cannot hold any two windows.
    """

    def __init__(
        self, order: ShardOrder, cache: Cache, ahead: int = 1, threads: int = 4, timeout: float = 600.0
    ) -> None:
        cache.require_room(2 * order.window)
        self.progress = time.monotonic()
        self._order, self._cache, self._ahead, self._timeout = order, cache, ahead, timeout
        self._changed = threading.Condition()  # guards everything below
        self._wanted: list[int] = []  # shards in the order of their use
        self._held: set[int] = set()
        self._in_progress: set[int] = set()  # shards that one of the threads is fetching
        self._outcomes: dict[int, Outcome] = {}  # of the last attempt for each shard
        self._error: Exception | None = None
        self._stopped = False
        name = "fetching shards"
        self._threads = [
            threading.Thread(target=self._fetch_until_stopped, name=name, daemon=True) for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def wait_for(self, step: int) -> None:
        """Wait until all shards of a step are in the cache. Shards of earlier steps are released. Steps may jump.

        Raises what a thread raised. Raises UserError if the shards of the step do not fit into the cache, or if none of
        the missing shards came for `timeout` seconds.
        """
        needed = self._order.shards(step).tolist()
        self._cache.require_room(len(needed))
        with self._changed:
            self._want(step, needed)
            self._wait_until_held(set(needed))

    def close(self) -> None:
        """Stop each thread after its current shard, and release all shards."""
        with self._changed:
            self._stopped = True
            self._wanted = []
            self._changed.notify_all()
        deadline = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        with self._changed:
            self._release(self._held)

    def __enter__(self) -> "Fetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # These run in the caller's thread, which holds `_changed`.

    def _want(self, step: int, needed: list[int]) -> None:
        """Let the threads fetch the shards of the step and of the next windows, and release all others."""
        last = self._order.windows(step)[-1]
        following = [
            self._order.shards_in_window(window).tolist() for window in range(last + 1, last + 1 + self._ahead)
        ]
        wanted = list(dict.fromkeys([*needed, *(shard for window in following for shard in window)]))
        if wanted != self._wanted:
            self._wanted = wanted
            self._release(self._held - set(wanted))
            self._changed.notify_all()

    def _wait_until_held(self, needed: set[int]) -> None:
        missing = needed - self._held
        deadline = time.monotonic() + self._timeout
        while missing:
            if self._error is not None:
                raise self._error
            if self._stopped:
                raise RuntimeError("the fetcher is closed")
            if time.monotonic() > deadline:
                raise UserError(self._explain_delay(missing))
            self._changed.wait(_POLL_SECONDS)
            if missing != (missing := needed - self._held):
                deadline = time.monotonic() + self._timeout

    def _explain_delay(self, missing: set[int]) -> str:
        """Return why a missing shard did not come, preferably one for which there is no room."""
        full = (shard for shard in missing if self._outcomes.get(shard) is Outcome.FULL)
        late = next(full, min(missing))
        return self._cache.explain_delay(late, self._outcomes.get(late, Outcome.BUSY), self._timeout)

    # This runs in any thread that holds `_changed`.

    def _release(self, shards: set[int]) -> None:
        for shard in list(shards):
            self._cache.release(shard)
            self._held.discard(shard)

    # These run in the threads that fetch.

    def _fetch_until_stopped(self) -> None:
        try:
            while not self._stopped:
                pause = self._fetch_missing()
                with self._changed:
                    if not self._stopped:
                        self._changed.wait(pause if self._list_missing() else None)
        except Exception as error:
            with self._changed:
                self._error = self._error or error
                self._stopped = True
                self._changed.notify_all()

    def _list_missing(self) -> list[int]:
        return [shard for shard in self._wanted if shard not in self._held]

    def _fetch_missing(self) -> float:
        """Try all missing shards in order, until there is no room for one. Return the seconds to wait afterwards."""
        with self._changed:
            missing = self._list_missing()
        for shard in missing:
            if self._start(shard) and self._fetch(shard) is Outcome.FULL:
                return _FULL_POLL_SECONDS
        return _POLL_SECONDS

    def _start(self, shard: int) -> bool:
        """Reserve a shard for this thread. Return False if another thread has it, or if it is no longer wanted."""
        with self._changed:
            started = not self._stopped and shard in self._list_missing() and shard not in self._in_progress
            if started:
                self._in_progress.add(shard)
            return started

    def _fetch(self, shard: int) -> Outcome:
        outcome = Outcome.BUSY
        try:
            outcome = self._cache.acquire(shard)
        finally:
            with self._changed:
                self._in_progress.discard(shard)
                self._record_outcome(shard, outcome)
        return outcome

    def _record_outcome(self, shard: int, outcome: Outcome) -> None:
        """Note what came of an attempt. The thread holds `_changed`."""
        self._outcomes[shard] = outcome
        if outcome is Outcome.HELD:
            self._held.add(shard)
            self.progress = time.monotonic()
            if shard not in self._wanted:  # the steps have jumped in the meantime
                self._release({shard})
            self._changed.notify_all()
        elif outcome is Outcome.FULL and shard in self._wanted:  # make room: release what is needed later than this
            self._release(self._held & set(self._wanted[self._wanted.index(shard) + 1 :]))
