"""The Ray engine: the same contract as the pool of workers, on a cluster of two nodes and on one of its own.

Every driver is a process of its own: Ray leaves threads and open files behind.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.errors import UserError
from shards.packing import ray_engine
from shards.packing.workers import Tick
from tests.shards.packing.test_workers import wait_until_gone, workers_in

pytest.importorskip("ray")

ROOT = Path(__file__).resolve().parents[3]

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""

DRIVER = """
import sys
from pathlib import Path
from shards.errors import UserError
from shards.packing.ray_engine import run_tasks
from tests.shards.packing import test_ray, test_workers
folder = Path(sys.argv[1])
nothing = test_workers.nothing
try:
    exec(sys.argv[2])
except UserError as error:
    print("UserError:", error)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What the environment must hold to join a cluster of two nodes, with a CPU each, that know nothing of shards."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    folder = tmp_path_factory.mktemp("elsewhere")
    # Of their own: on a machine that has never run Ray nobody has one.
    (folder / "token").write_text("0" * 64)
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    # Ray notes the newest cluster of a machine in this folder, and drivers without an address would find it there.
    short = tempfile.mkdtemp(prefix="ray-")  # Ray's sockets lie in it, and their paths must not be long
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        cwd=folder,
        env=environment | access | {"RAY_TMPDIR": short},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        yield {"RAY_ADDRESS": process.stdout.readline().strip(), **access}
        process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        shutil.rmtree(short, ignore_errors=True)


def start(code: str, folder: Path, environment: dict[str, str], cwd: Path = ROOT) -> subprocess.Popen[str]:
    """A driver that runs `code`."""
    call = [sys.executable, "-c", DRIVER, str(folder), code]
    pipe = subprocess.PIPE
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        call, cwd=cwd, env=clean | environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def printed(code: str, folder: Path, environment: dict[str, str], cwd: Path = ROOT) -> str:
    """What `code` prints, which is all that anybody prints."""
    with start(code, folder, environment, cwd) as process:
        output, errors = process.communicate(timeout=120)
    assert errors == ""
    assert process.returncode == 0
    return output


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def place(task: int, tick: Tick) -> tuple[int, int]:
    """The task, and the process id of its node, which is the parent of a Ray worker, which is the worker's."""
    time.sleep(0.5)
    tick(10)
    return task, parent_of(os.getppid())


def test_results_come_in_the_order_of_the_tasks_from_both_nodes(cluster: dict[str, str], tmp_path: Path) -> None:
    code = """
heard = []
results = run_tasks(test_ray.place, lambda number: number, 6, 2, heard.append)
print([number for number, _ in results], len({node for _, node in results}), heard[-1], heard == sorted(heard))
"""
    assert printed(code, tmp_path, cluster) == "[0, 1, 2, 3, 4, 5] 2 60 True\n"


def test_an_image_over_the_limit_is_killed_and_condemned(cluster: dict[str, str], tmp_path: Path) -> None:
    code = """
tasks = [test_workers.Images(("good", kind, "good", kind)) for kind in ("good", "holds")]
print(run_tasks(test_workers.judge, tasks.__getitem__, 2, 2, nothing, test_workers.condemn))
"""
    judged = [["good", "good", "good", "good"], ["good", "-", "good", "-"]]
    assert printed(code, tmp_path, cluster) == f"{judged}\n"


def test_the_first_exception_stops_the_others_and_no_more_tasks_are_made(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    code = """
made = []
def make_task(number):
    made.append(number)
    return number, folder
try:
    run_tasks(test_workers.fail_first, make_task, 10**6, 2, nothing)
finally:
    print(made, (folder / "stopped").exists())
"""
    assert printed(code, tmp_path, cluster) == "[0, 1, 2, 3] True\nUserError: no\n"


def test_an_exception_arrives_as_what_it_was(cluster: dict[str, str], tmp_path: Path) -> None:
    code = """
for kind in range(4):
    try:
        run_tasks(test_workers.fail, lambda number: kind, 1, 1, nothing)
    except Exception as error:
        print(type(error).__name__, repr(str(error)) if kind < 2 else "", "in fail" in str(error.__cause__))
"""
    expected = ["UserError 'a\\nb: mend it' True", "KeyError \"'a key'\" True", *["RuntimeError  True"] * 2]
    assert printed(code, tmp_path, cluster).splitlines() == expected


def kill_parent(task: int, tick: Tick) -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "line"),
    [("test_workers.die", "a worker process died, perhaps"), ("test_ray.kill_parent", "Ray could not run a task (")],
)
def test_a_killed_worker_is_an_error_of_the_user(
    cluster: dict[str, str], tmp_path: Path, function: str, line: str
) -> None:
    code = f"run_tasks({function}, lambda number: number, 2, 2, nothing)"
    *_, last = printed(code, tmp_path, cluster).splitlines()  # where Ray lost its own process, it says so before
    assert last.startswith(f"UserError: {line}")


@pytest.mark.slow
def test_nodes_without_the_package_are_named(cluster: dict[str, str], tmp_path: Path) -> None:
    code = "run_tasks(test_workers.square, int, 2, 2, nothing)"
    output = printed(code, tmp_path, {**cluster, "PYTHONPATH": str(ROOT)}, cwd=tmp_path)
    assert output.startswith("UserError: Ray could not run a task (System error: No module named 'tests'). Check that")
    assert output.count("\n") == 1


@pytest.mark.slow
def test_a_cluster_of_its_own_leaves_nothing_behind(tmp_path: Path) -> None:
    code = "print(run_tasks(test_workers.square, int, 5, 2, nothing))"
    with start(code, tmp_path, {}) as process:
        output, errors = process.communicate(timeout=120)
    assert (process.returncode, output, errors) == (0, "[0, 1, 4, 9, 16]\n", "")
    wait_until_gone(process.pid, 5)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_a_scheduler_end_all_of_it(tmp_path: Path, number: signal.Signals) -> None:
    process = start("run_tasks(test_workers.counting, lambda number: folder, 4, 2, nothing)", tmp_path, {})
    workers_in(tmp_path)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert (output, errors) == ("interrupted\n", "")
    wait_until_gone(process.pid, 5)


@pytest.mark.slow
def test_workers_do_not_outlive_the_driver(tmp_path: Path) -> None:
    process = start("run_tasks(test_workers.busy, lambda number: folder, 4, 2, nothing)", tmp_path, {})
    workers = workers_in(tmp_path)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20  # Ray takes about four seconds to notice
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker lives on"
        time.sleep(0.05)


def test_an_address_where_nobody_answers_is_said_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    code = "run_tasks(test_workers.square, int, 2, 2, nothing)"
    output = printed(code, tmp_path, {"RAY_ADDRESS": "127.0.0.1:1"})
    assert (
        output == "UserError: RAY_ADDRESS=127.0.0.1:1: Connection refused. Start the cluster, or correct or unset it.\n"
    )
    assert time.monotonic() - began < 10


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[ray\]"'):
        ray_engine.run_tasks(place, int, 2, 2, lambda images: None)
