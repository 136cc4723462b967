"""Run an iterator in a thread of its own, a bounded number of items ahead."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

_PARTING = 5.0  # seconds that a thread has to end; after that it is left behind, as a daemon
_POLL = 0.1  # seconds between looks at whether the other side is still there


class _End(Exception):
    """The iterator is exhausted."""


class Prefetcher(Generic[Item], Iterator[Item]):
    """Iterates over `items`, taken by a thread into a queue of `depth`.

    What the thread raises is raised here, in its place. A wait of more than `limit` seconds is a TimeoutError that
    names what was waited for. `close()` (or the end of a `with`) stops the thread, which drops what it holds.
    `taken` counts the items, `queued` sums up how many lay ready whenever one was asked for. The limit counts from
    `progress()` (a reading of time.monotonic) where that is later than the question.
    """

    def __init__(
        self,
        items: Iterator[Item],
        depth: int,
        name: str,
        limit: float = 600.0,
        progress: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.taken, self.queued = 0, 0
        self._name, self._limit, self._progress = name, limit, progress
        self._queue: queue.Queue[Item | Exception] = queue.Queue(depth)
        self._stop, self._stuck = threading.Event(), False
        self._thread = threading.Thread(target=self._run, args=(items,), name=name, daemon=True)
        self._thread.start()

    def _run(self, items: Iterator[Item]) -> None:
        try:
            for item in items:
                if not self._put(item):
                    break
            self._put(_End())
        except Exception as error:
            self._put(error)
        finally:
            if hasattr(items, "close"):
                items.close()

    def _put(self, item: Item | Exception) -> bool:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=_POLL)
                return True
        return False

    def __next__(self) -> Item:
        self.queued += self._queue.qsize()
        item = self._get(time.monotonic())
        self.taken += 1
        if isinstance(item, Exception):
            self._queue.put_nowait(item)  # asked again, it answers the same
            if isinstance(item, _End):
                raise StopIteration
            raise item
        return item

    def _get(self, asked: float) -> Item | Exception:
        while True:
            alive = self._thread.is_alive()  # before the look: what it puts as its last is then found
            with contextlib.suppress(queue.Empty):
                return self._queue.get(timeout=_POLL)
            if self._stop.is_set():
                return _End()
            if not alive:
                raise RuntimeError(f"{self._name}: the thread died without a word")
            if time.monotonic() > max(asked, self._progress()) + self._limit:
                self._stuck = True
                raise TimeoutError(f"{self._name}: nothing came for {self._limit:.0f} s; is the storage stuck?")

    def stop(self) -> None:
        """Let the thread end after what it is at, and whoever waits for it; does not wait."""
        self._stop.set()

    def close(self) -> None:
        self.stop()
        if not self._stuck:
            self._thread.join(timeout=_PARTING)

    def __enter__(self) -> "Prefetcher[Item]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
