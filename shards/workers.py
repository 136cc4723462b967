"""Worker processes: started afresh, counted while they work, stopped within one picture, gone when their parent is."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import numpy as np

from shards.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
Tick = Callable[[int], None]  # a worker says how many pictures of its task are done; raises StoppedError to stop it
Progress = Callable[[int], None]  # the caller hears how many pictures of all tasks are done

_board: Any = None  # in a worker, shared memory: pictures done, one slot a task; the last slot is the stop flag


class StoppedError(Exception):
    """The parent wants no more work."""


def run_tasks(
    function: Callable[[Task, Tick], Result],
    task_of: Callable[[int], Task],
    count: int,
    workers: int,
    progress: Progress,
) -> list[Result]:
    """`function(task_of(number), tick)` for every number below `count` in `workers` processes; results in that order.

    `task_of` is called here, when a task is due. The first exception of a worker stops the others and is raised here;
    UserError where a worker died.
    """
    # "spawn": a forked child would inherit locks held by the caller's threads.
    context = multiprocessing.get_context("spawn")
    board: Any = context.RawArray("Q", count + 1)
    pool = ProcessPoolExecutor(min(workers, count), context, _enter, (board,))
    try:
        return _collect(pool, function, task_of, count, 2 * workers, board, progress)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died, perhaps for want of memory; run the same command again with a smaller --workers"
        ) from error
    finally:
        board[count] = 1
        pool.shutdown(wait=True, cancel_futures=True)


def _collect(
    pool: ProcessPoolExecutor,
    function: Callable[[Task, Tick], Result],
    task_of: Callable[[int], Task],
    count: int,
    ahead: int,
    board: Any,
    progress: Progress,
) -> list[Result]:
    """Keep `ahead` tasks submitted until all are done."""
    counts = np.frombuffer(board, np.uint64)[:count]
    results: dict[int, Result] = {}
    running: dict[Future[Result], int] = {}
    numbers = iter(range(count))
    while len(results) < count:
        for number in numbers:
            task = task_of(number)
            with _interrupts_ignored():
                running[pool.submit(_work, function, number, task)] = number
            if len(running) >= ahead:
                break
        finished, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
        for future in finished:
            results[running.pop(future)] = future.result()
        progress(int(counts.sum()))
    return [results[number] for number in range(count)]


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started in here inherit that Ctrl-C is for their parent alone, even while they still import."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _enter(board: Any) -> None:
    """Runs first in every worker."""
    global _board
    _board = board
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # Pillow's, on odd pictures: a picture decodes or is listed with its reason
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _work(function: Callable[[Task, Tick], Result], number: int, task: Task) -> Result:
    def tick(done: int) -> None:
        _board[number] = done
        if _board[len(_board) - 1]:
            raise StoppedError

    return function(task, tick)
