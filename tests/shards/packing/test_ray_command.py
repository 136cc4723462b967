"""make-shards --engine ray, through the real command: the bytes of the local engine, and not a word of Ray's."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.shards.archives import make_slow_images
from tests.shards.s3 import s3_server

pytest.importorskip("ray")

Command = Callable[..., subprocess.CompletedProcess[str]]
Contents = Callable[[Path], dict[str, bytes]]
ROOT = Path(__file__).resolve().parents[3]
OPTIONS = ("--shard-size", "12kB", "--seed", "5")
RAY = ("--engine", "ray", "--workers", "2")
MARK = "MAKE_SHARDS_TEST"  # in the environment of every process that a test starts
INTERRUPTED = "make-shards: interrupted. Run the same command again to go on from here.\n"


def without_progress(errors: str) -> str:
    """Return what a command printed, without the lines that say every ten seconds how far it is."""
    return "".join(line for line in errors.splitlines(keepends=True) if not line.startswith("packing: "))


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What the environment of a test's processes holds, and nothing of Ray's. None of them may be left in the end."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory() as short:  # Ray puts sockets below it, whose paths may have 107 bytes
        monkeypatch.setenv("TMPDIR", short)
        monkeypatch.setenv(MARK, mark)
        yield mark
        wait_until_none(mark)


def marked(mark: str) -> list[bytes]:
    """The command lines of the processes with a mark."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes())
        except OSError:
            continue  # it has ended, or is another user's
    return found


