"""Damaged archives, packed: every one ends in shards that check out, or in one clear line and no manifest."""

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shards.errors import UserError
from shards.images.decode import decode
from shards.index import ShardIndex
from shards.inspect import check as check_module
from shards.inspect.check import check
from shards.packing.pack import pack
from shards.packing.plan import Options
from shards.sources.scan import scan
from shards.storage.folders import open_folder
from tests.shards.fuzz import mutant, whole_files


def inline(
    function: Callable[..., Any],
    make_task: Callable[[int], Any],
    count: int,
    workers: int,
    progress: Callable[[int], None],
    overrun: object = None,
) -> list[Any]:
    """An engine without processes, which would take half a second each time."""
    return [function(make_task(number), lambda done: None) for number in range(count)]


def archives() -> list[bytes]:
    """Small archives of whole images: a WebDataset tar, a tar of tars, a zip, a tar in PAX format."""
    images = [data for name, data in whole_files().items() if len(data) < 8_000 and "moving" not in name]
    samples = {
        f"{n:03d}.{kind}": data for n, p in enumerate(images) for kind, data in (("jpg", p), ("cls", b"%d" % (n % 3)))
    }
    of_tars = {f"n{k}.tar": tar_of({f"n{k}_{n}.JPEG": p for n, p in enumerate(images[k::3])}) for k in range(3)}
    in_zip = io.BytesIO()
    with zipfile.ZipFile(in_zip, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, image in enumerate(images):
            archive.writestr(f"set/c{number % 2}/{number}.png", image)
    return [tar_of(samples), tar_of(of_tars), in_zip.getvalue(), tar_of({"é" * 120 + ".jpg": images[0]})]


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def refusal(source: Path, out: Path) -> str | None:
    """Pack; the line that it was refused with, or None. Whatever else happens is the test's failure."""
    folder = open_folder(str(out))
    try:
        with folder.lock("taken"):
            pack(scan(source, "auto", folder.work_folder), folder, Options(shard_size=20_000), 1, run=inline)
    except UserError as error:
        return str(error)
    return None


def pack_mutants(count: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """(kept archives, refused ones)."""
    monkeypatch.setattr(check_module, "run_tasks", inline)
    whole = archives()
    refused = 0
    for seed in range(count):
        source, out = folder / f"{seed}.archive", folder / f"{seed}"
        source.write_bytes(mutant(seed, whole))
        line = refusal(source, out)
        assert not list(out.rglob("*.tmp"))
        if line is not None:
            refused += 1
            assert line
            assert "\n" not in line
            assert not (out / "manifest.json").exists()
            continue
        assert check(out, 1).problems == ()
        index = ShardIndex(out)
        for data, height, width in zip(index.read(range(len(index))), index.heights, index.widths, strict=True):
            assert decode(data)[1:3] == (height, width)
    return count - refused, refused


def test_damaged_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, refused = pack_mutants(120, tmp_path, monkeypatch)
    assert kept > 10
    assert refused > 10


@pytest.mark.slow
def test_two_thousand_damaged_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, refused = pack_mutants(2_000, tmp_path, monkeypatch)
    assert kept > 200
    assert refused > 200
