"""Worker processes: given one task at a time, counted while they work, stopped within one picture, gone when their
parent is, and killed by the kernel where a picture takes more CPU time than allowed.
"""

import contextlib
import itertools
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import pickle
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from shards.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
Tick = Callable[[int], None]  # a worker says how many pictures of its task are done; raises StoppedError to stop it
Progress = Callable[[int], None]  # the caller hears how many pictures of all tasks are done
Overrun = Callable[[Task, int], Task]  # the task again, its picture at that place condemned

_BEAT = 0.2  # seconds between two calls of `progress` at most
_GRACE = 2.0  # seconds for a worker to end by itself, after which it is killed


class StoppedError(Exception):
    """The parent wants no more work."""


def run_tasks(
    function: Callable[[Task, Tick], Result],
    task_of: Callable[[int], Task],
    count: int,
    workers: int,
    progress: Progress,
    overrun: Overrun[Task] | None = None,
) -> list[Result]:
    """`function(task_of(number), tick)` for every number below `count` in `workers` processes; results in that order.

    `task_of` is called here, when a task is due. A worker that overran a `cpu_limit` is replaced, and its task run
    again as `overrun(task, place)` gives it: `place` is what it last told `tick`. The first exception of a worker stops
    the others and is raised here (RuntimeError with its traceback where it cannot be pickled); UserError where a worker
    died of anything else.
    """
    crew = _Crew(function, count)
    try:
        return _collect(crew, task_of, count, workers, progress, overrun)
    finally:
        crew.dismiss()


@contextlib.contextmanager
def cpu_limit(seconds: float | None) -> Iterator[None]:
    """In a worker: the kernel kills it where the block takes more CPU seconds, even within one call of a C library.

    CPU time, so that a busy machine or a suspended run condemns nothing. None: no limit. Tell `tick` the place before.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds or 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


class _Answer(NamedTuple):
    result: Any
    error: Exception | None = None
    trace: str = ""  # the error's, as text


class _Crew(Generic[Task]):
    """The workers, each known by the parent's end of its pipe, and what they are at."""

    def __init__(self, function: Callable[[Task, Tick], Any], count: int) -> None:
        # "spawn": a forked child would inherit locks held by the caller's threads.
        self._context = multiprocessing.get_context("spawn")
        self._function = function
        self._processes: dict[Connection, SpawnProcess] = {}
        self.running: dict[Connection, tuple[int, Task]] = {}  # number and task
        # Shared memory: pictures done, one slot a task; the last slot is the stop flag.
        self.board: Any = self._context.RawArray("Q", count + 1)

    def hire(self) -> Connection:
        """Start a worker; it need not be up when it is given a task."""
        ours, theirs = self._context.Pipe()
        with theirs, interrupts_deferred():  # only the worker holds its end: the pipe ends when the worker does
            process = self._context.Process(target=_serve, args=(self._function, self.board, theirs), daemon=True)
            process.start()
            self._processes[ours] = process
        return ours

    def give(self, pipe: Connection, number: int, task: Task) -> None:
        """Hand over a task."""
        self.running[pipe] = number, task
        with contextlib.suppress(ConnectionError):  # it has died; `take` will find out
            pipe.send((number, task))

    def ready(self, timeout: float) -> list[Connection]:
        """The workers that have answered or died, as soon as there is one, or after `timeout` seconds."""
        ready = multiprocessing.connection.wait(list(self.running), timeout)
        return [pipe for pipe in self.running if pipe in ready]

    def take(self, pipe: Connection) -> tuple[int, Task, _Answer | None]:
        """A task that a worker is through with, and the answer; None where the worker died."""
        number, task = self.running.pop(pipe)
        try:
            data = pipe.recv_bytes()
        except (EOFError, OSError):
            return number, task, None
        return number, task, pickle.loads(data)

    def bury(self, pipe: Connection) -> int | None:
        """The exit code of a worker that died: negative, the signal that killed it."""
        process = self._processes.pop(pipe)
        pipe.close()
        process.join()
        code = process.exitcode
        process.close()
        return code

    def dismiss(self) -> None:
        """Stop and reap all workers."""
        self.board[-1] = 1
        try:
            for pipe in self._processes:
                pipe.close()  # ends those that wait for a task
            deadline = time.monotonic() + _GRACE
            for process in self._processes.values():
                process.join(max(0, deadline - time.monotonic()))
        finally:  # also where a second Ctrl-C cuts the wait short
            for process in self._processes.values():
                process.kill()
                process.join()
                process.close()


def _collect(
    crew: _Crew[Task],
    task_of: Callable[[int], Task],
    count: int,
    workers: int,
    progress: Progress,
    overrun: Overrun[Task] | None,
) -> list[Any]:
    """Keep all workers busy until all tasks are done."""
    counts = np.frombuffer(crew.board, np.uint64)[:count]
    results: dict[int, Any] = {}
    numbers = iter(range(count))
    for pipe in [crew.hire() for _ in range(min(workers, count))]:
        number = next(numbers)
        crew.give(pipe, number, task_of(number))
    while crew.running:
        for pipe in crew.ready(_BEAT):
            number, task, answer = crew.take(pipe)
            if answer is None:
                task = _condemned(task, int(counts[number]), crew.bury(pipe), overrun)
                crew.give(crew.hire(), number, task)
                continue
            if answer.error is not None:
                raise answer.error from RuntimeError(answer.trace)
            results[number] = answer.result
            for number in itertools.islice(numbers, 1):
                crew.give(pipe, number, task_of(number))
        progress(int(counts.sum()))
    return [results[number] for number in range(count)]


def _condemned(task: Task, place: int, exit_code: int | None, overrun: Overrun[Task] | None) -> Task:
    """The task to run again after a worker's death. Raises UserError where it is no picture's fault."""
    if overrun is None or exit_code != -signal.SIGPROF:
        raise UserError(
            "a worker process died, perhaps for want of memory; run the same command again with a smaller --workers"
        )
    return overrun(task, place)


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Processes started in here inherit that Ctrl-C is for their parent alone; the parent hears of it at the end."""
    multiprocessing.resource_tracker.ensure_running()  # which would unblock it when `start` starts that
    held: list[int] = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # Blocked in this thread is not enough for this process: numpy has threads too, and they take the signal.
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, frame: held.append(number)) if in_main else None
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if in_main:
            signal.signal(signal.SIGINT, handler)
        if held:
            signal.raise_signal(signal.SIGINT)


def _serve(function: Callable[[Task, Tick], Any], board: Any, pipe: Connection) -> None:
    """A worker's life: tasks in, answers out, until the parent hangs up."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")  # Pillow's, on odd pictures: a picture decodes or is listed with its reason
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # for `cpu_limit`; the caller's profiler may have seen to it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            number, task = pipe.recv()
            pipe.send_bytes(_answer(function, board, number, task))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _answer(function: Callable[[Task, Tick], Any], board: Any, number: int, task: Task) -> bytes:
    def tick(done: int) -> None:
        board[number] = done
        if board[-1]:
            raise StoppedError

    try:
        return pickle.dumps(_Answer(function(task, tick)))
    except Exception as error:
        return _failure(error, traceback.format_exc())


def _failure(error: Exception, trace: str) -> bytes:
    """An answer with an exception, in its own type where that survives the way."""
    try:
        data = pickle.dumps(_Answer(None, error, trace))
        pickle.loads(data)
        return data
    except Exception:
        return pickle.dumps(_Answer(None, RuntimeError(trace), trace))
