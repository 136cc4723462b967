"""Folders of this machine and of a real S3 server: what they promise, also to other processes and after kills."""

import argparse
import contextlib
import glob
import hashlib
import io
import itertools
import multiprocessing
import os
import pickle
import random
import re
import resource
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import argument_types
from shards.errors import UserError
from shards.packing.pack import refuse_overlap
from shards.storage import files, remote
from shards.storage.folders import Folder, open_folder
from shards.storage.local_folder import LocalFolder
from shards.storage.remote_folder import RemoteFolder
from tests.shards.s3 import Server, forget, s3_server

ROOT = Path(__file__).resolve().parents[3]
SPAWN = multiprocessing.get_context("spawn")
ODD = "a b/é'%20+#?&=\"[1]*"  # a folder's name, as far as keys and file names allow


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def bucket(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket's URL; temporary files lie in a folder of the test's."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return server.bucket()


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """A folder to pack into that nothing is in yet, of either kind."""
    where = str(tmp_path) if request.param == "local" else request.getfixturevalue("bucket")
    return open_folder(f"{where}/{ODD}")


def write(folder: Folder, name: str, data: bytes) -> None:
    with folder.write_file(name) as file:
        file.write(data)


def in_child(function: Callable[..., Any], *arguments: Any) -> int | None:
    """Run in a fresh process; its exit code."""
    process = SPAWN.Process(target=function, args=arguments)
    process.start()
    process.join(60)
    return process.exitcode


# What both kinds of folder promise


def test_a_file_is_there_as_it_was_written(folder: Folder) -> None:
    data = os.urandom(3_000_000)
    write(folder, "train-000000.tar", data)
    write(folder, ".parts/000000.part", b"part")
    write(folder, "empty", b"")
    assert folder.list_files() == ["empty", "train-000000.tar"]
    assert folder.read("train-000000.tar") == data
    assert (folder.get_size("train-000000.tar"), folder.get_size("empty")) == (len(data), 0)
    assert folder.hash_file("train-000000.tar") == hashlib.sha256(data).hexdigest()
    assert folder.hash_file("empty") == hashlib.sha256(b"").hexdigest()
    with folder.open("train-000000.tar") as file:
        assert b"".join(iter(lambda: file.read(700_001), b"")) == data
    assert folder.read(".parts/000000.part") == b"part"


def test_a_missing_file_is_told_apart_from_a_failure(folder: Folder) -> None:
    for _ in range(2):  # before the folder exists, and after
        assert (folder.get_size("x"), folder.hash_file("x")) == (None, None)
        for read in (folder.read, folder.open):
            with pytest.raises(FileNotFoundError):
                read("x")
        folder.remove("x")
        assert "x" not in folder.list_files()
        write(folder, "another", b"1")


def test_files_can_be_replaced_and_removed(folder: Folder) -> None:
    write(folder, "x", b"former")
    write(folder, "x", b"later")
    assert folder.read("x") == b"later"
    folder.remove("x")
    assert folder.list_files() == []
    assert folder.get_size("x") is None


def test_an_interrupted_file_leaves_the_former_one(folder: Folder) -> None:
    write(folder, "x", b"former")
    for name in ("x", "y"):
        with pytest.raises(KeyboardInterrupt):
            interrupted(folder, name)
    assert folder.list_files() == ["x"]
    assert folder.read("x") == b"former"
    assert list(folder.work_folder.glob("*.tmp")) == []


def interrupted(folder: Folder, name: str) -> None:
    with folder.write_file(name) as file:
        file.write(b"half" * 1_000_000)
        raise KeyboardInterrupt


def test_a_full_disk_leaves_the_former_file(folder: Folder) -> None:
    write(folder, "x", b"former")
    assert in_child(run_full, folder, "x") == 0
    assert folder.read("x") == b"former"
    assert list(folder.work_folder.iterdir()) == []


def run_full(folder: Folder, name: str) -> None:
    """Files end at a million bytes in this process; a full disk refuses in the same way."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    with pytest.raises(
        UserError, match=r"^cannot write .*: File too large\. Fix that \(if the disk is full, free"
    ) as caught:
        write(folder, name, bytes(5_000_000))
    assert isinstance(folder, LocalFolder) or "TMPDIR" in str(caught.value)


def test_remove_parts_takes_them_and_nothing_else(folder: Folder) -> None:
    for number in range(20):
        write(folder, f".parts/{number:06d}.part", b"part")
    write(folder, "manifest.json", b"{}")
    folder.work_folder.mkdir(exist_ok=True, parents=True)
    (folder.work_folder / "staged.tar").write_bytes(b"1")
    folder.remove_parts()
    assert not folder.work_folder.exists()
    assert folder.get_size(".parts/000019.part") is None
    assert folder.list_files() == ["manifest.json"]
    folder.remove_parts()


def test_sha256_ticks_and_can_be_stopped_so(folder: Folder) -> None:
    def stop() -> None:
        raise InterruptedError

    write(folder, "x", bytes(100))
    with pytest.raises((InterruptedError, UserError)):
        folder.hash_file("x", stop)


def test_another_process_sees_and_writes_the_same(folder: Folder) -> None:
    write(folder, "x", b"from here")
    assert in_child(answer, folder) == 0
    assert folder.read("y") == b"from there"
    assert folder.list_files() == ["x", "y"]
    assert folder.work_folder == pickle.loads(pickle.dumps(folder)).work_folder


def answer(folder: Folder) -> None:
    assert folder.read("x") == b"from here"
    write(folder, "y", b"from there")


def test_a_killed_holder_lets_go_and_its_leftovers_are_cleared(folder: Folder, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    holder = SPAWN.Process(target=hold, args=(folder, ready))
    holder.start()
    wait_for(lambda: ready.exists() or not holder.is_alive())
    with pytest.raises(UserError, match="someone is at it"), folder.lock("someone is at it"):
        pass
    os.kill(holder.pid or 0, signal.SIGKILL)
    holder.join()
    assert len(list(folder.work_folder.glob("*.tmp"))) == 1
    with folder.lock("someone is at it"):
        assert list(folder.work_folder.glob("*.tmp")) == []
        with pytest.raises(UserError, match="someone is at it"), folder.lock("someone is at it"):
            pass
    with folder.lock("it can be held again"):
        folder.remove_parts()
    assert folder.list_files() == []


def hold(folder: Folder, ready: Path) -> None:
    with folder.lock("never said"), folder.write_file("x") as file:
        file.write(b"half")
        file.flush()
        ready.touch()
        time.sleep(60)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# Local folders


def test_a_folder_that_cannot_be_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    folder = open_folder(str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"^cannot write .*file/x: .*\. Choose a folder, or a name that does not exist"):
        write(folder, "x", b"")
    for ask in (folder.read, folder.open, folder.get_size, folder.hash_file):
        with pytest.raises(UserError, match=r"^cannot read .*/x: Not a directory\. Make it readable"):
            ask("x")


def test_a_slash_at_the_end_names_the_same_folder(tmp_path: Path) -> None:
    assert open_folder(f"{tmp_path}/out/") == LocalFolder(f"{tmp_path}/out")
    assert open_folder("") == LocalFolder(".")


@pytest.mark.parametrize("scheme", ["file", "local", "FILE"])
def test_a_file_url_is_a_path(scheme: str, tmp_path: Path) -> None:
    assert argument_types.parse_path(f"{scheme}://{tmp_path}/out") == f"{tmp_path}/out"
    assert argument_types.parse_path(f"{tmp_path}/{scheme}://x") == f"{tmp_path}/{scheme}://x"
    with pytest.raises(argparse.ArgumentTypeError, match="the path is empty"):
        argument_types.parse_path(f"{scheme}://")


def test_a_file_url_hides_no_overlap(tree: Path, contents: Callable[[Path], dict[str, bytes]]) -> None:
    before = contents(tree)
    for source, out in ((tree, tree / "out"), (tree / "cat", tree), (tree, tree)):
        for schemes in (("file://", ""), ("", "file://"), ("file://", "file://")):
            call = ["pack", f"{schemes[0]}{source}", f"{schemes[1]}{out}", "--workers", "1"]
            done = subprocess.run(
                [sys.executable, "-m", "shards", *call], cwd=ROOT, capture_output=True, text=True, timeout=60
            )
            assert (done.returncode, done.stdout) == (1, "")
            assert "must not contain each other. Choose an OUT beside SRC" in done.stderr
    assert contents(tree) == before


def test_a_file_url_serves_every_command(tree_once: Path, tmp_path: Path) -> None:
    for call in (
        ("pack", f"file://{tree_once}", f"file://{tmp_path}/out"),
        ("check", f"file://{tmp_path}/out"),
        ("info", f"file://{tmp_path}/out"),
        ("show", f"file://{tmp_path}/out", "--grid", f"file://{tmp_path}/grid.png"),
    ):
        done = subprocess.run([sys.executable, "-m", "shards", *call], cwd=ROOT, capture_output=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "grid.png").is_file()


@pytest.mark.parametrize(
    ("source", "out", "overlap"),
    [
        ("s3://bucket/a", "s3://bucket/a/out", True),
        ("s3://bucket/a/", "s3://bucket/a", True),
        ("s3://bucket", "s3a://bucket/out", True),
        ("gcs://bucket/a/b", "gs://bucket/a", True),
        ("s3://bucket/a", "s3://bucket/ab", False),
        ("s3://bucket/a", "gs://bucket/a/out", False),
        ("s3://bucket/train-*.tar", "s3://bucket/out", False),
    ],
)
def test_overlap_of_urls(source: str, out: str, overlap: bool) -> None:
    with pytest.raises(UserError, match="must not contain each other") if overlap else contextlib.nullcontext():
        refuse_overlap(source, out)


# Input


MOVES = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 400_000), st.integers(-1, 200_000)), max_size=8)


@given(data=st.binary(max_size=300_000), moves=MOVES)
@settings(deadline=None)
def test_a_local_file_reads_as_its_bytes_do(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, moves: list[tuple[int, int, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.unlink(missing_ok=True)  # descriptors are kept: the file of that name must be looked at again
    path.write_bytes(data)
    assert files.read_whole(str(path)) == data
    with files.open_input(str(path)) as file, io.BytesIO(data) as expected:
        for whence, place, size in moves:
            start = (0, file.tell(), len(data))[whence]
            assert file.seek(place - start, whence) == expected.seek(place)
            assert file.read(size) == expected.read(size)
            assert files.read_range(str(path), place, max(0, size)) == data[place : place + max(0, size)]


def test_an_object_reads_as_its_bytes_do(server: Server, bucket: str) -> None:
    data = os.urandom(11_000_000)  # several requests
    server.put(f"{bucket}/x", data)
    url = f"{bucket}/x"
    assert files.read_whole(url) == data
    for offset, size in ((0, 1), (4_000_000, 5_000_000), (len(data) - 3, 3), (len(data) - 3, 10), (7, 0)):
        assert files.read_range(url, offset, size) == data[offset : offset + size]
    with files.open_input(url) as file:
        assert file.read() == data
        assert file.seek(-5_000_000, os.SEEK_END) == 6_000_000
        assert file.read(100) == data[6_000_000:6_000_100]
        assert file.seek(3) == 3
        assert file.read(9_000_000) == data[3:9_000_003]
        assert (file.read(-1), file.read(1)) == (data[9_000_003:], b"")


def test_archives_are_read_in_place(server: Server, bucket: str) -> None:
    tar, archive = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as writer, zipfile.ZipFile(archive, "w") as zipped:
        for number in range(50):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = 1000 + number
            writer.addfile(member, io.BytesIO(bytes([number]) * member.size))
            zipped.writestr(f"{number}.jpg", bytes([number]) * member.size)
    server.put(f"{bucket}/a.tar", tar.getvalue())
    server.put(f"{bucket}/a.zip", archive.getvalue())
    with files.open_input(f"{bucket}/a.tar") as file, tarfile.open(fileobj=file) as reader:
        assert [member.size for member in reader] == list(range(1000, 1050))
    with files.open_input(f"{bucket}/a.zip") as file, zipfile.ZipFile(file) as unzipped:
        assert unzipped.read("41.jpg") == bytes([41]) * 1041


def test_walk_finds_what_another_client_lists(server: Server, bucket: str) -> None:
    names = [f"{a}/{b}/{c}.jpg" for a, b, c in itertools.product(("cat", "dog é"), ("deep", "[1]*"), range(9))]
    names += ["top.jpg", "cat", "..dots/../x", "a%20b #?.png"]
    for number, name in enumerate(names):
        server.put(f"{bucket}/in/{name}", bytes(number))
    server.put(f"{bucket}/in/cat/", b"")  # the marker of a folder that somebody made by hand
    server.put(f"{bucket}/in-another/x", b"")
    listed = [key.removeprefix("in/") for key in server.keys(f"{bucket}/in/") if not key.endswith("/")]
    for root in (f"{bucket}/in", f"{bucket}/in/"):
        found = list(files.walk_objects(root))
        assert sorted(entry.path for entry in found) == sorted(listed) == sorted(names)
        assert all(entry.size == names.index(entry.path) for entry in found)
    assert len(list(files.walk_objects(bucket))) == len(names) + 1


def test_threads_read_more_files_than_are_kept_open(tmp_path: Path) -> None:
    paths = [str(tmp_path / str(number)) for number in range(100)]
    for path_ in paths:
        Path(path_).write_text(path_)
    draws = random.Random(0).choices(paths, k=20_000)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(lambda path_: files.read_range(path_, 0, 999).decode(), draws)) == draws
    finally:
        sys.setswitchinterval(interval)
    assert sum(os.path.realpath(f"/proc/self/fd/{fd}") in paths for fd in os.listdir("/proc/self/fd")) <= 64


def test_walk_never_leaves_a_folder_out_in_silence(
    server: Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.put(f"{bucket}/in/sub/x", b"")
    file_system = remote.open_file_system(bucket)
    listing = file_system.ls

    def refuse(path: str, **options: object) -> object:
        if path.endswith("sub"):
            raise PermissionError("Access Denied")
        return listing(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(file_system, "ls", refuse)
        with pytest.raises(UserError, match=r"/in/sub: Access Denied\. Check your credentials"):
            list(files.walk_objects(f"{bucket}/in"))
    server.put(f"{bucket}/in//x", b"")
    with pytest.raises(UserError, match="/in: it holds a key with '//'"):
        list(files.walk_objects(f"{bucket}/in"))


NAMES = ("a-0.tar", "a-1.tar", "b.tar", "A-2.tar", ".a-3.tar", "[1].tar", "a-1.tar.gz")


def test_a_pattern_matches_objects_as_it_does_files(server: Server, bucket: str, tmp_path: Path) -> None:
    for folder in ("", "x/", "y/deep/", "y/deeper/", ".hidden/", "run[1]/"):
        (tmp_path / "in" / folder).mkdir(parents=True, exist_ok=True)
        for name in NAMES:
            server.put(f"{bucket}/in/{folder}{name}", b"")
            (tmp_path / "in" / folder / name).touch()
    server.put(f"{bucket}/in/x/", b"")  # a folder's marker
    for pattern in (
        *("a-*.tar", "a-?.tar", "a-[1-9].tar", "a-[!1].tar", "*", ".*", "[[]1].tar", "*.zip", "**/a-0.tar"),
        *("*/a-0.tar", "y/*/a-[01].tar", "y/*per/b.tar", "*/*/a-0.tar", "*/deep/b.tar", "none/*.tar", ".h*/b*"),
        *("run[[]1]/b.tar", "x/a-0.tar/*", "x/*/"),
    ):
        found = [path for path in glob.glob(f"{tmp_path}/in/{pattern}") if os.path.isfile(path)]
        expected = sorted(os.path.relpath(path, tmp_path) for path in found)
        assert [url.removeprefix(f"{bucket}/") for url in files.find_objects(f"{bucket}/in/{pattern}")] == expected
    assert files.find_objects(f"{bucket}/in/[1].tar") == [f"{bucket}/in/[1].tar"]  # this very name is there


def test_a_pattern_that_cannot_be_tried_is_one_clear_line(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, **options: object) -> object:
        raise PermissionError("Access Denied")

    assert files.find_objects("s3://there-is-no-such-bucket/*.tar") == []
    monkeypatch.setattr(remote.open_file_system(bucket), "ls", refuse)
    with pytest.raises(UserError, match=r"Access Denied\. Check your credentials"):
        files.find_objects(f"{bucket}/*.tar")


def test_what_is_not_there_is_one_clear_line(bucket: str, tmp_path: Path) -> None:
    for read in (files.read_whole, files.open_input, lambda path: files.read_range(path, 0, 9)):
        with pytest.raises(UserError, match=r"^s3://.*/x: no such object, folder or bucket\. Check the name"):
            read(f"{bucket}/x")
        with pytest.raises(UserError, match=r"^cannot read .*/x: no such file\. Put it back"):
            read(f"{tmp_path}/x")
    for url in (f"{bucket}/none", "s3://there-is-no-such-bucket/x"):
        with pytest.raises(UserError, match=r"^s3://.*: no such object, folder or bucket\. Check the name"):
            list(files.walk_objects(url))


# Object stores


def test_what_others_change_is_seen_at_once(server: Server, bucket: str) -> None:
    folder = RemoteFolder(f"{bucket}/out")
    for data in (b"first", b"second, longer"):
        server.put(f"{folder}/x", data)
        assert (folder.read("x"), folder.get_size("x"), folder.list_files()) == (data, len(data), ["x"])
        assert folder.hash_file("x") == hashlib.sha256(data).hexdigest()
    server.remove(f"{folder}/x")
    assert (folder.get_size("x"), folder.list_files()) == (None, [])


def test_an_image_is_one_request(server: Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server.put(f"{bucket}/x", b"data")
    file_system, requests = remote.open_file_system(bucket), []
    call = file_system._call_s3

    async def counted(method: str, *arguments: object, **options: object) -> object:
        requests.append(method)
        return await call(method, *arguments, **options)

    monkeypatch.setattr(file_system, "_call_s3", counted)
    assert files.read_whole(f"{bucket}/x") == b"data"
    assert files.read_range(f"{bucket}/x", 1, 2) == b"at"
    assert requests == ["get_object", "get_object"]


def test_a_name_is_no_pattern(server: Server, bucket: str) -> None:
    server.put(f"{bucket}/run1/.parts/x", b"")
    folder = RemoteFolder(f"{bucket}/run*[1]")
    write(folder, ".parts/x", b"")
    folder.remove_parts()
    assert server.keys(bucket + "/") == ["run1/.parts/x"]


def test_a_damaged_upload_is_noticed_and_removed(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, file_system = RemoteFolder(f"{bucket}/out"), remote.open_file_system(bucket)
    upload = file_system.put_file

    def damage(local: str, url: str) -> None:
        with open(local, "r+b") as file:
            file.seek(5_000)
            file.write(b"!")
        upload(local, url)

    monkeypatch.setattr(file_system, "put_file", damage)
    with pytest.raises(
        UserError,
        match=r"/out/x: the store returned other bytes .* so the object was removed\. Run the same command again",
    ):
        write(folder, "x", bytes(10_000))
    assert folder.list_files() == []
    assert list(folder.work_folder.iterdir()) == []


def test_nobody_else_sees_or_prepares_what_is_written_here(bucket: str, tmp_path: Path) -> None:
    folder = RemoteFolder(f"{bucket}/out")
    assert str(os.getuid()) in folder.work_folder.name.split("-")
    old_mask = os.umask(0)
    try:
        with folder.lock("nobody else"), folder.write_file("x"):
            made = sorted((tmp_path / "tmp").iterdir())
            assert [path.name.removeprefix(folder.work_folder.name) for path in made] == ["", ".lock"]
            assert [stat.filemode(path.stat().st_mode) for path in made] == ["drwx------"] * 2
    finally:
        os.umask(old_mask)


@pytest.mark.parametrize("suffix", ["", ".lock"])
@pytest.mark.parametrize("kind", ["file", "link", "of somebody else"])
def test_a_work_folder_of_somebody_else_is_refused(bucket: str, tmp_path: Path, kind: str, suffix: str) -> None:
    folder = RemoteFolder(f"{bucket}/out")
    there = Path(f"{folder.work_folder}{suffix}")
    if kind == "file":
        there.touch()
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir()
        there.symlink_to(tmp_path / "elsewhere")
    else:
        if os.geteuid():
            pytest.skip("only root can give folders away")
        there.mkdir()
        os.chown(there, 12_345, -1)
    line = rf"^{there}: not a folder of yours\. Remove it, or set TMPDIR to a folder that belongs to you\.$"
    with pytest.raises(UserError, match=line), folder.lock("nobody"):
        pass
    if not suffix:
        with pytest.raises(UserError, match=line):
            write(folder, "x", b"")
    assert os.path.lexists(there)
    assert not (tmp_path / "elsewhere").exists() or list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("other", [b"0123456789", b"shorter"])
def test_what_another_writer_puts_in_between_is_noticed(
    server: Server, bucket: str, monkeypatch: pytest.MonkeyPatch, other: bytes
) -> None:
    folder, file_system = RemoteFolder(f"{bucket}/out"), remote.open_file_system(bucket)
    upload = file_system.put_file

    def overwritten(local: str, url: str) -> None:
        upload(local, url)
        server.put(url, other)

    monkeypatch.setattr(file_system, "put_file", overwritten)
    with pytest.raises(UserError, match="the store returned other bytes than were uploaded"):
        write(folder, "x", b"9876543210")
    assert folder.list_files() == []


def failing(
    times: int, error: Exception, then: Callable[[str, str], None]
) -> tuple[Callable[[str, str], None], list[str]]:
    """An upload that fails so many times, and the list of what it was called for."""
    calls: list[str] = []

    def upload(local: str, url: str) -> None:
        calls.append(url)
        if len(calls) <= times:
            raise error
        then(local, url)

    return upload, calls


def test_an_upload_is_tried_again(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, file_system = RemoteFolder(f"{bucket}/out"), remote.open_file_system(bucket)
    pauses: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    upload, calls = failing(2, OSError("We encountered an internal error"), file_system.put_file)
    monkeypatch.setattr(file_system, "put_file", upload)
    write(folder, "x", b"data")
    assert (len(calls), folder.read("x")) == (3, b"data")
    assert pauses == [1, 2]


@pytest.mark.parametrize(
    ("error", "attempts", "line"),
    [
        (OSError("internal\nerror"), 3, "x: internal error. Check the name, the network and the endpoint"),
        (PermissionError("Access Denied"), 1, "x: Access Denied. Check your credentials (AWS_PROFILE or "),
        (FileNotFoundError("The specified bucket does not exist"), 1, "x: no such object, folder or bucket. Check the"),
    ],
)
def test_an_upload_that_fails_for_good_leaves_the_former_object(
    bucket: str, monkeypatch: pytest.MonkeyPatch, error: Exception, attempts: int, line: str
) -> None:
    folder, file_system = RemoteFolder(f"{bucket}/out"), remote.open_file_system(bucket)
    write(folder, "x", b"former")
    monkeypatch.setattr(remote, "_PAUSE", 0)
    upload, calls = failing(9, error, file_system.put_file)
    monkeypatch.setattr(file_system, "put_file", upload)
    with pytest.raises(UserError) as caught:
        write(folder, "x", b"data")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (len(calls), folder.read("x")) == (attempts, b"former")
    assert list(folder.work_folder.iterdir()) == []


def test_a_bucket_that_is_not_there_is_never_made(server: Server, bucket: str) -> None:
    with pytest.raises(
        UserError, match=r"^s3://mistyped-bucket/out/x: no such object, folder or bucket\. Check the name"
    ):
        write(RemoteFolder("s3://mistyped-bucket/out"), "x", b"")
    assert "mistyped-bucket" not in [entry["Name"] for entry in server.client.list_buckets()["Buckets"]]


def test_missing_credentials_and_a_dead_endpoint_are_named(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        forget()
        with pytest.raises(
            UserError, match=r"^s3://[^/]*: Could not connect to the endpoint URL: .*\. Check the name, the network"
        ):
            files.read_whole(f"{bucket}/x")
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        forget()
        with pytest.raises(UserError, match=r"^s3://[^/]*: Unable to locate credentials\. Check your credentials"):
            files.read_whole(f"{bucket}/x")
    forget()


@pytest.mark.parametrize(
    ("missing", "url", "line"),
    [
        ("fsspec", "s3://bucket/x", r"s3://bucket: .*\. Install the package with 'pip install fsspec s3fs'\."),
        ("s3fs", "s3://bucket/x", r"s3://bucket: .*\. Install the package with 'pip install fsspec s3fs'\."),
        ("gcsfs", "gs://bucket/x", r"gs://bucket: .*\. Install the package with 'pip install fsspec gcsfs'\."),
        ("none", "foo://bucket/x", r"foo://bucket: Protocol not known: foo\. Give a folder, s3://BUCKET/FOLDER or .*"),
    ],
)
def test_a_missing_package_is_named(missing: str, url: str, line: str) -> None:
    script = (
        "import sys\n"
        "from shards.errors import UserError\n"
        "from shards.storage.files import read_whole\n"
        "sys.modules[sys.argv[1]] = None\n"
        "try: read_whole(sys.argv[2])\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, missing, url], cwd=ROOT, capture_output=True, timeout=60)
    assert re.fullmatch(line, done.stdout.decode().strip()), done


def test_a_url_needs_a_bucket() -> None:
    for path in ("s3://", "gs:///"):
        with pytest.raises(UserError, match=r"the URL has no bucket\. Write it like .*://BUCKET/FOLDER"):
            open_folder(path)
    assert open_folder("s3://bucket/out/") == RemoteFolder("s3://bucket/out")


def test_a_forked_child_has_its_own_connection(server: Server, bucket: str) -> None:
    server.put(f"{bucket}/x", b"data")
    script = (
        "import os, sys\n"
        "from shards.storage.files import read_whole\n"
        "assert read_whole(sys.argv[1]) == b'data'\n"
        "child = os.fork()\n"
        "assert read_whole(sys.argv[1]) == b'data'\n"
        "if not child: os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    call = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script, f"{bucket}/x"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


class Stalling:
    """A way to the server that passes on so many bytes of what it is sent, then nothing more."""

    def __init__(self, endpoint: str, limit: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._server = ("127.0.0.1", int(endpoint.rpartition(":")[2]))
        self._limit = limit
        self._threads: list[threading.Thread] = []
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.stalled = threading.Event()
        self._start(self._accept)

    def _start(self, work: Callable[..., None], *arguments: socket.socket) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, far = self._listener.accept()[0], socket.create_connection(self._server)
                self._start(self._pass_on, near, far)
                self._start(self._pass_back, far, near)

    def _pass_on(self, near: socket.socket, far: socket.socket) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := near.recv(1 << 16):
                if passed < self._limit:
                    far.sendall(data)
                else:
                    self.stalled.set()
                passed += len(data)
        with contextlib.suppress(OSError):  # the way back may have closed it already
            far.shutdown(socket.SHUT_WR)

    def _pass_back(self, far: socket.socket, near: socket.socket) -> None:
        with far, near, contextlib.suppress(OSError):
            while data := far.recv(1 << 16):
                with contextlib.suppress(OSError):
                    near.sendall(data)

    def close(self) -> None:
        """Wait until the server has done with every connection."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()


@pytest.mark.parametrize("name", ["x", "y"])
def test_killed_in_an_upload_the_former_object_stands(
    server: Server, bucket: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = RemoteFolder(f"{bucket}/out")
    write(folder, "x", b"former")
    with contextlib.closing(Stalling(server.endpoint, 1 << 20)) as way, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", way.endpoint)
        writer = SPAWN.Process(target=write, args=(folder, name, bytes(16 << 20)))
        writer.start()
        assert way.stalled.wait(30)
        os.kill(writer.pid or 0, signal.SIGKILL)
        writer.join()
    assert server.keys(f"{folder}/") == ["out/x"]
    assert folder.read("x") == b"former"
    assert len(list(folder.work_folder.glob("*.tmp"))) == 1
    with folder.lock("nobody else"):
        assert list(folder.work_folder.iterdir()) == []


@pytest.mark.slow
def test_a_multipart_upload_is_whole(server: Server, bucket: str) -> None:
    folder, data = RemoteFolder(f"{bucket}/out"), os.urandom(120 << 20)
    write(folder, "x", data)
    assert (
        folder.hash_file("x")
        == hashlib.sha256(data).hexdigest()
        == hashlib.sha256(server.get(f"{folder}/x")).hexdigest()
    )
    assert "-" in server.client.head_object(Bucket=bucket.removeprefix("s3://"), Key="out/x")["ETag"]  # in parts
