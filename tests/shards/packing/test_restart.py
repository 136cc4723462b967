"""kill -9 at any moment, and the same command again: the result is that of a run nobody disturbed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from shards.errors import UserError
from shards.packing.plan import Options, make_plan
from shards.sources.scan import scan
from tests.shards.packing_helpers import pack_tree

Contents = Callable[[Path], dict[str, bytes]]
ROOT = Path(__file__).resolve().parents[3]
OPTIONS = Options(seed=3, shard_size=400_000)


def many(root: Path, count: int) -> Path:
    """Class folders with images that take a while to decode: few bytes, many pixels."""
    for number in range(count):
        folder = root / f"class{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (1500, 1000 + number), (number % 256, 9, 77)).save(folder / f"{number}.jpg", quality=70)
        if number % 17 == 0:
            (folder / f"{number}.bad.jpg").write_bytes(b"\xff\xd8\xff")
    return root


def start(source: Path, out: Path) -> subprocess.Popen[bytes]:
    call = [sys.executable, "-m", "shards", "pack", str(source), str(out), "--workers", "2"]
    call += ["--seed", str(OPTIONS.seed), "--shard-size", str(OPTIONS.shard_size)]
    return subprocess.Popen(call, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


def kill_after(source: Path, out: Path, seconds: float) -> bool:
    """Start, kill the whole process group after a time; whether it was still at work."""
    process = start(source, out)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def finish(source: Path, out: Path) -> None:
    process = start(source, out)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, b"")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_at_many_moments(tmp_path: Path, contents: Contents) -> None:
    source = many(tmp_path / "src", 400)
    began = time.monotonic()
    finish(source, tmp_path / "whole")
    length = time.monotonic() - began
    whole = contents(tmp_path / "whole")
    rng, killed, out = random.Random(0), 0, tmp_path / "out"
    for attempt in range(120):
        # Half of the moments come after one another in one folder, half of them in a fresh one.
        for _ in range(1 + attempt % 2):
            killed += kill_after(source, out, rng.uniform(0.05, length))
        finish(source, out)
        assert contents(out) == whole
        shutil.rmtree(out)
        if killed >= 50:
            return
    pytest.fail(f"only {killed} of the moments fell into the packing")


def test_killed_once_while_writing(tmp_path: Path, contents: Contents) -> None:
    """The moment is chosen by what has happened: a shard is finished, another is half-written."""
    source, out = many(tmp_path / "src", 120), tmp_path / "out"
    process = start(source, out)
    while not (list(out.glob(".parts/*.part")) and list(out.glob(".parts/train*.tmp"))):
        assert process.poll() is None
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "manifest.json").exists()
    finished = {
        path: path.stat().st_ino for path in out.glob("*.tar") if (out / f".parts/{path.stem[6:]}.part").exists()
    }
    assert finished
    packed = pack_tree(source, out, OPTIONS, 2)
    assert packed.kept_shards >= len(finished)
    assert all(path.stat().st_ino == inode for path, inode in finished.items())  # kept, not written again
    pack_tree(source, tmp_path / "whole", OPTIONS, 1)
    assert contents(out) == contents(tmp_path / "whole")


def test_only_damaged_shards_are_done_again(tree: Path, tmp_path: Path, contents: Contents) -> None:
    """A packing that lacks its last steps, one tar damaged, one part damaged, one tar gone."""
    options, out = Options(shard_size=6_000), tmp_path / "out"
    pack_tree(tree, tmp_path / "whole", options, 2)
    stop_before_the_index(tree, out, options)
    tars = sorted(out.glob("*.tar"))
    with tars[0].open("r+b") as file:
        file.write(b"x")
    (out / ".parts" / "000001.part").write_bytes(b"{}")
    tars[2].unlink()
    (out / ".parts" / "train-000003.tar.1.tmp").write_bytes(b"left by a killed worker")
    packed = pack_tree(tree, out, options, 2)
    planned = make_plan(scan(tree, "auto", tmp_path / "none"), options)
    assert packed.kept_shards == planned.shard_count - 3
    assert contents(out) == contents(tmp_path / "whole")


def stop_before_the_index(tree: Path, out: Path, options: Options) -> None:
    """All shards and parts, but neither index nor manifest: a folder lies where the index should come to lie."""
    planned = make_plan(scan(tree, "auto", tree.parent / "none"), options)
    (out / ".parts").mkdir(parents=True)
    (out / ".parts" / "plan.json").write_text(json.dumps({"fingerprint": planned.fingerprint}))
    (out / "index.npy").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*index\.npy: Is a directory"):
        pack_tree(tree, out, options, 2)
    (out / "index.npy").rmdir()


def children_at_work(process: subprocess.Popen[bytes], out: Path) -> list[int]:
    """The processes that a packer has started, as soon as one of them writes."""
    while not list(out.glob(".parts/train*.tmp")):
        assert process.poll() is None
        time.sleep(0.005)
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_a_killed_worker_ends_the_run_in_one_line(tmp_path: Path) -> None:
    source, out = many(tmp_path / "src", 200), tmp_path / "out"
    process = start(source, out)
    os.kill(children_at_work(process, out)[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.startswith(b"make-shards: a worker process died, perhaps from lack of memory. Run the same command")
    assert errors.count(b"\n") == 1
    finish(source, out)


def test_workers_do_not_outlive_their_parent(tmp_path: Path) -> None:
    source, out = many(tmp_path / "src", 200), tmp_path / "out"
    process = start(source, out)
    children = children_at_work(process, out)
    assert children
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in children):
        assert time.monotonic() < deadline, "a worker lives on"
        time.sleep(0.02)
    finish(source, out)  # and the lock has died with its holder


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie, which an init that does not reap may leave."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
