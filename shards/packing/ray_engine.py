"""Run tasks on a Ray cluster. On its node, each task runs in a worker process of its own, which may be killed."""

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
from shards.packing.workers import OnTimeout, Progress, Result, Task, Tick

_BEAT = 0.2  # seconds between two calls of `progress` at most
_ASK = 1.0  # seconds after which a task asks again whether it must stop
_GRACE = 10.0  # seconds for tasks to end then; `shards.packing.workers` needs two, a process of Ray's some to start
_STORE = 256 * 2**20  # bytes of shared memory for tasks and results on this machine


def run_tasks(
    function: Callable[[Task, Tick], Result],
    make_task: Callable[[int], Task],
    count: int,
    workers: int,
    progress: Progress,
    on_timeout: OnTimeout[Task] | None = None,
) -> list[Result]:
    """Do what `workers.run_tasks` does, on a Ray cluster. Twice `workers` tasks are out at a time.

    The cluster is the one at RAY_ADDRESS, or the one that 'ray start' has joined this machine to, or else a new one on
    this machine with `workers` CPUs. Its nodes need dino_fast installed, and SRC and OUT at the same place: a shared
    file system, or URLs. `progress` hears of finished tasks only. `on_timeout` is called on the node. Raises UserError
    where Ray is not installed, its cluster cannot be reached, or it loses a task.
    """
    ray = _import_ray()
    with _connect_to_cluster(ray, workers):
        try:
            return _collect_results(ray, function, make_task, count, 2 * workers, progress, on_timeout)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", error)  # what was raised on the node, if anything was
            if not isinstance(cause, ray.exceptions.RayError):
                raise cause from error
            reason = str(cause).strip().partition("\n")[0]
            fix = "Check that every node has this dino_fast installed, then run the same command again."
            raise UserError(f"Ray could not run a task ({reason}). {fix}") from error


def _import_ray() -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "Ray is not installed. Install it with 'pip install -e \".[ray]\"', or use --engine local."
        ) from error
    return ray


@contextlib.contextmanager
def _connect_to_cluster(ray: Any, workers: int) -> Iterator[None]:
    """Connect to a cluster for the block. A connection that the caller has is used and left as it is."""
    if ray.is_initialized():
        yield
        return
    try:
        with _silence_stderr():
            _init_ray(ray, workers)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        fix = "Check RAY_ADDRESS, RAY_AUTH_MODE=token, that TMPDIR has a short path, and 'ray status'."
        raise UserError(f"cannot join a Ray cluster: {reason}. {fix}") from error
    try:
        with _turn_sigterm_into_interrupt():
            yield
    finally:
        ray.shutdown()


def _init_ray(ray: Any, workers: int) -> None:
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address := os.environ.get("RAY_ADDRESS"):
        _check_address(address)
    else:
        # Refused where 'ray start' has been run. Not address="auto": without such a cluster, that would join the local
        # cluster of another make-shards, and lose it when that one is done.
        with contextlib.suppress(ValueError), local.defer_interrupts():  # cut short, some of its processes live on
            ray.init(num_cpus=workers, object_store_memory=_STORE, include_dashboard=False, **quiet)
            return
    ray.init(**quiet)


def _check_address(address: str) -> None:
    """Raise UserError at once where Ray would retry for minutes and print much."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"RAY_ADDRESS={address}: {reason}. Start the cluster, or correct or unset it.") from error


@contextlib.contextmanager
def _silence_stderr() -> Iterator[None]:
    """Hide what Ray's C code would write to stderr every second of 20. Its exception says the same, once."""
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
def _turn_sigterm_into_interrupt() -> Iterator[None]:
    """Replace Ray's own handler, which prints the stack of its C code and may abort."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _collect_results(
    ray: Any,
    function: Callable[[Task, Tick], Result],
    make_task: Callable[[int], Task],
    count: int,
    ahead: int,
    progress: Progress,
    on_timeout: OnTimeout[Task] | None,
) -> list[Result]:
    """Keep `ahead` tasks out until all are done."""
    # No retry where a node is lost or out of memory: the first attempt might still be writing.
    remote = ray.remote(max_retries=0)(_run_one)
    stop_key = f"make-shards-stop-{uuid.uuid4().hex}".encode()
    results: dict[int, Result] = {}
    running: dict[Any, int] = {}
    numbers = iter(range(count))
    images = 0
    try:
        while len(results) < count:
            for number in itertools.islice(numbers, ahead - len(running)):
                running[remote.remote(function, make_task(number), stop_key, on_timeout)] = number
            for done in ray.wait(list(running), timeout=_BEAT)[0]:
                number = running.pop(done)
                results[number], count_of_task = ray.get(done)
                images += count_of_task
            progress(images)
    finally:
        _stop_tasks(ray, list(running), stop_key)
    return [results[number] for number in range(count)]


def _stop_tasks(ray: Any, tasks: list[Any], stop_key: bytes) -> None:
    """Stop tasks within one image, and wait for them.

    It is done by a key in the cluster's store: some tasks do not notice `ray.cancel`, and it aborts this process where
    one ends at that moment.
    """
    if tasks:
        kv = ray.experimental.internal_kv
        kv._internal_kv_put(stop_key, b"")
        ray.wait(tasks, num_returns=len(tasks), timeout=_GRACE)
        kv._internal_kv_del(stop_key)


def _run_one(
    function: Callable[[Task, Tick], Result], task: Task, stop_key: bytes, on_timeout: OnTimeout[Task] | None
) -> tuple[Result, int]:
    """Return the result of a task and how many images it had. Runs on a node.

    Raises StoppedError where `stop_key` is in the store.
    """
    vars(sys.modules["__main__"]).pop("__file__", None)  # Ray's own script, which our worker need not import
    images, asked = 0, -_ASK

    def progress(done: int) -> None:
        nonlocal images, asked
        images = done
        if time.monotonic() - asked > _ASK:
            _raise_if_stopped(stop_key)
            asked = time.monotonic()

    progress(0)
    results = local.run_tasks(function, lambda number: task, 1, 1, progress, on_timeout)
    return results[0], images


def _raise_if_stopped(stop_key: bytes) -> None:
    from ray.experimental.internal_kv import _internal_kv_exists

    if _internal_kv_exists(stop_key):
        raise local.StoppedError
