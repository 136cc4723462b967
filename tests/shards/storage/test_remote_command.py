"""make-shards on an object store, through the real command: the bytes of a local packing, whatever comes in between."""

import contextlib
import gzip
import http.client
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest

from shards.layout import RECORD
from tests.shards.archives import make_slow_images
from tests.shards.s3 import Server, s3_server

Command = Callable[..., subprocess.CompletedProcess[str]]
Contents = Callable[[Path], dict[str, bytes]]
ROOT = Path(__file__).resolve().parents[3]
OPTIONS = ("--shard-size", "12kB", "--seed", "5", "--workers", "2")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command's temporary files come to lie."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.fixture
def bucket(server: Server, temporary: Path) -> Iterator[str]:
    """A new bucket's URL. Nothing may be left among the temporary files in the end."""
    yield server.bucket()
    assert list(temporary.iterdir()) == []


@pytest.fixture
def objects(server: Server) -> Callable[[str], dict[str, bytes]]:
    """Everything below a URL, by relative key."""

    def read(url: str) -> dict[str, bytes]:
        root = url.removeprefix("s3://").partition("/")[2] + "/"
        return {key.removeprefix(root): server.get(f"{url}/{key.removeprefix(root)}") for key in server.keys(f"{url}/")}

    return read


class Recorder(ThreadingHTTPServer):
    """A way to the server that writes down what it stores and removes, and refuses to store one name."""

    block_on_close = False

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), _Passage)
        self.behind = endpoint.removeprefix("http://")
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[tuple[str, str]] = []  # method and key, of those that the server granted
        self.refused: str | None = None  # file name

    def stored(self) -> list[str]:
        """The keys that were stored, in that order."""
        return [key for method, key in self.requests if method == "PUT"]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client was killed."""


class _Passage(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Recorder

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        key = unquote(urlsplit(self.path).path).lstrip("/").partition("/")[2]
        if self.command == "PUT" and os.path.basename(key) == self.server.refused:
            self.answer(403, {}, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
            return
        with contextlib.closing(http.client.HTTPConnection(self.server.behind, timeout=60)) as connection:
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            data = answer.read()
        if answer.status < 300:
            self.server.requests.append((self.command, key))
        self.answer(answer.status, dict(answer.headers), data)

    def answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response_only(status)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        for name, value in {**headers, "Content-Length": length}.items():
            if name not in ("Transfer-Encoding", "Connection"):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on  # noqa: N815  http.server's names


@pytest.fixture
def recorder(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Commands go through it."""
    with Recorder(server.endpoint) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.endpoint)
        yield running
        running.shutdown()
        thread.join()


def done(run: subprocess.CompletedProcess[str]) -> str:
    """What a run printed that went well."""
    unexpected = [line for line in run.stderr.splitlines() if not line.startswith("packing: ")]  # every ten seconds
    assert (run.returncode, unexpected) == (0, []), run
    return run.stdout


