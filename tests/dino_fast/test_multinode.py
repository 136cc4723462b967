"""More than one machine: torchruns that find each other over a network, lose each other, and run under Slurm.

The machines are processes here: on loopback, or in network namespaces that a virtual cable joins. Slurm is three
stand-ins, which do with processes what its commands do with machines.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dino_fast import checkpoint
from tests.dino_fast.conftest import ROOT, TINY
from tests.dino_fast.test_train import assert_equal_runs, rows_of, state_of

SBATCH = ROOT / "configs" / "slurm" / "train.sbatch"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def free_port(ports: Sequence[int] = (0,)) -> int:
    """One of `ports` that nobody listens at; by default any that the system finds."""
    for port in ports:
        with contextlib.suppress(OSError), socket.socket() as server:
            server.bind(("localhost", port))
            return server.getsockname()[1]
    raise AssertionError("no free port")


class Job:
    """A command under way, all that it starts, and what they print."""

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        self.log = log
        self._mark = f"TEST_JOB={log}"  # ranks are in sessions of their own, and may survive their torchrun
        with open(log, "w") as file:
            self._process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env={**environment, "TEST_JOB": str(log)},
                start_new_session=True,
            )  # fmt: skip

    def processes(self) -> set[int]:
        """The command's process, if it still runs, and all that came of it."""
        found = set()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self._mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.add(int(folder.name))
        return found

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def finish(self, timeout: float = 300) -> int:
        """Wait; the exit status."""
        return self._process.wait(timeout)

    def wait_until(self, condition: Callable[[], bool], timeout: float = 240) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert self._process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, "the moment never came: " + self.log.read_text()
            time.sleep(0.01)

    def kill(self) -> None:
        """kill -9 of the command and of all that it started."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """A function that starts a command; whatever is left of it is killed at the end."""
    jobs: list[Job] = []

    def begin(command: Sequence[str], **environment: str) -> Job:
        jobs.append(Job(command, tmp_path / f"log-{len(jobs)}.txt", {**ENVIRONMENT, **environment}))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.kill()


@dataclass(frozen=True)
class Machine:
    """Where a torchrun runs: what its command begins with, and its part of the rendezvous."""

    prefix: tuple[str, ...]
    rendezvous: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


@pytest.fixture(params=["loopback", "namespaces"])
def machines(request: pytest.FixtureRequest) -> Iterator[list[Machine]]:
    """Two machines; the first one hosts the rendezvous."""
    if request.param == "loopback":
        endpoint = f"localhost:{free_port()}"
        yield [Machine((), ("--rdzv-endpoint", endpoint, "--rdzv-conf", f"is_host={host}")) for host in (1, 0)]
        return
    names = [f"dino-{os.getpid()}-{number}" for number in range(2)]
    try:
        join_by_cable(names)
        yield [
            Machine(
                ("ip", "netns", "exec", name),
                (
                    "--rdzv-endpoint", "10.0.0.1:29500", "--rdzv-conf", f"is_host={1 - number}",
                    "--local-addr", f"10.0.0.{number + 1}",
                ),
                (("GLOO_SOCKET_IFNAME", "cable"),),
            )
            for number, name in enumerate(names)
        ]  # fmt: skip
    finally:
        for name in names:
            if shutil.which("ip"):
                subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def join_by_cable(names: list[str]) -> None:
    """Make two network namespaces of these names, 10.0.0.1 and 10.0.0.2; skips the test where that is not allowed."""
    first, second = names
    cable = f"link add cable netns {first} type veth peer name cable netns {second}"
    lines = [f"netns add {first}", f"netns add {second}", cable]
    for number, name in enumerate(names, start=1):
        lines += [f"-n {name} address add 10.0.0.{number}/24 dev cable"]
        lines += [f"-n {name} link set {link} up" for link in ("cable", "lo")]
    for line in lines:
        try:
            subprocess.run(["ip", *line.split()], capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces: {getattr(error, 'stderr', None) or error}")


@pytest.fixture
def node(start, labeled_shards: Path, tmp_path: Path) -> Callable[..., Job]:
    """A function that starts the torchrun of one machine, with one rank, for a tiny run."""

    def begin(machine: Machine, *arguments: str, output: str) -> Job:
        elastic = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"]
        command = [*machine.prefix, sys.executable, "-m", "torch.distributed.run", *elastic, *machine.rendezvous]
        data = ["--data.train", str(labeled_shards), "--output", str(tmp_path / output)]
        # What the README says: without it an agent that comes later waits for an address that nobody sends.
        environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **dict(machine.environment)}
        return start([*command, "-m", "dino_fast.train", *TINY, *data, *arguments], **environment)

    return begin


@pytest.mark.slow
def test_two_machines_are_one(node, run, machines: list[Machine], tmp_path: Path):
    """To the bit as one machine with two ranks; one process to what rounding leaves, as in test_train.py."""
    options = ("--max_steps", "4", "--head.batch_norm", "true", "--optim.lr", "1e-3", "--crops.local_size", "32")
    nodes = [node(machine, *options, output="nodes") for machine in machines]
    for job in nodes:
        assert job.finish() == 0, job.log.read_text()
    for output, ranks in (("ranks", 2), ("process", 1)):
        status, _, errors = run(*options, output=output, ranks=ranks).finish()
        assert status == 0, errors
    assert_equal_runs(tmp_path / "nodes", tmp_path / "ranks")
    many, one = state_of(tmp_path / "nodes")["model"], state_of(tmp_path / "process")["model"]
    for network in ("student", "teacher"):
        torch.testing.assert_close(many[network], one[network], rtol=1e-5, atol=1e-5)
    for row, other in zip(rows_of(tmp_path / "nodes"), rows_of(tmp_path / "process"), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_machine_that_dies_and_comes_back_joins_again(node, run, machines: list[Machine], tmp_path: Path):
    output = tmp_path / "killed"
    first, second = (node(machine, output="killed") for machine in machines)
    first.wait_until(lambda: len(rows_of(output)) >= 5)
    rank = first.processes()
    second.kill()
    first.wait_until(lambda: not rank <= first.processes())  # its rank noticed, and its torchrun waits
    before = [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(output)]
    assert max(before) < 12
    second = node(machines[1], output="killed")
    for job in (first, second):
        assert job.finish() == 0, job.log.read_text()
    assert f"resumed from step {max(before)} of" in first.log.read_text() + second.log.read_text()
    status, _, errors = run(output="whole", ranks=2).finish()
    assert status == 0, errors
    assert_equal_runs(tmp_path / "whole", output)


# ---- Slurm

SRUN = """#!/bin/bash
# Runs the command once a node, beside each other; passes SIGUSR1 on; is ended by SIGTERM, with all that it started.
while [[ $1 == --* ]]; do shift; done
tasks=()
trap 'kill -USR1 "${tasks[@]}" 2>/dev/null' USR1
trap 'kill -KILL "${tasks[@]}"; exit 143' TERM
for node in 0 1; do SLURM_NODEID=$node "$@" & tasks+=($!); done
status=0
for task in "${tasks[@]}"; do
  while kill -0 "$task" 2>/dev/null; do wait "$task"; done
  wait "$task" || status=$?
