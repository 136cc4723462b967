"""Shards at hand before the step that reads them, a window or more ahead, and let go behind it."""

import threading
import time

from pipelines.order import ShardOrder
from shards.cache import Outcome, PageCache, Shelf
from shards.errors import UserError
from shards.index import ShardIndex

_PARTING = 2.0  # seconds that the threads have to end together; after that they are left behind, as daemons
_POLL = 0.1  # seconds between looks at what other processes do
_FULL_POLL = 0.5  # seconds, where room is waited for: a look goes through the whole folder


def shelf_of(index: ShardIndex, order: ShardOrder, rank: int = 0, world: int = 1) -> Shelf:
    """Where one of `world` ranks on this machine puts shards: into the index's cache, or else into the page cache.

    Raises UserError for a remote folder without a cache, and a cache in which any two windows do not fit: a step may
    come from two.
    """
    if index.cache is not None:
        index.cache.require(2 * order.window)
        return index.cache
    if index.remote:
        raise UserError(f"{index.folder}: --data.order shards copies whole shards: pass --data.cache FOLDER for them")
    return PageCache(index.folder, index.manifest.shards, rank, world)


class Fetcher:
    """Keeps the shards of a step and those of the `ahead` next windows on a shelf, fetched by `threads` threads.

    The shelf is for this fetcher alone; other ranks have their own, over the same folder of copies. What a thread
    raises is raised by `need`, and a shard may take `limit` seconds. Close it to let everything go. `progress` is when
    a shard last came, by time.monotonic.

    Raises UserError where any two windows do not fit on the shelf.
    """

    def __init__(self, order: ShardOrder, shelf: Shelf, ahead: int = 1, threads: int = 4, limit: float = 600.0) -> None:
        shelf.require(2 * order.window)
        self.progress = time.monotonic()
        self._order, self._shelf, self._ahead, self._limit = order, shelf, ahead, limit
        self._changed = threading.Condition()  # guards what follows
        self._wanted: list[int] = []  # shards, the first to be used first
        self._held: set[int] = set()
        self._underway: set[int] = set()  # in some thread of ours
        self._last: dict[int, Outcome] = {}  # of the attempts at what is not held
        self._error: Exception | None = None
        self._stopped = False
        name = "fetching shards"
        self._threads = [threading.Thread(target=self._run, name=name, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def need(self, step: int) -> None:
        """Return when all shards of `step` are at hand; those behind it are let go. Steps may leap.

        Raises what a thread raised, and UserError where the shards of the step do not fit on the shelf, or none of
        those missing came for `limit` seconds.
        """
        needed = self._order.shards(step).tolist()
        self._shelf.require(len(needed))
        with self._changed:
            self._aim(step, needed)
            self._await(set(needed))

    def close(self) -> None:
        """Stop the threads, each after the shard that it is at, and let go of all shards."""
        with self._changed:
            self._stopped = True
            self._wanted = []
            self._changed.notify_all()
        deadline = time.monotonic() + _PARTING
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        with self._changed:
            self._let_go(self._held)

    def __enter__(self) -> "Fetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # In the caller's thread; `_changed` is held

    def _aim(self, step: int, needed: list[int]) -> None:
        """Want the shards of the step and of the next windows, and nothing else."""
        last = self._order.windows(step)[-1]
        following = [self._order.shards_of(window).tolist() for window in range(last + 1, last + 1 + self._ahead)]
        wanted = list(dict.fromkeys([*needed, *(shard for window in following for shard in window)]))
        if wanted != self._wanted:
            self._wanted = wanted
            self._let_go(self._held - set(wanted))
            self._changed.notify_all()

    def _await(self, needed: set[int]) -> None:
        missing = needed - self._held
        deadline = time.monotonic() + self._limit
        while missing:
            if self._error is not None:
                raise self._error
            if self._stopped:
                raise RuntimeError("the fetcher is closed")
            if time.monotonic() > deadline:
                late = next((shard for shard in missing if self._last.get(shard) is Outcome.FULL), min(missing))
                raise UserError(self._shelf.late(late, self._last.get(late, Outcome.BUSY), self._limit))
            self._changed.wait(_POLL)
            if missing != (missing := needed - self._held):
                deadline = time.monotonic() + self._limit

    # In both

    def _let_go(self, shards: set[int]) -> None:
        for shard in list(shards):
            self._shelf.release(shard)
            self._held.discard(shard)

    # In the threads

    def _run(self) -> None:
        try:
            while not self._stopped:
                pause = self._pass()
                with self._changed:
                    if not self._stopped:
                        self._changed.wait(pause if self._missing() else None)
        except Exception as error:
            with self._changed:
                self._error = self._error or error
                self._stopped = True
                self._changed.notify_all()

    def _missing(self) -> list[int]:
        return [shard for shard in self._wanted if shard not in self._held]

    def _pass(self) -> float:
        """Try all that is missing, in its order, up to one for which there is no room yet. Seconds to wait then."""
        with self._changed:
            missing = self._missing()
        for shard in missing:
            if self._begin(shard) and self._attempt(shard) is Outcome.FULL:
                return _FULL_POLL
        return _POLL

    def _begin(self, shard: int) -> bool:
        """Whether to fetch it: no other thread is at it, and it is still wanted."""
        with self._changed:
            begun = not self._stopped and shard in self._missing() and shard not in self._underway
            if begun:
                self._underway.add(shard)
            return begun

    def _attempt(self, shard: int) -> Outcome:
        outcome = Outcome.BUSY
        try:
            outcome = self._shelf.take(shard)
        finally:
            with self._changed:
                self._underway.discard(shard)
                self._note(shard, outcome)
        return outcome

    def _note(self, shard: int, outcome: Outcome) -> None:
        """`_changed` is held."""
        self._last[shard] = outcome
        if outcome is Outcome.HELD:
            self._held.add(shard)
            self.progress = time.monotonic()
            if shard not in self._wanted:  # the steps leapt meanwhile
                self._let_go({shard})
            self._changed.notify_all()
        elif outcome is Outcome.FULL and shard in self._wanted:  # what is wanted later must not stand in its way
            self._let_go(self._held & set(self._wanted[self._wanted.index(shard) + 1 :]))