def complaint(run: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr of a run that failed."""
    assert run.returncode == 1, run
    (line,) = run.stderr.splitlines()
    assert line.startswith("make-shards: ")
    return line


def uploaded(server: Server, folder: Path, url: str) -> str:
    """The files of a folder as objects; the URL."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            server.put(f"{url}/{path.relative_to(folder)}", path.read_bytes())
    return url


def start(source: Path, out: str) -> subprocess.Popen[str]:
    """A packing that is not waited for."""
    call = [sys.executable, "-m", "shards", "pack", str(source), out, *OPTIONS]
    pipe = subprocess.PIPE
    return subprocess.Popen(call, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


# The same bytes


def test_a_packing_has_the_bytes_of_a_local_one_and_nothing_else(
    command: Command,
    tree_once: Path,
    bucket: str,
    recorder: Recorder,
    tmp_path: Path,
    contents: Contents,
    objects: Callable[[str], dict[str, bytes]],
) -> None:
    done(command("pack", tree_once, tmp_path / "local", *OPTIONS))
    output = done(command("pack", tree_once, f"{bucket}/out/", *OPTIONS))
    assert f"{bucket}/out: 21 images, 2 classes, " in output
    local = contents(tmp_path / "local")
    assert len(local) > 7
    assert objects(f"{bucket}/out") == objects(bucket + "/out") == local
    assert {key.partition("/")[0] for key in objects(bucket)} == {"out"}
    written = recorder.requests.copy()
    assert written.index(("PUT", "out/manifest.json")) > max(
        place for place, request in enumerate(written) if request[0] == "PUT" and "manifest" not in request[1]
    )
    recorder.requests.clear()
    assert f"{bucket}/out: already complete" in done(command("pack", tree_once, f"{bucket}/out", *OPTIONS))
    assert {method for method, _ in recorder.requests} <= {"GET", "HEAD"}
    assert "no problems in 21 images" in done(command("check", f"{bucket}/out", "--workers", 2))


def test_info_says_the_same_of_a_remote_folder_and_show_says_what_it_cannot(
    command: Command, server: Server, packed_once: Path, bucket: str, tmp_path: Path
) -> None:
    url = uploaded(server, packed_once, f"{bucket}/packed")
    assert done(command("info", url)) == done(command("info", packed_once))
    line = complaint(command("show", url, "--grid", tmp_path / "grid.png"))
    assert line == f"make-shards: {url}: only local shards can be shown. Copy the folder to this machine first."


def archive(tree: Path, kind: str) -> bytes:
    """The files of a tree in an archive."""
    files = [(str(path.relative_to(tree)), path.read_bytes()) for path in sorted(tree.rglob("*")) if path.is_file()]
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
            for name, data in files:
                zipped.writestr(name, data)
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        rows = [{"bytes": data, "path": name} for name, data in files if name.count("/")]
        labels = [int(row["path"].startswith("dog")) for row in rows]
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
        table = pyarrow.table({"image": rows, "label": labels})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pytest.importorskip("pyarrow.parquet").write_table(table, buffer)
    else:
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, data in files:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return gzip.compress(buffer.getvalue()) if kind == "tar.gz" else buffer.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz", "zip", "parquet"])
def test_a_remote_source_packs_as_the_local_one_does(
    command: Command,
    server: Server,
    tree_once: Path,
    bucket: str,
    tmp_path: Path,
    kind: str,
    contents: Contents,
    objects: Callable[[str], dict[str, bytes]],
) -> None:
    if kind == "folder":
        source, url = tree_once, uploaded(server, tree_once, f"{bucket}/a é")
    else:
        source, url = tmp_path / f"x.{kind}", f"{bucket}/x.{kind}"
        source.write_bytes(archive(tree_once, kind))
        server.put(url, source.read_bytes())
    before = objects(bucket)
    done(command("pack", source, tmp_path / "local", *OPTIONS))
    done(command("pack", url, tmp_path / "fetched", *OPTIONS))
    done(command("pack", url, f"{bucket}/out", *OPTIONS))
    local = contents(tmp_path / "local")
    assert sum(name.endswith(".tar") for name in local) > 3
    assert contents(tmp_path / "fetched") == local
    assert objects(bucket) == before | {f"out/{name}": data for name, data in local.items()}


@pytest.mark.slow
def test_tars_by_others_are_indexed_in_the_store(
    command: Command,
    server: Server,
    tree_once: Path,
    bucket: str,
    tmp_path: Path,
    contents: Contents,
    objects: Callable[[str], dict[str, bytes]],
) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    for number, kind in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        with tarfile.open(folder / f"data-{number}.tar", "w", format=kind) as tar:
            for place, path in enumerate(sorted((tree_once / "dog" / "deep").iterdir())):
                tar.add(path, f"{'long/' * 30}{number}{place}{path.suffix}")
                label = tarfile.TarInfo(f"{'long/' * 30}{number}{place}.cls")
                label.size = 1
                tar.addfile(label, io.BytesIO(str(place % 3).encode()))
    tars = contents(folder)
    url = uploaded(server, folder, f"{bucket}/theirs")
    done(command("index", folder, "--workers", 2))
    output = done(command("index", url, "--workers", 2))
    assert "20 images (format webdataset), 3 classes" in output
    assert objects(url) == contents(folder)
    assert {name: data for name, data in objects(url).items() if name.endswith(".tar")} == tars
    assert "no problems in 20 images" in done(command("check", url, "--workers", 2))


@pytest.mark.slow
def test_val_is_numbered_by_a_remote_manifest_of_train(
    command: Command,
    server: Server,
    tree: Path,
    packed_once: Path,
    bucket: str,
    objects: Callable[[str], dict[str, bytes]],
) -> None:
    url = uploaded(server, packed_once, f"{bucket}/train")
    for path in sorted((tree / "cat").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (tree / "cat").rmdir()
    done(command("pack", tree, f"{bucket}/val", *OPTIONS, "--format", "folders", "--classes", f"{url}/manifest.json"))
    val = objects(f"{bucket}/val")
    assert json.loads(val["manifest.json"])["classes"] == ["cat", "dog"]
    records = np.load(io.BytesIO(val["index.npy"]))
    assert records.dtype == RECORD
    assert set(records["label"].tolist()) == {1}


@pytest.mark.slow
def test_a_split_lies_in_two_folders_of_the_store(
    command: Command,
    tree_once: Path,
    bucket: str,
    tmp_path: Path,
    contents: Contents,
    objects: Callable[[str], dict[str, bytes]],
) -> None:
    done(command("pack", tree_once, tmp_path / "local", *OPTIONS, "--split-val", 0.2))
    done(command("pack", tree_once, f"{bucket}/out", *OPTIONS, "--split-val", 0.2))
    local = contents(tmp_path / "local")
    assert {name.partition("/")[0] for name in local} == {"train", "val"}
    assert objects(bucket) == {f"out/{name}": data for name, data in local.items()}


# What comes in between


@pytest.mark.slow
def test_the_manifest_comes_last_and_a_packing_without_one_goes_on(
    command: Command,
    tree_once: Path,
    packed_once: Path,
    bucket: str,
    recorder: Recorder,
    contents: Contents,
    objects: Callable[[str], dict[str, bytes]],
) -> None:
    recorder.refused = "manifest.json"
    line = complaint(command("pack", tree_once, f"{bucket}/out", *OPTIONS))
    assert f"{bucket}/out/manifest.json: Access Denied. Check your credentials" in line
    whole = contents(packed_once)
    assert len(whole) > 7
    there = {name: data for name, data in objects(f"{bucket}/out").items() if not name.startswith(".parts/")}
    manifest = whole.pop("manifest.json")
    assert there == whole
    assert "no manifest.json" in complaint(command("check", f"{bucket}/out"))
    recorder.refused = None
    recorder.requests.clear()
    assert "kept from an earlier run" in done(command("pack", tree_once, f"{bucket}/out", *OPTIONS))
    *before, last = recorder.stored()
    assert not [key for key in before if key.endswith((".tar", ".part"))]
    assert last == "out/manifest.json"
    assert objects(f"{bucket}/out") == whole | {"manifest.json": manifest}


def finished(recorder: Recorder) -> set[str]:
    """The keys of the tars whose parts are stored too."""
    numbers = (Path(key).stem for key in recorder.stored() if key.endswith(".part"))
    return {f"out/train-{number}.tar" for number in numbers}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_what_was_uploaded_before_a_kill_is_not_uploaded_again(
    number: signal.Signals,
    bucket: str,
    recorder: Recorder,
    tmp_path: Path,
    temporary: Path,
    command: Command,
    contents: Contents,
    objects: Callable[[str], dict[str, bytes]],
) -> None:
    source = make_slow_images(tmp_path / "src", 60, 2000)
    process = start(source, f"{bucket}/out")
    wait_for(lambda: len(finished(recorder)) >= 2, process)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=30)
    if number == signal.SIGINT:
        line = "make-shards: interrupted. Run the same command again to go on from here.\n"
        assert (process.returncode, errors) == (130, line)
        assert list(temporary.iterdir()) == []
    assert "out/manifest.json" not in recorder.stored()
    before = finished(recorder)
    recorder.requests.clear()
    done(command("pack", source, f"{bucket}/out", *OPTIONS))
    stored = recorder.stored()
    assert [key for key in stored if key.endswith(".tar")]
    assert not before & set(stored)
    assert stored[-1] == "out/manifest.json"
    done(command("pack", source, tmp_path / "local", *OPTIONS))
    assert objects(f"{bucket}/out") == contents(tmp_path / "local")


@pytest.mark.slow
def test_killed_at_many_moments(
    bucket: str,
    tmp_path: Path,
    command: Command,
    contents: Contents,
    objects: Callable[[str], dict[str, bytes]],
) -> None:
    source = make_slow_images(tmp_path / "src", 30, 2000)
    done(command("pack", source, tmp_path / "local", *OPTIONS))
    began = time.monotonic()
    done(command("pack", source, f"{bucket}/whole", *OPTIONS))
    length, rng, killed = time.monotonic() - began, random.Random(0), 0
    for attempt in range(6):
        out = f"{bucket}/{attempt}"
        for _ in range(3):
            process = start(source, out)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.2, length))
            killed += process.poll() is None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        done(command("pack", source, out, *OPTIONS))
        assert objects(out) == contents(tmp_path / "local")
    assert killed >= 5


