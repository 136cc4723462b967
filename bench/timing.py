"""Run the arms of a benchmark in turn, and measure times on a CPU or a GPU."""

import gc
import time
import traceback
from collections.abc import Callable, Mapping
from typing import TypeAlias, TypeVar

import torch

CLOCK = 2e9  # cycles a second of a GPU, at most

Figures: TypeAlias = dict[str, float]  # the numbers of one round of an arm, by the names of their metrics
Result = TypeVar("Result")


def run_interleaved(
    arms: Mapping[str, Callable[[], Result]],
    rounds: int,
    save: Callable[[dict[str, list[Result]]], None] = lambda _: None,
    uncounted: int = 1,
) -> dict[str, list[Result]]:
    """Run every arm `rounds` times in turn, and return the results of each arm. `uncounted` rounds come first.

    An arm that raises is left out, and the others go on. SystemExit is raised when none is left. `save` gets the
    results so far after each round. Before the first counted round it gets those of the uncounted round. A
    KeyboardInterrupt ends the rounds: the complete ones are returned. Without a complete round it is raised again.
    """
    running = dict(arms)
    counted: dict[str, list[Result]] = {name: [] for name in arms}
    complete = 0
    try:
        for number in range(uncounted + rounds):
            results = {name: result for name, arm in running.items() if (result := attempt(name, arm)) is not None}
            if not results:
                raise SystemExit("no arm is left")
            running = {name: running[name] for name in results}
            if number < uncounted:
                save({name: [result] for name, result in results.items()})
                continue
            for name, result in results.items():
                counted[name].append(result)
            complete += 1
            save({name: counted[name] for name in running})
    except KeyboardInterrupt:
        print(f"interrupted after {complete} of {rounds} rounds")
        if not complete:
            raise
    return {name: counted[name] for name in running}


def attempt(name: str, work: Callable[[], Result]) -> Result | None:
    """Return what `work` returns.

    If it raises, print one line with the reason and the traceback to stderr, and return None.
    """
    try:
        return work()
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        print_left_out(name, ": ".join([type(error).__name__, *lines[:1]]))
        traceback.print_exc()
    gc.collect()  # free what the failed arm held, above all the GPU's memory
    return None


def print_left_out(name: str, reason: str) -> None:
    """Print that something is not measured, and why."""
    print(f"left out: {name} ({reason})", flush=True)


def read_clock(device: torch.device) -> float:
    """Return the clock's time in seconds, once all work that was started on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure_device_time(work: Callable[[], object], iterations: int, device: torch.device) -> float:
    """Return the seconds of one of `iterations` calls of `work`.

    On a GPU these are the seconds that the GPU alone takes. The calls are made while it is busy with something else,
    for twice as long as the host needed for them before. A call that waits for the GPU itself includes that wait.
    """
    start = time.perf_counter()
    for _ in range(iterations):
        work()
    seconds = time.perf_counter() - start
    if device.type != "cuda":
        return seconds / iterations
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    torch.cuda._sleep(int(2 * seconds * CLOCK))
    first.record()
    for _ in range(iterations):
        work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / iterations
