"""Files in zip archives by offset, held against zipfile."""

import io
import os
import random
import shutil
import struct
import subprocess
import tracemalloc
import zipfile
import zlib
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import UserError
from shards.sources.zips import DamagedError, Member, list_members, read_member

Named = tuple[str, bytes]
FILES = [
    ("val2017/a.jpg", random.Random(0).randbytes(3000)),
    ("val2017/b c 'd'.jpg", b"compresses well" * 1000),
    ("empty.png", b""),
    ("Süß 猫.webp", b"image"),
    ("x" * 300, b"long"),
]
STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


def zip_of(files: list[Named], method: int = DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in files:
            archive.writestr(name, data)
    return file.getvalue()


def listed(data: bytes) -> list[Member]:
    return list(list_members(io.BytesIO(data), "x.zip"))


def unpacked(data: bytes, member: Member) -> bytes:
    def read(offset: int, size: int) -> bytes:
        return data[offset : offset + size]

    return read_member(read, *member[1:])


def contents(data: bytes) -> list[Named]:
    return [(member.name, unpacked(data, member)) for member in listed(data)]


def refused(data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        listed(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", [STORED, DEFLATED])
def test_stored_and_deflated_files(method: int) -> None:
    data = zip_of(FILES, method)
    assert contents(data) == FILES
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        expected = [(i.header_offset, i.compress_size, i.file_size, i.CRC) for i in archive.infolist()]
    assert [member[1:] for member in listed(data)] == expected


@given(
    st.lists(st.tuples(st.binary(max_size=3000), st.sampled_from([STORED, DEFLATED])), max_size=6),
    st.binary(max_size=99),
)
def test_whatever_zipfile_writes_is_read(files: list[tuple[bytes, int]], before: bytes) -> None:
    file = io.BytesIO()
    file.write(before)  # as in self-extracting archives
    with zipfile.ZipFile(file, "a") as archive:
        for number, (data, method) in enumerate(files):
            archive.writestr(f"{number}.jpg", data, method)
    assert contents(file.getvalue()) == [(f"{number}.jpg", data) for number, (data, _) in enumerate(files)]


def test_members_are_read_in_any_order_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(zip_of(FILES))
    with path.open("rb") as file:
        found = list(list_members(file, "x.zip"))
        assert not file.closed
        read = partial(lambda descriptor, offset, size: os.pread(descriptor, size, offset), file.fileno())
        assert [read_member(read, *member[1:]) for member in reversed(found)] == [data for _, data in reversed(FILES)]


class Pipe(io.RawIOBase):
    """What cannot be sought in."""

    def __init__(self) -> None:
        self.written = b""

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:
        self.written += bytes(data)
        return len(bytes(data))


def test_streamed_archives_have_their_sizes_behind_the_data() -> None:
    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", DEFLATED) as archive:
        for name, data in FILES:
            archive.writestr(name, data)
    assert struct.unpack_from("<H", pipe.written, 6)[0] & 8
    assert contents(pipe.written) == FILES


def test_zip64() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", DEFLATED) as archive:
        for name, data in FILES:
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(data)
    assert contents(file.getvalue()) == FILES


def test_offsets_beyond_4_gib(tmp_path: Path) -> None:
    path = tmp_path / "big.zip"
    with path.open("wb") as file:
        file.truncate(5 << 30)  # a hole: it takes no room on the disk
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr("a.jpg", b"far away")
    with path.open("rb") as file:
        (member,) = list_members(file, "big.zip")
        assert member.offset == 5 << 30
        assert read_member(lambda offset, size: os.pread(file.fileno(), size, offset), *member[1:]) == b"far away"


def test_more_files_than_the_old_directory_counts() -> None:
    data = zip_of([(f"{number}.jpg", b"") for number in range(66_000)], STORED)
    assert len(listed(data)) == 66_000


def test_folders_and_links_are_passed_over() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.mkdir("folder") if hasattr(archive, "mkdir") else archive.writestr("folder/", b"")
        link = zipfile.ZipInfo("link.jpg")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "a.jpg")
        archive.writestr("./a.jpg", b"1")
    assert contents(file.getvalue()) == [("a.jpg", b"1")]


def test_what_info_zip_writes(tmp_path: Path) -> None:
    if not shutil.which("zip"):
        pytest.skip("Info-ZIP is not here")
    root = tmp_path / "in"
    for name, data in FILES[:4]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (root / "link.jpg").symlink_to("empty.png")
    subprocess.run(["zip", "-qry", tmp_path / "x.zip", "."], cwd=root, check=True)
    assert sorted(contents((tmp_path / "x.zip").read_bytes())) == sorted(FILES[:4])


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (b"\x81.jpg", "ü.jpg"),
        ("猫/é.jpg".encode(), "猫/é.jpg"),
        (b"caf\x82.jpg", "café.jpg"),
        (b"\xff\xfe", "\u00a0\u25a0"),
    ],
)
def test_names_without_the_utf8_flag_are_utf8_or_cp437(raw: bytes, name: str) -> None:
    mark = b"?" * len(raw)
    assert contents(zip_of([(mark.decode(), b"1")]).replace(mark, raw)) == [(name, b"1")]


