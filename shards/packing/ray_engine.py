"""Tasks over a Ray cluster: each runs on some node, there in a worker process of its own that may be killed."""

import contextlib
import itertools
import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from shards.errors import UserError
from shards.packing import workers as local
from shards.packing.workers import Overrun, Progress, Result, Task, Tick

_BEAT = 0.2  # seconds between two calls of `progress` at most
_ASK = 1.0  # seconds between a task's looks at whether it is to stop
_GRACE = 10.0  # seconds for tasks to end then; `shards.packing.workers` needs two, a process of Ray's some to start
_STORE = 256 * 2**20  # bytes of shared memory for tasks and results on this machine


def run_tasks(
    function: Callable[[Task, Tick], Result],
    task_of: Callable[[int], Task],
    count: int,
    workers: int,
    progress: Progress,
    overrun: Overrun[Task] | None = None,
) -> list[Result]:
    """As `workers.run_tasks`, on the Ray cluster at RAY_ADDRESS, on the one that 'ray start' has joined this
    machine to, or else on this machine with `workers` CPUs. Twice `workers` tasks are out at a time.

    Nodes of a cluster need dino_fast installed, and SRC and OUT at the same place: a shared file system, or URLs.
    `progress` hears of finished tasks only; `overrun` is called on the node. Raises UserError where Ray is not
    installed, its cluster cannot be reached, or it loses a task.
    """
    ray = _imported()
    with _connected(ray, workers):
        try:
            return _collect(ray, function, task_of, count, 2 * workers, progress, overrun)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", error)  # what was raised on the node, if anything was
            if not isinstance(cause, ray.exceptions.RayError):
                raise cause from error
            reason = str(cause).strip().partition("\n")[0]
            mend = "see that every node has this dino_fast installed, then run the same command again"
            raise UserError(f"Ray could not run a task ({reason}); {mend}") from error


def _imported() -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError('Ray is not installed; pip install -e ".[ray]", or use --engine local') from error
    return ray


@contextlib.contextmanager
def _connected(ray: Any, workers: int) -> Iterator[None]:
    """Joined to a cluster; the caller's own connection, where there is one, is used and left as it is."""
    if ray.is_initialized():
        yield
        return
    try:
        with _hushed():
            _connect(ray, workers)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        mend = "see to RAY_ADDRESS, RAY_AUTH_MODE=token, a TMPDIR with a short path, and 'ray status'"
        raise UserError(f"cannot join a Ray cluster: {reason}; {mend}") from error
    try:
        with _sigterm_as_interrupt():
            yield
    finally:
        ray.shutdown()


def _connect(ray: Any, workers: int) -> None:
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address := os.environ.get("RAY_ADDRESS"):
        _probe(address)
    else:
        # Refused where 'ray start' has been run. Not address="auto", which would join, for the lack of such a cluster,
        # the local one of another make-shards, to lose it when that one is done.
        with contextlib.suppress(ValueError), local.interrupts_deferred():  # cut short, some of its processes live on
            ray.init(num_cpus=workers, object_store_memory=_STORE, include_dashboard=False, **quiet)
            return
    ray.init(**quiet)


def _probe(address: str) -> None:
    """Raise UserError at once where Ray would try for minutes, and say so at length."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"RAY_ADDRESS={address}: {reason}; start the cluster, or mend or unset it") from error


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Without what Ray's C code would write to stderr every second of 20; its exception says the same, once."""
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Ray's own handler, in place by now, prints the stack of its C code and may abort."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _collect(
    ray: Any,
    function: Callable[[Task, Tick], Result],
    task_of: Callable[[int], Task],
    count: int,
    ahead: int,
    progress: Progress,
    overrun: Overrun[Task] | None,
) -> list[Result]:
    """Keep `ahead` tasks out until all are done."""
    # Not tried again where a node is lost or out of memory: the first attempt might still be writing.
    remote = ray.remote(max_retries=0)(_run_one)
    stop = f"make-shards-stop-{uuid.uuid4().hex}".encode()
    results: dict[int, Result] = {}
    running: dict[Any, int] = {}
    numbers = iter(range(count))
    pictures = 0
    try:
        while len(results) < count:
            for number in itertools.islice(numbers, ahead - len(running)):
                running[remote.remote(function, task_of(number), stop, overrun)] = number
            for done in ray.wait(list(running), timeout=_BEAT)[0]:
                number = running.pop(done)
                results[number], judged = ray.get(done)
                pictures += judged
            progress(pictures)
    finally:
        _stop(ray, list(running), stop)
    return [results[number] for number in range(count)]


def _stop(ray: Any, tasks: list[Any], stop: bytes) -> None:
    """Have tasks end within a picture, and wait for it.

    By a key in the cluster's store: some tasks do not hear `ray.cancel`, and it aborts this process where one ends
    at that moment.
    """
    if tasks:
        kv = ray.experimental.internal_kv
        kv._internal_kv_put(stop, b"")
        ray.wait(tasks, num_returns=len(tasks), timeout=_GRACE)
        kv._internal_kv_del(stop)


def _run_one(
    function: Callable[[Task, Tick], Result], task: Task, stop: bytes, overrun: Overrun[Task] | None
) -> tuple[Result, int]:
    """On a node: the result of a task, and how many pictures it had. Raises StoppedError where `stop` is stored."""
    vars(sys.modules["__main__"]).pop("__file__", None)  # Ray's own script, which our worker need not import
    pictures, asked = 0, -_ASK

    def hear(done: int) -> None:
        nonlocal pictures, asked
        pictures = done
        if time.monotonic() - asked > _ASK:
            _refuse_stopped(stop)
            asked = time.monotonic()

    hear(0)
    results = local.run_tasks(function, lambda number: task, 1, 1, hear, overrun)
    return results[0], pictures


def _refuse_stopped(stop: bytes) -> None:
    from ray.experimental.internal_kv import _internal_kv_exists

    if _internal_kv_exists(stop):
        raise local.StoppedError
