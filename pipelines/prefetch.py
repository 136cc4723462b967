"""Run an iterator in a thread of its own, a bounded number of items ahead."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

_JOIN_SECONDS = 5.0  # `close` waits for the thread as long as this, then leaves it behind as a daemon
_POLL_SECONDS = 0.1  # between checks whether the other side is still there


class _EndOfItems(Exception):
    """The iterator is exhausted."""


class Prefetcher(Generic[Item], Iterator[Item]):
    """Iterate over `items`, which a thread puts into a queue of length `depth`.

    An exception in the thread is raised here, in place of the item. A wait of more than `timeout` seconds raises a
    TimeoutError that names what was waited for. The wait counts from the last `progress()`, a time of time.monotonic,
    if that is later than its start. `close()`, or the end of a `with` block, stops the thread and drops the items that
    are left. `taken` counts the items. `queued` adds up the length of the queue at each request for an item.
    """

    def __init__(
        self,
        items: Iterator[Item],
        depth: int,
        name: str,
        timeout: float = 600.0,
        progress: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.taken, self.queued = 0, 0
        self._name, self._timeout, self._progress = name, timeout, progress
        self._queue: queue.Queue[Item | Exception] = queue.Queue(depth)
        self._stop, self._timed_out = threading.Event(), False
        self._thread = threading.Thread(target=self._fill_queue, args=(items,), name=name, daemon=True)
        self._thread.start()

    def _fill_queue(self, items: Iterator[Item]) -> None:
        try:
            for item in items:
                if not self._put(item):
                    break
            self._put(_EndOfItems())
        except Exception as error:
            self._put(error)
        finally:
            if hasattr(items, "close"):
                items.close()

    def _put(self, item: Item | Exception) -> bool:
        """Put an item into the queue. Return False if the prefetcher was stopped first."""
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=_POLL_SECONDS)
                return True
        return False

    def __next__(self) -> Item:
        self.queued += self._queue.qsize()
        item = self._get(time.monotonic())
        self.taken += 1
        if isinstance(item, Exception):
            self._queue.put_nowait(item)  # so that the next call raises the same
            if isinstance(item, _EndOfItems):
                raise StopIteration
            raise item
        return item

    def _get(self, start: float) -> Item | Exception:
        """Wait for the next item. `start` is when the wait began, by time.monotonic."""
        while True:
            alive = self._thread.is_alive()  # asked first, so that the last item of a dying thread is still found
            with contextlib.suppress(queue.Empty):
                return self._queue.get(timeout=_POLL_SECONDS)
            if self._stop.is_set():
                return _EndOfItems()
            if not alive:
                raise RuntimeError(f"{self._name}: the thread ended without a result or an error")
            if time.monotonic() > max(start, self._progress()) + self._timeout:
                self._timed_out = True
                raise TimeoutError(f"{self._name}: nothing came for {self._timeout:.0f} s; is the storage stuck?")

    def stop(self) -> None:
        """Ask the thread to end after its current item. Whoever waits for an item stops waiting. Does not wait."""
        self._stop.set()

    def close(self) -> None:
        """Stop the thread, and wait for its end for a few seconds."""
        self.stop()
        if not self._timed_out:
            self._thread.join(timeout=_JOIN_SECONDS)

    def __enter__(self) -> "Prefetcher[Item]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
