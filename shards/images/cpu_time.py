"""A limit on the CPU time of a block of code, which the kernel enforces even within one call of a C library."""

import contextlib
import signal
from collections.abc import Iterator

LIMIT_SIGNAL = signal.SIGPROF  # what the kernel kills the process with


@contextlib.contextmanager
def limit_cpu_time(seconds: float | None) -> Iterator[None]:
    """Have the kernel kill this process if the block takes more than `seconds` of CPU time. None means no limit.

    Only for worker processes (`shards.packing.workers`), which call `allow_kill` first. It is CPU time so that a busy
    machine or a suspended run makes no image fail.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds or 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def allow_kill() -> None:
    """Let `LIMIT_SIGNAL` kill this process. A profiler of the caller may have set it up otherwise."""
    signal.signal(LIMIT_SIGNAL, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {LIMIT_SIGNAL})