def wait_until_none(mark: str, kind: bytes = b"", seconds: float = 10) -> None:
    """No process with the mark lives that has `kind` in its command line."""
    deadline = time.monotonic() + seconds
    while left := [line for line in marked(mark) if kind in line]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """What the environment must hold to join a cluster of one node with 2 CPUs that 'ray start' has made."""
    mark, token = uuid.uuid4().hex, uuid.uuid4().hex
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))}
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    with tempfile.TemporaryDirectory() as folder:
        call = [shutil.which("ray", path=os.path.dirname(sys.executable)) or "ray", "start", "--head", "--block"]
        call += ["--num-cpus", "2", "--port", "0", "--include-dashboard", "false", "--temp-dir", folder]
        process = subprocess.Popen(
            call,
            cwd=folder,
            env=clean | secret | {MARK: mark, "RAY_USAGE_STATS_ENABLED": "0"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            address = Path(folder, "ray_current_cluster")
            while not address.exists():
                assert process.poll() is None
                time.sleep(0.05)
            yield {"RAY_ADDRESS": address.read_text().strip(), **secret, "MARK_OF_CLUSTER": mark}
        finally:
            process.terminate()  # it ends those that it has started
            process.wait(30)
            wait_until_none(mark)


@pytest.fixture
def joined(cluster: dict[str, str], mark: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Commands join the cluster; the mark of its processes, of which no packer's may be left in the end."""
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)
    return cluster["MARK_OF_CLUSTER"]


def odd(tree: Path) -> Path:
    """A tree with images that do not decode, a duplicate, and one of 40 bytes that takes a second of CPU time."""
    shutil.copy(tree / "cat" / "deep" / "0.jpg", tree / "cat" / "again.jpg")
    Image.new("RGB", (10_000, 10_000)).save(tree / "dog" / "long.webp", lossless=True, method=0, quality=0)
    return tree


def started(source: Path, out: Path) -> subprocess.Popen[str]:
    """A packing on Ray that has finished a shard, in a process group of its own."""
    call = [sys.executable, "-m", "shards", "pack", str(source), str(out), "--shard-size", "8kB", *RAY]
    pipe = subprocess.PIPE
    process = subprocess.Popen(call, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    while not list(out.glob(".parts/*.part")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return process


def lines(run: subprocess.CompletedProcess[str]) -> list[str]:
    """What a run printed that went well, but for the place and the time that it took."""
    assert run.returncode == 0, run
    assert not re.sub(r"packing: .* images, .* img/s.*\n", "", run.stderr)  # its own, every ten seconds
    return [re.sub(r"\S*/(local|ray)\b", "OUT", line) for line in run.stdout.splitlines() if "img/s" not in line]


def complaint(run: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr of a run that failed."""
    assert run.returncode == 1, run
    (line,) = run.stderr.splitlines()
    assert line.startswith("make-shards: ")
    assert len(run.stdout.splitlines()) == 1  # what was found in the source
    return line


def test_the_bytes_are_those_of_one_local_worker(
    command: Command, tree: Path, tmp_path: Path, mark: str, contents: Contents
) -> None:
    options = (*OPTIONS, "--image-seconds", 0.25)
    local = command("pack", odd(tree), tmp_path / "local", *options, "--workers", 1)
    on_ray = command("pack", tree, tmp_path / "ray", *options, *RAY)
    assert lines(on_ray) == lines(local)
    packed = contents(tmp_path / "ray")
    assert packed == contents(tmp_path / "local")
    assert b"dog/long.webp,takes more than 0.25 s of CPU time (--image-seconds)" in packed["rejected.csv"]
    assert packed["rejected.csv"].count(b"\n") == 6
    assert packed["duplicates.csv"].count(b"\n") == 2
    assert sum(name.endswith(".tar") for name in packed) > 3


@pytest.mark.slow
def test_a_cluster_that_was_started_before_is_joined(
    command: Command, tree: Path, tmp_path: Path, joined: str, contents: Contents
) -> None:
    command("pack", odd(tree), tmp_path / "local", *OPTIONS, "--image-seconds", 0.25, "--workers", 1)
    lines(command("pack", tree, tmp_path / "ray", *OPTIONS, "--image-seconds", 0.25, *RAY))
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert any(b"raylet" in line for line in marked(joined))  # it is still up


@pytest.mark.slow
def test_a_source_that_cannot_be_read_is_one_line_and_the_same_command_goes_on(
    command: Command, tree: Path, tmp_path: Path, joined: str, contents: Contents
) -> None:
    secret = tree / "dog" / "deep" / "9.jpg"
    secret.rename(tmp_path / "hidden")
    secret.symlink_to("/proc/self/mem")  # listed as a file of 0 bytes, and reading it fails even for root
    line = complaint(command("pack", tree, tmp_path / "ray", *OPTIONS, *RAY))
    assert f"cannot read {secret}: Input/output error. Make it readable" in line
    assert line == complaint(command("pack", tree, tmp_path / "local", *OPTIONS, "--workers", 1))
    assert not (tmp_path / "ray" / "manifest.json").exists()
    wait_until_none(joined, b"spawn_main")
    secret.unlink()
    secret.write_bytes(b"")  # of the same size
    lines(command("pack", tree, tmp_path / "ray", *OPTIONS, *RAY))
    lines(command("pack", tree, tmp_path / "local", *OPTIONS, "--workers", 1))
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


@pytest.mark.slow
@pytest.mark.parametrize("in_group", [True, False])
def test_ctrl_c_ends_a_cluster_of_its_own(
    tmp_path: Path, mark: str, in_group: bool, command: Command, contents: Contents
) -> None:
    source, out = make_slow_images(tmp_path / "src", 80, 3000), tmp_path / "ray"
    process = started(source, out)
    if in_group:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, without_progress(errors)) == (130, INTERRUPTED)
    wait_until_none(mark)
    assert not (out / "manifest.json").exists()
    assert not list(out.glob(".parts/*.tmp"))
    again = command("pack", source, out, "--shard-size", "8kB", "--workers", 2)
    assert "kept from an earlier run" in again.stdout
    command("pack", source, tmp_path / "local", "--shard-size", "8kB", "--workers", 2)
    assert contents(out) == contents(tmp_path / "local")


@pytest.mark.slow
def test_ctrl_c_at_any_moment_leaves_nothing_behind(tmp_path: Path, mark: str) -> None:
    source = make_slow_images(tmp_path / "src", 200, 3000)
    call = [sys.executable, "-m", "shards", "pack", str(source), str(tmp_path / "ray"), "--shard-size", "8kB", *RAY]
    pipe = subprocess.PIPE
    for tenths in range(8, 48, 4):  # while Ray starts, too
        process = subprocess.Popen(call, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
        time.sleep(tenths / 10)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert (process.returncode, without_progress(errors)) == (130, INTERRUPTED), tenths
        wait_until_none(mark)


@pytest.mark.slow
def test_ctrl_c_leaves_a_cluster_that_was_started_before_as_it_was(tmp_path: Path, joined: str, mark: str) -> None:
    source, out = make_slow_images(tmp_path / "src", 80, 3000), tmp_path / "ray"
    for _ in range(5):  # Ray may abort a process that cancels a task which ends at that moment
        process = started(source, out)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert (process.returncode, without_progress(errors)) == (130, INTERRUPTED)
        wait_until_none(mark)
        wait_until_none(joined, b"spawn_main")
        assert any(b"raylet" in line for line in marked(joined))
        shutil.rmtree(out)


@pytest.mark.slow
def test_a_killed_packing_goes_on_to_the_same_bytes(
    tmp_path: Path, mark: str, command: Command, contents: Contents
) -> None:
    source, out = make_slow_images(tmp_path / "src", 80, 3000), tmp_path / "ray"
    process = started(source, out)
    process.kill()
    process.communicate()
    wait_until_none(mark, b"spawn_main")
    again = command("pack", source, out, "--shard-size", "8kB", *RAY)
    assert "kept from an earlier run" in again.stdout
    command("pack", source, tmp_path / "local", "--shard-size", "8kB", "--workers", 2)
    assert contents(out) == contents(tmp_path / "local")
    wait_until_none(mark, seconds=100)  # some of Ray's processes take a minute to notice


@pytest.mark.slow
def test_ray_packs_into_a_store(
    command: Command, tree_once: Path, packed_once: Path, mark: str, contents: Contents
) -> None:
    with s3_server() as server:
        url = server.bucket()
        lines(command("pack", tree_once, f"{url}/out", *OPTIONS, *RAY))
        packed = {key.removeprefix("out/"): server.get(f"{url}/{key}") for key in server.keys(f"{url}/")}
    assert packed == contents(packed_once)


@pytest.mark.slow
def test_a_cluster_that_wants_a_token_is_one_line(
    command: Command, tree_once: Path, tmp_path: Path, joined: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    line = complaint(command("pack", tree_once, tmp_path / "ray", *RAY))
    assert line.startswith("make-shards: cannot join a Ray cluster: Failed to connect to Ray cluster at ")
    assert "RAY_AUTH_MODE=token" in line


@pytest.mark.slow
def test_a_temporary_folder_with_a_long_path_is_one_line(
    command: Command, tree_once: Path, tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ("x" * 100)).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 100)))
    line = complaint(command("pack", tree_once, tmp_path / "ray", *RAY))
    assert "cannot join a Ray cluster: " in line
    assert "that TMPDIR has a short path" in line


def test_an_address_where_nobody_answers_is_one_line(
    command: Command, tree_once: Path, tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    line = complaint(command("pack", tree_once, tmp_path / "ray", *RAY))
    assert "RAY_ADDRESS=127.0.0.1:1: Connection refused. Start the cluster, or correct or unset it." in line


def test_without_ray_it_says_what_to_install(tree_once: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['ray'] = None; from shards.__main__ import main; sys.exit(main())"
    call = [sys.executable, "-c", code, "pack", str(tree_once), str(tmp_path / "ray"), *RAY]
    run = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert run.stderr == (
        "make-shards: Ray is not installed. Install it with 'pip install -e \".[ray]\"', or use --engine local.\n"
    )