@pytest.mark.slow
def test_a_second_packer_is_refused_on_this_machine(bucket: str, recorder: Recorder, tmp_path: Path) -> None:
    source = make_slow_images(tmp_path / "src", 40, 2000)
    first = start(source, f"{bucket}/out")
    wait_for(lambda: "out/.parts/plan.json" in recorder.stored(), first)
    second = start(source, f"{bucket}/out/")
    _, errors = second.communicate(timeout=30)
    assert second.returncode == 1
    assert errors.count("\n") == 1
    assert f"{bucket}/out: another make-shards is writing into it. Wait, or choose another folder" in errors
    _, errors = first.communicate(timeout=60)
    assert (first.returncode, errors) == (0, "")


# What cannot be


def test_source_and_out_in_one_another(command: Command, bucket: str) -> None:
    for source, out in (("a", "a"), ("a", "a/out"), ("a/b/c", "a/")):
        assert "must not contain each other" in complaint(command("pack", f"{bucket}/{source}", f"{bucket}/{out}"))
    assert "no such object, folder or bucket" in complaint(command("pack", f"{bucket}/a", f"{bucket}/ab"))


def calls(bucket: str, tree: Path, out: Path) -> list[tuple[str, ...]]:
    """Every way to a store."""
    return [
        ("pack", str(tree), f"{bucket}/new", *OPTIONS),
        ("pack", f"{bucket}/tree", str(out)),
        ("pack", f"{bucket}/x.tar", str(out)),
        ("check", f"{bucket}/out"),
        ("index", f"{bucket}/out"),
        ("info", f"{bucket}/out"),
    ]


