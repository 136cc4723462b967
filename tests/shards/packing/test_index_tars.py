"""make-shards index: tars of other makers, described where they are."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from shards.index import ShardIndex
from shards.inspect.check import check
from shards.manifest import load_manifest
from shards.storage.local_folder import LocalFolder

LONG = "a-folder-with-a-rather-long-name/" * 4 + "and-an-image-with-a-name-that-no-ustar-header-holds" * 3


def make_image(number: int, format: str) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((30 + number, 40), 90).convert("RGB").save(buffer, format)
    return buffer.getvalue()


def write(path: Path, format: int, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), 1234567890.5 if format == tarfile.PAX_FORMAT else 0
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def foreign(tmp_path: Path) -> tuple[Path, dict[bytes, str]]:
    """Two tars by other hands, and image → class."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    images: dict[bytes, str] = {}
    for number, (format, kind) in enumerate([(tarfile.GNU_FORMAT, "JPEG"), (tarfile.PAX_FORMAT, "WEBP")]):
        files = {}
        for sample in range(4):
            name = f"{LONG}{sample}" if sample == 2 else f"x/{sample}"
            files[f"{name}.{'JPEG' if kind == 'JPEG' else 'webp'}"] = data = make_image(4 * number + sample, kind)
            files[f"{name}.cls"] = f"class {sample % 3}".encode()
            images[data] = f"class {sample % 3}"
        files["broken.jpg"], files["broken.cls"], files["alone.cls"] = b"no image", b"class 0", b"class 1"
        write(folder / f"part{number}.tar", format, files)
    return folder, images


def test_other_makers_tars_become_readable_by_number(
    command: Callable[..., object], foreign: tuple[Path, dict[bytes, str]]
) -> None:
    folder, images = foreign
    before = {path: path.read_bytes() for path in folder.iterdir()}
    run = command("index", folder)
    assert (run.returncode, run.stderr) == (0, "")
    assert "8 images, 3 classes, 2 shards" in run.stdout
    index = ShardIndex(folder)
    data = index.read(range(len(index)))
    assert {d: index.classes[label] for d, label in zip(data, index.labels.tolist(), strict=True)} == images
    for d, height, width in zip(data, index.heights, index.widths, strict=True):
        with Image.open(io.BytesIO(d)) as image:
            assert image.size == (width, height)
    assert {path: path.read_bytes() for path in before} == before
    assert [entry.source for entry in index.manifest.rejected] == ["part0/broken.jpg", "part1/broken.jpg"]
    assert index.describe(0).startswith("part0.tar, key x/0, offset ")
    assert LONG[:90] in index.describe(2)


def test_a_second_run_and_a_check_agree(
    command: Callable[..., object], foreign: tuple[Path, dict[bytes, str]], contents: Callable[[Path], dict[str, bytes]]
) -> None:
    folder, _ = foreign
    assert command("index", folder, "--workers", 1).returncode == 0
    once = contents(folder)
    assert set(once) == {"part0.tar", "part1.tar", "index.npy", "manifest.json", "rejected.csv", "duplicates.csv"}
    assert command("index", folder, "--workers", 2).returncode == 0
    assert contents(folder) == once
    (folder / "manifest.json").unlink()
    for name in ("index.npy", "rejected.csv", "duplicates.csv"):
        run = command("index", folder)
        assert run.returncode == 1
        assert f"holds {min(p.name for p in folder.glob('[!p]*'))}" in run.stderr  # nobody's file is written over
        (folder / name).unlink()
    for name in ("index.npy", "rejected.csv", "duplicates.csv"):
        (folder / name).unlink(missing_ok=True)
    assert command("index", folder, "--workers", 2).returncode == 0
    assert contents(folder) == once
    assert check(folder, 2).problems == ()


def test_check_notices_a_damaged_image_of_theirs(
    command: Callable[..., object], foreign: tuple[Path, dict[bytes, str]]
) -> None:
    folder, _ = foreign
    command("index", folder)
    record = ShardIndex(folder).records[1]
    with (folder / "part0.tar").open("r+b") as file:
        file.seek(int(record["offset"]) + 9)
        file.write(b"\0\1\2")
    crc, sha = check(folder, 1).problems
    assert crc.startswith(f"part0.tar, offset {record['offset']}: its crc32 differs")
    assert "sha256 differs" in sha


def test_tars_can_be_numbered_as_another_set(
    command: Callable[..., object], foreign: tuple[Path, dict[bytes, str]], tmp_path: Path
) -> None:
    folder, _ = foreign
    for number in range(5):
        (tmp_path / "src" / f"class {number - 1}").mkdir(parents=True)
        (tmp_path / "src" / f"class {number - 1}" / "1.jpg").write_bytes(make_image(number, "JPEG"))
    assert command("pack", tmp_path / "src", tmp_path / "train").returncode == 0
    assert command("index", folder, "--classes", tmp_path / "train" / "manifest.json").returncode == 0
    classes = load_manifest(LocalFolder(str(tmp_path / "train"))).classes
    assert ShardIndex(folder).classes == classes
    assert sorted(set(ShardIndex(folder).labels.tolist())) == [1, 2, 3]


def test_folders_without_tars_and_folders_of_ours(command: Callable[..., object], packed: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no tars" in command("index", tmp_path / "empty").stderr
    assert "was made by make-shards pack" in command("index", packed).stderr
    with tarfile.open(tmp_path / "empty" / "t.tar", "w:gz"):
        pass
    assert (
        "t.tar is a compressed tar file, which cannot be read by offsets" in command("index", tmp_path / "empty").stderr
    )
