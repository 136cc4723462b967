"""The real make-shards in a process of its own: what it prints, its status, its one line for each trouble."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from PIL import Image

from shards import version
from shards.__main__ import main
from shards.index import ShardIndex

Command = Callable[..., subprocess.CompletedProcess[str]]
Contents = Callable[[Path], dict[str, bytes]]
ROOT = Path(__file__).resolve().parents[2]


def complaint(run: subprocess.CompletedProcess[str], status: int = 1) -> str:
    """The one line on stderr of a run that failed."""
    assert run.returncode == status, run
    (line,) = run.stderr.splitlines()
    assert line.startswith("make-shards: ")
    return line


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, 200 kB large."""
    place = tmp_path / "small"
    place.mkdir()
    if not shutil.which("mount"):
        pytest.skip("no mount command")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", place], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"mount is not permitted: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_pack_check_and_again(command: Command, tree: Path, tmp_path: Path, contents: Contents) -> None:
    call = ("pack", tree, tmp_path / "out", "--workers", 2, "--shard-size", "12kB", "--seed", 5, "--name", "val")
    first = command(*call)
    assert (first.returncode, first.stderr) == (0, "")
    assert "src: 25 images (format folders), 2 classes (cat, dog), 2 other files ignored" in first.stdout
    assert "21 images, 2 classes, " in first.stdout
    assert "4 images rejected" in first.stdout
    assert "  dog/empty.png: empty file" in first.stdout
    assert "img/s" in first.stdout
    before = contents(tmp_path / "out")
    again = command(*call)
    assert again.returncode == 0
    assert "out: already complete" in again.stdout
    assert contents(tmp_path / "out") == before
    checked = command("check", tmp_path / "out", "--workers", 2)
    assert checked.returncode == 0
    assert "no problems in 21 images" in checked.stdout


def test_check_lists_problems_and_fails(command: Command, packed: Path) -> None:
    with (packed / "train-000000.tar").open("r+b") as file:
        file.seek(520)
        file.write(b"\0\0\0\0")
    run = command("check", packed)
    assert run.returncode == 1
    assert "train-000000.tar, key 0000000" in run.stdout
    assert "offset 512: its crc32 differs" in run.stdout
    assert "2 problems" in run.stdout


def test_sources_that_cannot_be_packed(command: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "1.txt").write_text("1")
    out = tmp_path / "out"
    assert "nowhere: no such folder or file" in complaint(command("pack", tmp_path / "nowhere", out))
    assert "empty: no images" in complaint(command("pack", tmp_path / "empty", out))
    assert "text: no images" in complaint(command("pack", tmp_path / "text", out))
    assert "1.txt is not a tar, zip or parquet file" in complaint(command("pack", tmp_path / "text" / "1.txt", out))
    assert not out.exists()


def test_folders_that_cannot_be_checked(command: Command, tmp_path: Path, packed: Path) -> None:
    assert "nowhere: no such folder" in complaint(command("check", tmp_path / "nowhere"))
    (packed / "manifest.json").unlink()
    assert "no manifest.json" in complaint(command("check", packed))


def test_source_and_out_in_one_another(command: Command, tree: Path) -> None:
    for out in (tree, tree / "out", tree.parent):
        assert "must not contain each other" in complaint(command("pack", tree, out))
    assert not (tree / "out").exists()


def test_another_packing_is_left_alone(command: Command, tree: Path, packed: Path, contents: Contents) -> None:
    before = contents(packed)
    same = ("--shard-size", "12000", "--seed")
    assert "holds another packing" in complaint(command("pack", tree, packed, *same, 6))
    assert "holds another packing" in complaint(command("pack", tree / "cat" / "deep", packed, *same, 5))
    os.truncate(packed / "train-000000.tar", 512)
    assert "train-000000.tar: the file has 512 bytes" in complaint(command("pack", tree, packed, *same, 5))
    (packed / "train-000000.tar").write_bytes(before["train-000000.tar"])
    (packed / "manifest.json").unlink()
    assert "does not belong to this packing" in complaint(command("pack", tree, packed, *same, 5))
    del before["manifest.json"]
    assert contents(packed) == before


