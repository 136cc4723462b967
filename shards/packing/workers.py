"""Worker processes that get one task at a time.

They report their progress while they work, stop within one image, and end with their parent. The kernel kills a worker
where an image takes more CPU time than allowed; a new worker then goes on with the task.
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
from shards.images import cpu_time

Task = TypeVar("Task")
Result = TypeVar("Result")
Tick = Callable[[int], None]  # a worker reports how many images of its task are done; raises StoppedError to stop it
Progress = Callable[[int], None]  # the caller hears how many images of all tasks are done
OnTimeout = Callable[[Task, int], Task]  # returns the task to run instead, after its image at this position timed out

_BEAT = 0.2  # seconds between two calls of `progress` at most
_GRACE = 2.0  # seconds for a worker to end by itself, after which it is killed


class StoppedError(Exception):
    """The parent wants no more work."""


def run_tasks(
    function: Callable[[Task, Tick], Result],
    make_task: Callable[[int], Task],
    count: int,
    workers: int,
    progress: Progress,
    on_timeout: OnTimeout[Task] | None = None,
) -> list[Result]:
    """Return ``function(make_task(number), tick)`` for every number below `count`, computed in `workers` processes.

    `make_task` is called in this process, when a task is due. A worker that exceeded `cpu_time.limit_cpu_time` is
    replaced, and its task is run again as ``on_timeout(task, position)`` returns it. The position is what the worker
    last told `tick`. The first exception of a worker stops the others and is raised here, as RuntimeError with its
    traceback where it cannot be pickled. Raises UserError where a worker died of anything else.
    """
    pool = _WorkerPool(function, count)
    try:
        return _collect_results(pool, make_task, count, workers, progress, on_timeout)
    finally:
        pool.stop()


def mark_as_timed_out(task: Any, position: int) -> Any:
    """Return a task whose image at this position is marked, so that it is not read again. For `on_timeout`."""
    return task._replace(timed_out=task.timed_out | {position})


class _Answer(NamedTuple):
    """What a worker sends back."""

    result: Any
    """result of the task"""
    error: Exception | None = None
    """exception that the task raised"""
    trace: str = ""
    """traceback of that exception, as text"""


class _WorkerPool(Generic[Task]):
    """The workers, each known by the parent's end of its pipe, and what they work on."""

    def __init__(self, function: Callable[[Task, Tick], Any], count: int) -> None:
        # "spawn": a forked child would inherit locks held by the caller's threads.
        self._context = multiprocessing.get_context("spawn")
        self._function = function
        self._processes: dict[Connection, SpawnProcess] = {}
        self.running: dict[Connection, tuple[int, Task]] = {}  # number and task
        # Shared memory: images done, one slot per task. The last slot is the stop flag.
        self.shared_counts: Any = self._context.RawArray("Q", count + 1)

    def start_worker(self) -> Connection:
        """Start a worker. It can be given a task before it is up."""
        ours, theirs = self._context.Pipe()
        with theirs, defer_interrupts():  # only the worker holds its end: the pipe ends when the worker does
            process = self._context.Process(
                target=_serve, args=(self._function, self.shared_counts, theirs), daemon=True
            )
            process.start()
            self._processes[ours] = process
        return ours

    def send_task(self, pipe: Connection, number: int, task: Task) -> None:
        """Give a worker a task."""
        self.running[pipe] = number, task
        with contextlib.suppress(ConnectionError):  # it has died; `receive_answer` will find out
            pipe.send((number, task))

    def wait_for_answers(self, timeout: float) -> list[Connection]:
        """Return the workers that have answered or died, as soon as there is one, or after `timeout` seconds."""
        ready = multiprocessing.connection.wait(list(self.running), timeout)
        return [pipe for pipe in self.running if pipe in ready]

    def receive_answer(self, pipe: Connection) -> tuple[int, Task, _Answer | None]:
        """Return the number and task of a worker, and its answer, or None where the worker died."""
        number, task = self.running.pop(pipe)
        try:
            data = pipe.recv_bytes()
        except (EOFError, OSError):
            return number, task, None
        return number, task, pickle.loads(data)

    def remove_dead_worker(self, pipe: Connection) -> int | None:
        """Return the exit code of a worker that died: negative, the signal that killed it."""
        process = self._processes.pop(pipe)
        pipe.close()
        process.join()
        code = process.exitcode
        process.close()
        return code

    def stop(self) -> None:
        """Stop all workers and wait for their end."""
        self.shared_counts[-1] = 1
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


def _collect_results(
    pool: _WorkerPool[Task],
    make_task: Callable[[int], Task],
    count: int,
    workers: int,
    progress: Progress,
    on_timeout: OnTimeout[Task] | None,
) -> list[Any]:
    """Keep all workers busy until all tasks are done."""
    counts = np.frombuffer(pool.shared_counts, np.uint64)[:count]
    results: dict[int, Any] = {}
    numbers = iter(range(count))
    for pipe in [pool.start_worker() for _ in range(min(workers, count))]:
        number = next(numbers)
        pool.send_task(pipe, number, make_task(number))
    while pool.running:
        for pipe in pool.wait_for_answers(_BEAT):
            number, task, answer = pool.receive_answer(pipe)
            if answer is None:
                task = _repair_task(task, int(counts[number]), pool.remove_dead_worker(pipe), on_timeout)
                pool.send_task(pool.start_worker(), number, task)
                continue
            if answer.error is not None:
                raise answer.error from RuntimeError(answer.trace)
            results[number] = answer.result
            for number in itertools.islice(numbers, 1):
                pool.send_task(pipe, number, make_task(number))
        progress(int(counts.sum()))
    return [results[number] for number in range(count)]


def _repair_task(task: Task, position: int, exit_code: int | None, on_timeout: OnTimeout[Task] | None) -> Task:
    """Return the task to run again after a worker died. Raises UserError where no image is to blame."""
    if on_timeout is None or exit_code != -cpu_time.LIMIT_SIGNAL:
        raise UserError(
            "a worker process died, perhaps from lack of memory. Run the same command again with a smaller --workers."
        )
    return on_timeout(task, position)


@contextlib.contextmanager
def defer_interrupts() -> Iterator[None]:
    """Keep Ctrl-C from processes that are started in the block. This process gets it at the end of the block."""
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


def _serve(function: Callable[[Task, Tick], Any], shared_counts: Any, pipe: Connection) -> None:
    """Run in a worker: receive tasks and send answers until the parent closes the pipe."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")  # Pillow's about odd images: an image decodes or is rejected with its reason
    cpu_time.allow_kill()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            number, task = pipe.recv()
            pipe.send_bytes(_run_task(function, shared_counts, number, task))


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _run_task(function: Callable[[Task, Tick], Any], shared_counts: Any, number: int, task: Task) -> bytes:
    """Return a pickled answer."""

    def tick(done: int) -> None:
        shared_counts[number] = done
        if shared_counts[-1]:
            raise StoppedError

    try:
        return pickle.dumps(_Answer(function(task, tick)))
    except Exception as error:
        return _pickle_error(error, traceback.format_exc())


def _pickle_error(error: Exception, trace: str) -> bytes:
    """Return a pickled answer with an exception, in its own type where that survives pickling."""
    try:
        data = pickle.dumps(_Answer(None, error, trace))
        pickle.loads(data)
        return data
    except Exception:
        return pickle.dumps(_Answer(None, RuntimeError(trace), trace))