def complaints(command: Command, bucket: str, tree: Path, out: Path, most: int = 6) -> Iterator[str]:
    """What the first `most` of them say where none can do anything; each within half a minute."""
    for call in calls(bucket, tree, out)[:most]:
        began = time.monotonic()
        line = complaint(command(*call))
        assert "s3://" in line
        assert time.monotonic() - began < 30
        assert not out.exists()
        yield line


def test_a_bucket_that_is_not_there_is_named(
    command: Command, temporary: Path, server: Server, tree_once: Path
) -> None:
    for line in complaints(command, "s3://mistyped-bucket", tree_once, temporary / "out"):
        assert "s3://mistyped-bucket/" in line
        assert "no such" in line or "holds no tars" in line
    assert list(temporary.iterdir()) == []


def test_missing_credentials_are_named(
    command: Command, bucket: str, tree_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    for line in complaints(command, bucket, tree_once, tmp_path / "out"):
        assert f"{bucket}: Unable to locate credentials. Check your credentials (AWS_PROFILE or " in line


@pytest.mark.slow
def test_an_endpoint_where_nobody_listens_is_named(
    command: Command, bucket: str, tree_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    for line in complaints(command, bucket, tree_once, tmp_path / "out", 4):
        assert f'{bucket}: Could not connect to the endpoint URL: "{endpoint}/' in line


@pytest.mark.slow
def test_an_endpoint_that_does_not_answer_is_not_waited_for(
    command: Command, bucket: str, tree_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        for line in complaints(command, bucket, tree_once, tmp_path / "out", 2):
            assert f"{bucket}: no answer within 20 s. Check the name, the network and the endpoint" in line