def test_another_unfinished_packing_is_left_alone(command: Command, tree: Path, tmp_path: Path) -> None:
    secret = tree / "dog" / "deep" / "9.jpg"
    held = secret.read_bytes()
    secret.unlink()
    secret.symlink_to("/proc/self/mem")  # listed as a file of 0 bytes, and reading it fails even for root
    assert "cannot read" in complaint(command("pack", tree, tmp_path / "out", "--shard-size", 12000))
    assert (tmp_path / "out" / ".parts" / "plan.json").exists()
    secret.unlink()
    secret.write_bytes(held)
    line = complaint(command("pack", tree, tmp_path / "out", "--shard-size", 12000))
    assert "holds another packing, not finished" in line
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_no_permission(command: Command, tree: Path, tmp_path: Path, ordinary: list[str]) -> None:
    out, closed = tmp_path / "out", tmp_path / "closed"
    call = ("pack", tree, out, "--shard-size", 12000)
    secret = tree / "dog" / "deep" / "9.jpg"
    secret.chmod(0)
    line = complaint(command(*call, through=ordinary))
    assert f"cannot read {secret}: Permission denied. Make it readable" in line
    assert not (out / "manifest.json").exists()
    assert not list(out.rglob("*.tmp"))
    secret.chmod(0o644)
    assert command(*call, through=ordinary).returncode == 0  # goes on from there
    secret.parent.chmod(0)
    assert f"cannot list {secret.parent}: Permission denied" in complaint(command(*call, through=ordinary))
    secret.parent.chmod(0o755)
    closed.mkdir(mode=0o555)
    for place in (closed, closed / "new"):
        line = complaint(command("pack", tree, place, through=ordinary))
        assert f"cannot write to {place}: Permission denied. Choose a folder that you may write to" in line
    for name in ("manifest.json", "index.npy", "train-000000.tar"):
        (out / name).chmod(0)
        run = command("check", out, through=ordinary)
        assert run.returncode == 1
        assert f"{name}: Permission denied" in run.stdout + run.stderr
        assert "Traceback" not in run.stderr
        (out / name).chmod(0o644)


