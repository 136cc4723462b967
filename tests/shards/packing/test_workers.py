"""The pool of worker processes: what comes back, how it ends, and that nothing is left of it. Real processes."""

import hashlib
import importlib
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest

from shards.errors import UserError
from shards.images.cpu_time import limit_cpu_time
from shards.packing.workers import StoppedError, Tick, run_tasks

ROOT = Path(__file__).resolve().parents[3]
LIMIT = 0.3  # CPU seconds an image


def nothing(images: int) -> None:
    """A progress that nobody looks at."""


@pytest.fixture(autouse=True)
def _no_child_is_left() -> Iterator[None]:
    yield
    assert not multiprocessing.active_children()


def square(task: int, tick: Tick) -> int:
    time.sleep(0.02 if task % 2 else 0)  # so that tasks do not end in their order
    return task * task


@pytest.mark.parametrize(("count", "workers"), [(0, 2), (1, 3), (9, 1), (9, 2), (9, 4)])
def test_results_come_in_the_order_of_the_tasks(count: int, workers: int) -> None:
    assert run_tasks(square, lambda number: number + 1, count, workers, nothing) == [
        (number + 1) ** 2 for number in range(count)
    ]


def test_no_more_workers_than_tasks() -> None:
    alive = []
    run_tasks(square, int, 1, 3, lambda images: alive.append(len(multiprocessing.active_children())))
    assert set(alive) == {1}


def count_slowly(task: int, tick: Tick) -> None:
    for place in range(task):
        tick(place)
        time.sleep(0.01)
    tick(task)


def test_progress_rises_to_all_images() -> None:
    heard: list[int] = []
    run_tasks(count_slowly, lambda number: [30, 5, 40][number], 3, 2, heard.append)
    assert heard == sorted(heard)
    assert heard[-1] == 75
    assert len(set(heard)) > 3  # not by whole tasks