def test_encrypted_files_are_refused() -> None:
    data = bytearray(zip_of(FILES[:1]))
    data[data.index(b"PK\1\2") + 8] |= 1
    refused(bytes(data), r"^x\.zip: 'val2017/a\.jpg' is encrypted\. Unpack x\.zip and give the folder as SRC\.$")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_methods_are_refused(method: int) -> None:
    refused(zip_of(FILES, method), rf"^x\.zip: 'val2017/a\.jpg' is compressed by method {method}\. Unpack x\.zip")


WHOLE = zip_of(FILES)


@pytest.mark.parametrize(
    "data", [b"", b"PK\3\4", b"<html>" * 300, WHOLE[:2000], WHOLE[:-1], WHOLE[:-400], WHOLE[2000:2100]]
)
def test_cut_off_archives_and_other_files(data: bytes) -> None:
    refused(data, r"^x\.zip is not a zip archive, or is damaged or cut off \(.*\)\. Download the archive again\.$")


def test_damaged_directory() -> None:
    start = WHOLE.index(b"PK\1\2")
    refused(WHOLE[:start] + b"PQ" + WHOLE[start + 2 :], "^x.zip is not a zip archive, or is damaged")
    beyond = bytearray(WHOLE)
    struct.pack_into("<I", beyond, start + 42, 1 << 30)
    refused(
        bytes(beyond), r"^x\.zip: 'val2017/a\.jpg' lies beyond the end of the archive\. Download the archive again\.$"
    )


@pytest.mark.parametrize(
    ("place", "reason"),
    [(0, "no header where"), (8, "another method"), (30 + len(FILES[0][0]) + 100, "crc differs")],
)
def test_damaged_file_is_named_by_its_reason(place: int, reason: str) -> None:
    data = bytearray(zip_of(FILES, STORED))
    members_of_whole = listed(bytes(data))
    data[place] ^= 1
    with pytest.raises(DamagedError, match=f"^damaged in the zip: {reason}") as caught:
        unpacked(bytes(data), members_of_whole[0])
    assert "\n" not in str(caught.value)
    assert unpacked(bytes(data), members_of_whole[1]) == FILES[1][1]


def test_every_flip_in_deflated_data_is_found() -> None:
    member = listed(WHOLE)[1]
    start = member.offset + 30 + len(member.name)
    for place in range(start, start + member.packed):
        data = bytearray(WHOLE)
        data[place] ^= 1 << place % 8
        try:
            found = unpacked(bytes(data), member)
        except DamagedError:
            continue
        assert found == FILES[1][1]  # a bit that means nothing


def test_archive_that_shrank_since_it_was_listed() -> None:
    for member in listed(WHOLE):
        if member.size:
            with pytest.raises(DamagedError, match=r"cut off|no header"):
                unpacked(WHOLE[: member.offset + 31 + len(member.name.encode())], member)


@pytest.mark.parametrize("size", [10, 10_000, 1 << 31, 1 << 70])
def test_header_that_lies_about_the_size_does_not_explode(size: int) -> None:
    bomb = zlib.compress(bytes(100 << 20))
    data = zip_of([("bomb.png", b"")], STORED)[: 30 + len("bomb.png")] + bomb[2:-4]
    data = data[:8] + struct.pack("<H", DEFLATED) + data[10:]
    tracemalloc.start()
    with pytest.raises(DamagedError, match=r"^damaged in the zip: size differs$"):
        read_member(lambda offset, size: data[offset : offset + size], 0, len(bomb) - 6, size, 0)
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


def made_on(system: int, names: list[str]) -> bytes:
    """A zip archive that another system's program wrote, with these names as they are."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            entry = zipfile.ZipInfo("x")
            entry.filename, entry.create_system = name, system
            archive.writestr(entry, b"" if name.endswith("\\") else b"image")
    return file.getvalue()


@pytest.mark.parametrize("system", [0, 10, 11, 14])
def test_backslashes_of_windows_are_folders(system: int) -> None:
    names = ["set\\", "set\\cat\\", "set\\cat\\1.jpg", "set/dog\\2.jpg"]
    assert [member.name for member in listed(made_on(system, names))] == ["set/cat/1.jpg", "set/dog/2.jpg"]


def test_backslashes_are_folders_where_no_name_has_a_slash() -> None:
    assert [member.name for member in listed(made_on(3, ["cat\\", "cat\\1.jpg", "dog\\2.jpg"]))] == [
        "cat/1.jpg",
        "dog/2.jpg",
    ]
    names = ["cat/back\\slash.jpg", "dog/2.jpg"]
    assert [member.name for member in listed(made_on(3, names))] == names