def test_an_out_that_is_a_file(command: Command, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert "Choose a folder, or a name that does not exist yet" in complaint(command("pack", tree, tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


def test_a_full_disk(command: Command, mounted: Path, tree: Path, tmp_path: Path, contents: Contents) -> None:
    (mounted / "ballast").write_bytes(bytes(150_000))
    line = complaint(command("pack", tree, mounted / "out", "--shard-size", "12kB", "--workers", 2))
    assert "No space left on device" in line
    assert str(mounted / "out") in line
    assert "free some space" in line
    left = contents(mounted / "out")
    assert "manifest.json" not in left
    assert not any(name.endswith(".tmp") for name in left)
    (mounted / "ballast").unlink()
    assert command("pack", tree, mounted / "out", "--shard-size", "12kB").returncode == 0
    assert command("pack", tree, tmp_path / "out", "--shard-size", "12kB").returncode == 0
    after = contents(mounted / "out")
    assert after == contents(tmp_path / "out")
    assert all(after[name] == data for name, data in left.items() if name.endswith(".tar"))  # nothing half-written


def test_two_packers(command: Command, tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another make-shards is writing into it" in complaint(command("pack", tree, out))
    assert command("pack", tree, out).returncode == 0  # the file of a killed packer is no lock
    assert not (out / ".lock").exists()


def test_interrupted(tree: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches every process of a terminal; one of them speaks."""
    Image.new("RGB", (6000, 4000)).save(tree / "cat" / "huge.jpg")
    for copy in range(100):
        os.link(tree / "cat" / "huge.jpg", tree / "cat" / f"huge{copy}.jpg")
    call = [sys.executable, "-m", "shards", "pack", str(tree), str(tmp_path / "out"), "--workers", "2"]
    process = subprocess.Popen(
        call, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not list((tmp_path / "out").glob(".parts/train*.tmp")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "make-shards: interrupted. Run the same command again to go on from here.\n"
    assert not list((tmp_path / "out").rglob("*.tmp"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pack", "a"], "required: OUT"),
        (["pack", "a", "b", "--workers", "0"], "'0' is not a number of processes. Give a whole number from 1"),
        (["pack", "a", "b", "--workers", "two"], "'two' is not a number of processes"),
        (["pack", "a", "b", "--shard-size", "12 parsecs"], "'12 parsecs' is not a size. Write it like 256MB"),
        (["pack", "a", "b", "--shard-size", "0"], "'0' is not a size"),
        (["pack", "a", "b", "--seed", "-1"], "'-1' is not a seed"),
        (["pack", "a", "b", "--name", "a/b"], "'a/b' is not a prefix"),
        (["pack", "a", "b", "--name", "a.b"], "'a.b' is not a prefix"),
        (["pack", "a", "b", "--format", "zip"], "invalid choice: 'zip'"),
    ],
)
def test_wrong_calls(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_a_call_without_a_command_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for command in ("pack", "index", "check", "info", "show", "stats"):
        assert re.search(rf"^    {command} +\w.*$", printed.out, re.MULTILINE), command


def test_the_version_is_that_of_the_project_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (expected,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)

    def is_not_installed(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", is_not_installed)
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"make-shards {expected}\n"
    for text in (None, 'name = "another"\nversion = "2"\n', 'name = "dino-fast"\n'):
        monkeypatch.setattr(version, "_PROJECT_FILE", tmp_path / "pyproject.toml")
        if text is not None:
            (tmp_path / "pyproject.toml").write_text(text)
        assert version.version() == "unknown"


@pytest.mark.parametrize(
    ("text", "size"), [("300", 300), ("1KB", 1000), ("2kib", 2048), ("1.5GB", 1_500_000_000), ("3 MiB", 3 * 2**20)]
)
def test_sizes(tree: Path, tmp_path: Path, text: str, size: int) -> None:
    assert main(["pack", str(tree / "cat"), str(tmp_path / "out"), "--format", "flat", "--shard-size", text]) == 0
    assert ShardIndex(tmp_path / "out").manifest.options["shard_size"] == size


def test_a_split_does_not_touch_an_unfinished_packing(command: Command, tree: Path, tmp_path: Path) -> None:
    secret = tree / "dog" / "deep" / "9.jpg"
    held = secret.read_bytes()
    secret.unlink()
    secret.symlink_to("/proc/self/mem")
    call = ("pack", tree, tmp_path / "out", "--shard-size", 12000)
    assert "cannot read" in complaint(command(*call))
    parts = sorted((tmp_path / "out" / ".parts").iterdir())
    secret.unlink()
    secret.write_bytes(held)
    assert "without --split-val" in complaint(command(*call, "--split-val", "0.3"))
    assert sorted((tmp_path / "out" / ".parts").iterdir()) == parts


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_refused_folder_holds_nothing_staged(
    command: Command, tree: Path, packed: Path, tmp_path: Path, contents: Contents, is_finished: bool
) -> None:
    archive = shutil.make_archive(str(tmp_path / "tree"), "gztar", tree)
    out = packed if is_finished else tmp_path / "holiday"
    if not is_finished:
        shutil.copytree(tree / "cat" / "deep", out)
    before = contents(out)
    complaint(command("pack", archive, out))
    assert contents(out) == before


def test_an_image_that_takes_too_long_is_rejected_names_by_name(command: Command, tree: Path, tmp_path: Path) -> None:
    """A decoder cannot be interrupted: its process is killed, and the others' images are packed all the same."""
    Image.effect_noise((8000, 6000), 90).save(tree / "cat" / "huge.jpg")
    call = ("pack", tree, tmp_path / "out", "--image-seconds", "0.1", "--workers", 2, "--shard-size", "12kB")
    run = command(*call)
    assert (run.returncode, run.stderr) == (0, "")
    index = ShardIndex(tmp_path / "out")
    assert len(index) == 21
    reasons = {entry.source: entry.reason for entry in index.manifest.rejected}
    assert reasons["cat/huge.jpg"] == "takes more than 0.1 s of CPU time (--image-seconds)"
    assert len(reasons) == 5


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_it_prints_the_completion_of_a_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["--print-completion", shell]) == 0
    words = set(re.findall(r"[\w-]+", capsys.readouterr().out))
    assert {"pack", "index", "check", "info", "show", "stats"} <= words
    assert any("shard-size" in word for word in words)