class LocalError(Exception):
    """Cannot be made again from its text alone."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


class CarryingError(Exception):
    """Holds what cannot be sent."""

    def __init__(self) -> None:
        super().__init__()
        self.function: Callable[[], None] = lambda: None


def fail(task: int, tick: Tick) -> NoReturn:
    raise [UserError("a\nb: mend it"), KeyError("a key"), LocalError("one", "two"), CarryingError()][task]


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        (0, UserError, r"^a\nb: mend it$"),
        (1, KeyError, "^'a key'$"),
        (2, RuntimeError, r"(?s)Traceback.*in fail.*LocalError: onetwo"),
        (3, RuntimeError, r"(?s)Traceback.*in fail.*CarryingError"),
    ],
)
def test_an_exception_arrives_as_what_it_was(kind: int, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as raised:
        run_tasks(fail, lambda number: kind, 1, 1, nothing)
    assert "in fail" in str(raised.value.__cause__)


def unsendable(task: int, tick: Tick) -> Callable[[], None]:
    return lambda: None


def test_a_result_that_cannot_be_sent_is_an_error() -> None:
    with pytest.raises(Exception, match="lambda"):
        run_tasks(unsendable, int, 1, 1, nothing)


def fail_first(task: tuple[int, Path], tick: Tick) -> None:
    """Task 0 fails as soon as another works, which leaves word when it is stopped."""
    number, folder = task
    (folder / f"at work {number}").touch()
    if number == 0:
        while not (folder / "at work 1").exists():
            time.sleep(0.01)
        raise UserError("no")
    try:
        while True:
            tick(0)
            time.sleep(0.01)
    except StoppedError:
        (folder / "stopped").touch()
        raise


def test_the_first_exception_stops_the_others_and_no_more_tasks_are_made(tmp_path: Path) -> None:
    made = []

    def make_task(number: int) -> tuple[int, Path]:
        made.append(number)
        return number, tmp_path

    began = time.monotonic()
    with pytest.raises(UserError, match=r"^no$"):
        run_tasks(fail_first, make_task, 10**6, 2, nothing)
    assert time.monotonic() - began < 5
    assert made == [0, 1]
    assert (tmp_path / "stopped").exists()


def fail_or_hang(task: int, tick: Tick) -> None:
    if task == 0:
        raise UserError("no")
    time.sleep(1000)


def test_a_stuck_worker_does_not_hold_up_a_failure() -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=r"^no$"):
        run_tasks(fail_or_hang, int, 2, 2, nothing)
    assert time.monotonic() - began < 10


def test_an_exception_in_the_parent_ends_the_workers() -> None:
    def progress(images: int) -> NoReturn:
        raise OSError("no terminal")

    with pytest.raises(OSError, match="no terminal"):
        run_tasks(count_slowly, lambda number: 10**6, 2, 2, progress)


def large(task: bytes, tick: Tick) -> bytes:
    return task[::-1]


def test_tasks_and_results_larger_than_a_pipe() -> None:
    data = os.urandom(5_000_000)
    assert run_tasks(large, lambda number: data, 3, 2, nothing) == [data[::-1]] * 3


def die(task: int, tick: Tick) -> None:
    if task == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    count_slowly(20, tick)


def test_a_killed_worker_is_an_error_of_the_user() -> None:
    with pytest.raises(UserError, match=r"a worker process died, perhaps from lack of memory.*--workers"):
        run_tasks(die, int, 4, 2, nothing, lambda task, place: pytest.fail("nothing overran"))


# The time limit


class Images(NamedTuple):
    """A task for `judge`: what is done for each of its images."""

    kinds: tuple[str, ...]
    condemned: tuple[int, ...] = ()


def condemn(task: Images, place: int) -> Images:
    return task._replace(condemned=(*task.condemned, place))


def judge(task: Images, tick: Tick) -> list[str]:
    """The images that were judged; "-" for a condemned one."""
    judged = []
    for place, kind in enumerate(task.kinds):
        tick(place)
        if place in task.condemned:
            judged.append("-")
            continue
        with limit_cpu_time(LIMIT):
            WORK[kind]()
        judged.append(kind)
    tick(len(task.kinds))
    return judged


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


WORK: dict[str, Callable[[], Any]] = {
    "good": lambda: None,
    "slow": lambda: burn(0.4 * LIMIT),
    "asleep": lambda: time.sleep(3 * LIMIT),
    "holds": lambda: pow(3, 10**9),  # minutes within one call, nothing else runs in Python
    "lets go": lambda: hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9),  # the same, but other threads run
}


@pytest.mark.parametrize("bomb", ["holds", "lets go"])
def test_an_image_over_the_limit_is_killed_and_condemned_and_no_other(bomb: str) -> None:
    good = Images(("good",) * 5)
    tasks = [good, Images(("good", "good", bomb, "good", bomb)), good, Images((bomb,))]
    overrun = []

    def condemned(task: Images, place: int) -> Images:
        overrun.append((tasks.index(task._replace(condemned=())), place))
        return condemn(task, place)

    before = cpu_of_children()
    judged = run_tasks(judge, tasks.__getitem__, 4, 2, nothing, condemned)
    spent = cpu_of_children() - before
    assert judged == [["good"] * 5, ["good", "good", "-", "good", "-"], ["good"] * 5, ["-"]]
    assert sorted(overrun) == [(1, 2), (1, 4), (3, 0)]
    assert 3 * LIMIT < spent < 3 * (LIMIT + 1)


def cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_the_limit_is_cpu_time_of_one_image() -> None:
    """One that waits is no bomb, nor are many that together take longer than the limit."""
    task = Images(("asleep", "slow", "slow", "slow", "slow"))
    judged = run_tasks(judge, lambda number: task, 1, 1, nothing, lambda task, place: pytest.fail("nothing overran"))
    assert judged == [list(task.kinds)]


def outside(task: float | None, tick: Tick) -> str:
    """Takes longer than the limit after an image, with an exception in it, or in one without a limit."""
    try:
        with limit_cpu_time(task):
            raise ValueError
    except ValueError:
        burn(2 * LIMIT)
    with limit_cpu_time(None):
        burn(2 * LIMIT)
    return "lives"


def test_the_limit_ends_with_the_image() -> None:
    assert run_tasks(outside, lambda number: LIMIT, 1, 1, nothing) == ["lives"]


def test_an_overrun_that_nobody_expects_is_a_died_worker() -> None:
    with pytest.raises(UserError, match="a worker process died"):
        run_tasks(judge, lambda number: Images(("holds",)), 1, 1, nothing)


def test_a_caller_that_ignores_or_blocks_the_signal_does_not_lift_the_limit() -> None:
    before = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF})
    try:
        judged = run_tasks(judge, lambda number: Images(("holds",)), 1, 1, nothing, condemn)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
        signal.signal(signal.SIGPROF, before)
    assert judged == [["-"]]


# A parent of its own


def busy(folder: Path, tick: Tick) -> None:
    """Leaves its process id, then is in a C call that no stop flag reaches."""
    (folder / str(os.getpid())).touch()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)


def counting(folder: Path, tick: Tick) -> None:
    (folder / str(os.getpid())).touch()
    count_slowly(10**6, tick)


def parent(function: str, folder: Path) -> subprocess.Popen[str]:
    """Runs `function` in two workers; ends with one line and status 130 on Ctrl-C."""
    code = f"""
