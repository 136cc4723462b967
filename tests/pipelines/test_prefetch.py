import threading
import time

import pytest

from pipelines.prefetch import Prefetcher


def test_items_come_in_order_and_the_end_is_final():
    with Prefetcher(iter(range(50)), 3, "counting") as items:
        assert list(items) == list(range(50))
        assert list(items) == []


def test_the_thread_works_ahead_no_further_than_the_depth():
    taken = []

    def source():
        for number in range(100):
            taken.append(number)
            yield number

    with Prefetcher(source(), 4, "counting") as items:
        assert next(items) == 0
        deadline = time.monotonic() + 5
        while len(taken) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        assert len(taken) == 6  # one given, four in the queue, one in hand


def test_an_error_in_the_thread_is_raised_in_place_of_the_item():
    def source():
        yield 1
        raise ValueError("broken source")

    with Prefetcher(source(), 2, "counting") as items:
        assert next(items) == 1
        for _ in range(2):
            with pytest.raises(ValueError, match="broken source"):
                next(items)


def test_a_stuck_source_is_an_error_within_the_timeout():
    release = threading.Event()

    def source():
        release.wait()
        yield 1

    items = Prefetcher(source(), 2, "reading shards", timeout=0.3)
    with pytest.raises(TimeoutError, match="reading shards: nothing came"):
        next(items)
    release.set()
    items.close()


def test_close_stops_the_thread_and_closes_the_source():
    closed = threading.Event()

    def source():
        try:
            while True:
                yield 1
        finally:
            closed.set()

    items = Prefetcher(source(), 2, "endless")
    next(items)
    items.close()
    assert closed.is_set()
    assert list(items) in ([], [1], [1, 1])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_silently_is_an_error_at_once():
    def source():
        yield 1
        raise SystemExit  # what no `except Exception` catches

    with Prefetcher(source(), 2, "reading shards", timeout=60) as items:
        assert next(items) == 1
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="reading shards: the thread ended"):
            next(items)
        assert time.monotonic() - start < 10


def test_ready_items_are_counted():
    release = threading.Event()

    def source():
        yield from range(5)
        release.wait()

    items = Prefetcher(source(), 8, "counting")
    deadline = time.monotonic() + 5
    while items._queue.qsize() < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [next(items) for _ in range(5)] == list(range(5))
    assert (items.taken, items.queued) == (5, 5 + 4 + 3 + 2 + 1)
    release.set()
    items.close()