done
exit $status
"""

SCONTROL = """#!/bin/bash
case "$1 $2" in
  "show hostnames") printf 'localhost\\nlocalhost\\n' ;;
  requeue*) echo "$@" >> "$CALLS" ;;
esac
"""

# Instead of the real torchrun: how it was called, and then what the test asks for.
TORCHRUN = """#!/bin/bash
trap 'echo "node $SLURM_NODEID: warned" >> "$CALLS"; exit ${WARNED:-1}' USR1
echo "node $SLURM_NODEID: $*" >> "$CALLS"
eval "$BEHAVIOUR"
"""


@pytest.fixture
def sbatch(start, tmp_path: Path, labeled_shards: Path) -> Callable[..., Job]:
    """A function that runs the batch script as Slurm's batch shell would, on two nodes of one rank each.

    The lines after its EDIT marks are changed as a user would change them. `behaviour` is what a stand-in for torchrun
    does, in bash; without it the real one runs.
    """
    tools = tmp_path / "bin"
    tools.mkdir()

    def begin(*arguments: str, behaviour: str | None = None) -> Job:
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "torchrun": TORCHRUN}.items():
            if name != "torchrun" or behaviour is not None:
                (tools / name).write_text(text)
                (tools / name).chmod(0o755)
        words = " ".join(f"'{word}'" for word in (*TINY, "--data.train", str(labeled_shards), *arguments))
        script = SBATCH.read_text()
        for pattern, line in (
            (r"(?m)^source .*$", ":"),
            (r"(?m)^output=.*$", f"output='{tmp_path / 'run'}'"),
            (r"(?m)^run=\(.*$", f'run=({words} --output "$output")'),
        ):
            script, count = re.subn(pattern, lambda _, line=line: line, script)
            assert count == 1, pattern
        (tmp_path / "train.sbatch").write_text(script)
        return start(
            ["bash", str(tmp_path / "train.sbatch")],
            PATH=f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            CALLS=str(tmp_path / "calls"),
            BEHAVIOUR=behaviour or "",
            SLURM_JOB_ID=str(free_port(random.sample(range(10000, 30000), 100)) - 10000),  # the script's port
            SLURM_JOB_NODELIST="node[1-2]",
            SLURM_NNODES="2",
            SLURM_GPUS_ON_NODE="1",
            SLURM_CPUS_PER_TASK="1",
        )

    return begin


def calls_of(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []


def requeued(folder: Path) -> int:
    return sum(call.startswith("requeue ") for call in calls_of(folder))


def test_the_batch_script_is_sound():
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    text = SBATCH.read_text()
    assert len(re.findall(r"(?m)^# EDIT \d: ", text)) == 3
    # Slurm reads no option after the first command.
    assert text.rindex("#SBATCH") < text.index("set -euo pipefail")
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--exclude", "SC1091", str(SBATCH)], check=True)


def test_each_node_gets_one_torchrun_and_the_first_hosts_the_rendezvous(sbatch, tmp_path: Path):
    job = sbatch("--seed", "7", behaviour="exit 0")
    assert job.finish() == 0, job.log.read_text()
    calls = sorted(calls_of(tmp_path))
    assert [call.split(":")[0] for call in calls] == ["node 0", "node 1"]  # and no requeue
    assert ["is_host=1" in call for call in calls] == [True, False]
    assert ["is_host=0" in call for call in calls] == [False, True]
    endpoints = {re.search(r"--rdzv-endpoint (localhost:\d+) ", call)[1] for call in calls}
    assert len(endpoints) == 1
    for call in calls:
        assert "--nnodes 2 --nproc-per-node 1 " in call
        assert call.endswith(f" --seed 7 --output {tmp_path}/run")


@pytest.mark.parametrize(
    ("behaviour", "again"),
    [
        ("exit 3", 0),  # a wrong call fails the same way again
        ("touch {output}/step-00000006-{hash}.pt; exit 3", 1),  # got further: worth another start
        ("sleep 0.5; [[ $SLURM_NODEID == 0 ]] || exit 3", 0),  # one node's failure is the job's
    ],
)
def test_a_failed_run_is_queued_again_if_it_got_further(sbatch, tmp_path: Path, behaviour: str, again: int):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f"step-00000003-{'a' * 16}.pt").touch()
    job = sbatch(behaviour=behaviour.format(output=tmp_path / "run", hash="b" * 16))
    assert job.finish() == 3, job.log.read_text()
    assert requeued(tmp_path) == again


@pytest.mark.parametrize("warnings", [1, 3])
def test_a_warning_reaches_every_torchrun_and_queues_the_job_again(sbatch, tmp_path: Path, warnings: int):
    job = sbatch(behaviour="sleep 60 & wait")
    job.wait_until(lambda: len(calls_of(tmp_path)) == 2)
    for _ in range(warnings):
        job.send(signal.SIGUSR1)
    assert job.finish(timeout=30) == 1, job.log.read_text()
    calls = calls_of(tmp_path)
    assert {"node 0: warned", "node 1: warned"} <= set(calls)
    assert requeued(tmp_path) == 1


def test_a_run_that_ends_in_spite_of_a_warning_is_not_queued_again(sbatch, tmp_path: Path):
    job = sbatch(behaviour="WARNED=0; sleep 60 & wait")
    job.wait_until(lambda: len(calls_of(tmp_path)) == 2)
    job.send(signal.SIGUSR1)
    assert job.finish(timeout=30) == 0, job.log.read_text()
    assert requeued(tmp_path) == 0


def test_a_cancelled_job_is_not_queued_again(sbatch, tmp_path: Path):
    job = sbatch(behaviour="sleep 60")
    job.wait_until(lambda: len(calls_of(tmp_path)) == 2)
    job.send(signal.SIGTERM)
    assert job.finish(timeout=30) == -signal.SIGTERM
    assert requeued(tmp_path) == 0


@pytest.mark.slow
def test_a_job_that_runs_out_of_time_goes_on_when_it_starts_again(sbatch, run, tmp_path: Path):
    """The real torchrun: the warning becomes a checkpoint after the step, and the next start goes on from it."""
    output, options = tmp_path / "run", ("--checkpoint.every", "1000 steps")
    job = sbatch(*options)
    job.wait_until(lambda: len(rows_of(output)) >= 4)
    job.send(signal.SIGUSR1)
    assert job.finish() == 1, job.log.read_text()
    (saved,) = checkpoint.list_checkpoints(output)
    assert 4 <= checkpoint.step_of(saved) < 12
    assert f"stopped by a signal after step {checkpoint.step_of(saved)}" in job.log.read_text()
    assert requeued(tmp_path) == 1
    job = sbatch(*options)
    assert job.finish() == 0, job.log.read_text()
    assert f"resumed from step {checkpoint.step_of(saved)}" in job.log.read_text()
    assert requeued(tmp_path) == 1
    status, _, errors = run(*options, output="whole", ranks=2).finish()
    assert status == 0, errors
    assert_equal_runs(tmp_path / "whole", output)