import pathlib, sys
from shards.packing.workers import run_tasks
from {__name__} import {function}
print("up", flush=True)
try:
    run_tasks({function}, lambda number: pathlib.Path(sys.argv[1]), 2, 2, lambda images: None)
except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)
"""
    call = [sys.executable, "-c", code, str(folder)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(call, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def workers_in(folder: Path) -> list[int]:
    """The ids of the two workers, as soon as both are at work."""
    deadline = time.monotonic() + 30
    while len(names := os.listdir(folder)) < 2:
        assert time.monotonic() < deadline, "no two workers at work"
        time.sleep(0.01)
    return list(map(int, names))


def wait_until_gone(session: int, seconds: float) -> None:
    """Wait for every process of a session: workers, and those that the standard library starts beside them."""
    deadline = time.monotonic() + seconds
    while living := session_members(session):
        assert time.monotonic() < deadline, f"still alive: {living}"
        time.sleep(0.01)


def session_members(session: int) -> list[str]:
    living = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, own = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(own) == session and state != "Z":
            living.append(path.parent.name)
    return living


@pytest.mark.parametrize("function", ["busy", "counting"])
def test_workers_are_gone_a_second_after_their_parent(tmp_path: Path, function: str) -> None:
    process = parent(function, tmp_path)
    workers_in(tmp_path)
    process.kill()
    wait_until_gone(process.pid, 1)
    process.communicate()


@pytest.mark.parametrize("function", ["busy", "counting"])
def test_ctrl_c_is_for_the_parent_alone(tmp_path: Path, function: str) -> None:
    process = parent(function, tmp_path)
    workers_in(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "interrupted\n")
    wait_until_gone(process.pid, 1)


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.0, 0.01, 0.03, 0.1, 0.2])
def test_ctrl_c_while_the_workers_start(tmp_path: Path, after: float) -> None:
    process = parent("counting", tmp_path)
    time.sleep(after)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode in (130, -signal.SIGINT)
    assert errors in ("interrupted\n", "") or errors.endswith("KeyboardInterrupt\n")
    assert errors.count("Traceback") <= 1  # of the parent, where it had not come to its `try`
    wait_until_gone(process.pid, 1)


def test_a_second_ctrl_c_kills_at_once(tmp_path: Path) -> None:
    process = parent("busy", tmp_path)
    workers_in(tmp_path)
    began = time.monotonic()
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.3)
    process.communicate(timeout=30)
    assert time.monotonic() - began < 1.5
    wait_until_gone(process.pid, 1)


def test_memory_is_flat_in_the_number_of_tasks() -> None:
    """Tasks and images of 1 MB by the hundred; the peak is of a process that does nothing else."""
    code = f"""
import pathlib
from shards.packing.workers import run_tasks
from {__name__} import size_of, nothing
peak = lambda: int(pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
run_tasks(size_of, lambda number: b"x" * 10**6, 4, 2, nothing)
before = peak()
assert run_tasks(size_of, lambda number: b"x" * 10**6, 300, 2, nothing) == [10**6] * 300
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert int(done.stdout) < 30_000  # KiB


def size_of(task: bytes, tick: Tick) -> int:
    return len(task)


def test_workers_import_nothing_for_the_screen_or_for_clusters() -> None:
    assert run_tasks(screen_modules, int, 1, 1, nothing) == [[]]


def screen_modules(task: int, tick: Tick) -> list[str]:
    for module in ("shards.packing.pack", "shards.inspect.check"):  # what the workers of the commands import
        importlib.import_module(module)
    return [name for name in ("rich", "ray", "torch", "pyarrow", "fsspec", "scipy") if name in sys.modules]
