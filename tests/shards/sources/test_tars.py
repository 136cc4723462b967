"""Members of tars by offset, held against tarfile, GNU tar and webdataset."""

import bz2
import gzip
import io
import lzma
import os
import random
import shutil
import subprocess
import tarfile
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import UserError
from shards.layout import BLOCK, TAR_END, make_padding, make_tar_header
from shards.sources.tars import Member, decompress, is_compressed, is_tar, list_members, list_nested_members
from shards.sources.webdataset import Sample, group_samples, parse_label

NAMES = {
    "short": "a.jpg",
    "101": "d/" + "x" * 99,
    "prefix": "p" * 90 + "/" + "x" * 90 + ".jpg",
    "long": "d/" * 200 + "x" * 300 + ".JPEG",
    "unicode": "Katze/süß 猫.png",
    "long unicode": "猫/" * 50 + "猫.png",
    "no UTF-8": "a\udce9\udcff.jpg",
    "long no UTF-8": "a\udce9\udcff" * 60 + ".jpg",
    "newline": "two\nlines 'quoted' \"twice\".jpg",
    "equals": "25 path=b.jpg",
}
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}

Named = tuple[str, bytes]


def tar_of(files: Iterable[Named], format: int = tarfile.USTAR_FORMAT, **fields: object) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format, encoding="utf-8", errors="surrogateescape") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def contents(data: bytes, of: Callable[..., Iterable[Member]] = list_members) -> list[Named]:
    """Names and payloads, read by offset after the last member is known."""
    found = list(of(io.BytesIO(data), "x.tar"))
    return [(member.name, data[member.offset : member.offset + member.size]) for member in found]


def refused(data: bytes, message: str, of: Callable[..., Iterable[Member]] = list_members) -> None:
    with pytest.raises(UserError, match=message) as caught:
        list(of(io.BytesIO(data), "x.tar"))
    assert "\n" not in str(caught.value)


def record(key: bytes, value: bytes) -> bytes:
    size = len(key) + len(value) + 3
    while len(str(size)) + len(key) + len(value) + 3 != size:
        size = len(str(size)) + len(key) + len(value) + 3
    return b"%d %s=%s\n" % (size, key, value)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, **fields: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT if size < 0 or size >= 8**11 else tarfile.USTAR_FORMAT)


def block(name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    return header(name, len(data), kind) + data + make_padding(len(data))


PLAIN = tar_of([("a.jpg", b"1" * 700), ("b.jpg", b"2" * 512), ("c.jpg", b"")])[: 2 * 512 + 1024 + 512 + 512] + TAR_END


# Parsing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_names_of_all_kinds_in_all_formats(format: str, name: str) -> None:
    if format == "ustar" and name in ("long", "long unicode", "long no UTF-8"):
        pytest.skip("USTAR cannot hold it")
    files = [(NAMES[name], b"first" * 300), ("after.jpg", b"second")]
    assert contents(tar_of(files, FORMATS[format])) == files


@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_numbers_that_ustar_has_no_room_for(format: str) -> None:
    files = [("a.jpg", b"x" * 513), ("b.jpg", b"y")]
    assert contents(tar_of(files, FORMATS[format], uid=2**40, gid=2**33, mtime=2**35)) == files


def test_fractional_times_and_foreign_pax_fields() -> None:
    files = [("a.jpg", b"x" * 513), ("b.jpg", b"y")]
    extra = {"comment": "a=b\nc", "SCHILY.xattr.user": "v" * 5000}
    assert contents(tar_of(files, tarfile.PAX_FORMAT, mtime=1.25, pax_headers=extra)) == files


def test_size_in_a_pax_header_goes_before_the_field() -> None:
    fields = record(b"size", b"600") + record(b"path", b"real.jpg")
    data = block("x", fields, tarfile.XHDTYPE) + header("short.jpg", 0) + b"z" * 600 + make_padding(600)
    data += block("next.jpg", b"n") + TAR_END
    assert contents(data) == [("real.jpg", b"z" * 600), ("next.jpg", b"n")]


def test_pax_headers_end_with_their_member_and_global_ones_last() -> None:
    data = block("g", record(b"path", b"global.jpg") + record(b"comment", b"git"), tarfile.XGLTYPE)
    data += block("x", record(b"path", b"own.jpg"), tarfile.XHDTYPE)
    data += block("a.jpg", b"1") + block("b.jpg", b"2") + TAR_END
    assert contents(data) == [("own.jpg", b"1"), ("global.jpg", b"2")]


@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_members_beyond_8_gib(format: str, tmp_path: Path) -> None:
    size = 9 << 30
    path = tmp_path / "big.tar"
    info = tarfile.TarInfo("big.bin")
    info.size = size
    with path.open("wb") as file:  # with a hole: it takes no room on the disk
        file.write(info.tobuf(FORMATS[format]))
        start = file.tell()
        file.seek(size, os.SEEK_CUR)
        file.write(block("after.jpg", b"after") + TAR_END)
    with path.open("rb") as file:
        assert list(list_members(file, "big.tar")) == [
            Member("big.bin", start, size),
            Member("after.jpg", start + size + BLOCK, 5),
        ]


names = st.binary(min_size=1, max_size=300).map(
    lambda raw: raw.replace(b"\0", b"0").strip(b"/").decode("utf-8", "surrogateescape")
)


@given(st.lists(st.tuples(names.filter(bool), st.binary(max_size=1500)), max_size=8), st.sampled_from(["gnu", "pax"]))
def test_offset_and_size_cut_the_payload_out(files: list[Named], format: str) -> None:
    data = tar_of(files, FORMATS[format])
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8", errors="surrogateescape") as tar:
        offsets = [info.offset_data for info in tar]
    assert [member.offset for member in list_members(io.BytesIO(data), "x")] == offsets
    assert contents(data) == [(name.removeprefix("./"), payload) for name, payload in files]


def test_links_folders_and_devices_are_passed_over() -> None:
    kinds = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
    bare = b"".join(
        header(f"{kind.decode()}.{'txt' if kind == tarfile.LNKTYPE else 'jpg'}", 700, kind, linkname="a.jpg")
        for kind in kinds
    )  # no payload follows
    unknown = block("volume", b"?" * 600, b"Z")
    old = block("old.jpg", b"old", tarfile.AREGTYPE) + header("folder/", 0, tarfile.AREGTYPE)
    contiguous = block("c.jpg", b"c", tarfile.CONTTYPE)
    data = bare + unknown + old + contiguous + block("a.jpg", b"payload") + TAR_END
    assert contents(data) == [("old.jpg", b"old"), ("c.jpg", b"c"), ("a.jpg", b"payload")]


def test_an_image_that_is_a_hard_link_is_refused_by_name() -> None:
    data = block("b/1.jpg", b"1") + header("a/1.jpg", 0, tarfile.LNKTYPE, linkname="b/1.jpg") + TAR_END
    with pytest.raises(UserError, match=r"x\.tar: a/1\.jpg is a hard link .* --hard-dereference"):
        contents(data)


def test_link_with_a_long_target_does_not_rename() -> None:
    data = block("././@LongLink", b"t" * 300 + b"\0", tarfile.GNUTYPE_LONGLINK) + header("l", 0, tarfile.SYMTYPE)
    assert contents(data + block("a.jpg", b"1") + TAR_END) == [("a.jpg", b"1")]


def test_file_may_be_moved_between_members() -> None:
    file = io.BytesIO(PLAIN)
    names = []
    for member in list_members(file, "x"):
        names.append(member.name)
        file.seek(3)
        file.read(5)
    assert names == ["a.jpg", "b.jpg", "c.jpg"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Files with names of all kinds, an empty one, a folder, links of both kinds."""
    root = tmp_path / "tree"
    for number, name in enumerate(
        ["a.jpg", "d/b c.jpg", "d/empty.png", "d/new\nline.jpg", "d/" + "x" * 99, "é/猫.jpg"]
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]) * (700 * number) if "empty" not in name else b"")
    (root / "d" / "soft.jpg").symlink_to("../a.jpg")
    (root / "d" / "one.txt").write_text("one")
    os.link(root / "d" / "one.txt", root / "d" / "two.txt")
    return root


def gnu_tar(out: Path, root: Path, *options: str) -> bytes:
    if not shutil.which("tar") or b"GNU" not in subprocess.run(["tar", "--version"], capture_output=True).stdout:
        pytest.skip("GNU tar is not here")
    subprocess.run(["tar", "-cf", out, *options, "-C", root, "."], check=True)
    return out.read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        ["--format=gnu"],
        ["--format=oldgnu"],
        ["--format=posix", "--xattrs"],
        ["--format=ustar"],
        ["--format=gnu", "--incremental"],  # which puts times where USTAR has the prefix
        ["--format=gnu", "--label=volume"],
        ["--format=gnu", "--blocking-factor=1"],
    ],
    ids=" ".join,
)
def test_what_gnu_tar_writes(tree: Path, tmp_path: Path, options: list[str]) -> None:
    if options[0] != "--format=ustar":
        for name in (b"d/\xff\xe9.jpg", b"l" * 200 + b"/" + b"n" * 250 + b".jpg"):
            path = os.path.join(os.fsencode(tree), name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Path(os.fsdecode(path)).write_bytes(name)
    found = contents(gnu_tar(tmp_path / "t.tar", tree, *options))
    on_disk = {
        os.path.relpath(path, tree): path for path in tree.rglob("*") if path.is_file() and not path.is_symlink()
    }
    assert len(found) == len(on_disk) - 1  # of the two names of one file, the second is a link
    twins = {"d/one.txt", "d/two.txt"}
    assert {name for name, _ in found} - twins == on_disk.keys() - twins
    assert all(data == on_disk[name].read_bytes() for name, data in found)


@pytest.mark.parametrize("format", ["gnu", "oldgnu", "posix"])
def test_sparse_files_are_refused_by_name(tmp_path: Path, format: str) -> None:
    (tmp_path / "in").mkdir()
    with (tmp_path / "in" / "holes.jpg").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    data = gnu_tar(tmp_path / "t.tar", tmp_path / "in", f"--format={format}", "--sparse")
    if len(data) > 1 << 19:
        pytest.skip("this file system has no holes")
    refused(data, r"^x\.tar: '\./.*holes\.jpg' is stored as a sparse file\. Make the tar again without --sparse\.$")


# Damage --------------------------------------------------------------------------------------------------------------


def test_tar_without_end_blocks_is_whole_at_a_members_end() -> None:
    assert contents(PLAIN[: -len(TAR_END)]) == contents(PLAIN)
    assert contents(PLAIN + bytes(3 << 20)) == contents(PLAIN)


@pytest.mark.parametrize("length", [1, 511, 512, 513, 1212, 1535, 1536 + 1, 2047, 2048 + 511, 3071])
def test_cut_off_inside_a_member(length: int) -> None:
    at = max(start for start in (0, 1536, 2560, 3072) if start < length)
    if length in (512, 3071):
        at = {512: 0, 3071: 2560}[length]
    refused(PLAIN[:length], rf"^x.tar: damaged at offset {at} \(cut off\)\. Download the archive again\.$")


@pytest.mark.parametrize("place", range(0, 512, 7))
def test_flipped_bit_in_a_header_in_the_middle(place: int) -> None:
    data = bytearray(PLAIN)
    data[1536 + place] ^= 4
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [info.name for info in tar] == ["a.jpg"]  # silently
    refused(bytes(data), r"^x.tar: damaged at offset 1536 \(no member's header\)\. Download the archive again\.$")


def test_header_overwritten_with_zeros() -> None:
    refused(PLAIN[:1536] + bytes(512) + PLAIN[2048:], r"^x.tar: damaged at offset 1536 \(zeros, but more data follows")
    refused(PLAIN + PLAIN, rf"^x.tar: damaged at offset {len(PLAIN) - 1024} \(zeros, but more data follows")


def test_text_and_nothing() -> None:
    refused(b"", r"^x.tar: damaged at offset 0 \(empty\)")
    refused(b"<html>" * 300, r"^x.tar: damaged at offset 0 \(no member's header\)")


@pytest.mark.parametrize("size", [-1, -512, -(2**60), 2**40, 2**63, 2**80])
def test_absurd_sizes(size: int) -> None:
    refused(header("a.jpg", size) + bytes(2048), r"^x.tar: damaged at offset 0 \((a negative size|cut off)\)")


@pytest.mark.parametrize("size", [b"-1", b"1e3", b"9" * 20, b"9" * 5000, "٣".encode(), b"0x10", b" 5"])
def test_absurd_sizes_in_pax(size: bytes) -> None:
    data = block("x", record(b"size", size), tarfile.XHDTYPE) + block("a.jpg", b"1") + TAR_END
    refused(data, r"^x.tar: damaged at offset 1?[0-9]{3,4} \((no size|cut off)\)")


@pytest.mark.parametrize(
    "fields",
    [
        b"0 path=a\n",
        b"99 path=a\n",
        b"7 path=a\n",
        b"9999999999 path=a\n",
        b"path=a\n",
        b"8 path=\n" + b"\0",
        b"10 path=ab",
    ],
)
def test_absurd_pax_records(fields: bytes) -> None:
    refused(
        block("x", fields, tarfile.XHDTYPE) + block("a", b"") + TAR_END,
        r"^x.tar: damaged at offset 0 \(no PAX header\)",
    )


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_extension_without_its_member(kind: bytes) -> None:
    data = block("x", record(b"path", b"a.jpg"), kind)
    refused(data + TAR_END, r"^x.tar: damaged at offset 1024 \(a member is missing\)")
    refused(data, r"^x.tar: damaged at offset 1024 \(a member is missing\)")
    refused(block("x", record(b"mtime", b"1.5"), kind), r"^x.tar: damaged at offset 1024 \(a member is missing\)")
    assert contents(block("g", record(b"comment", b"x"), tarfile.XGLTYPE) + TAR_END) == []


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_header_that_claims_8_gb_is_not_read(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "huge.tar"
    with path.open("wb") as file:
        file.write(header("x", 8 << 30, kind))
        file.truncate(10 << 30)
    tracemalloc.start()
    with (
        path.open("rb") as file,
        pytest.raises(UserError, match=r"damaged at offset 0 \(a header of 8589934592 bytes\)"),
    ):
        list(list_members(file, "huge.tar"))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_long_chains_of_headers_are_no_recursion() -> None:
    chain = block("g", record(b"comment", b"x"), tarfile.XGLTYPE) * 3000
    assert contents(chain + block("a.jpg", b"1") + TAR_END) == [("a.jpg", b"1")]


def test_memory_does_not_grow_with_members(tmp_path: Path) -> None:
    path = tmp_path / "many.tar"
    with path.open("wb") as file:
        for number in range(30_000):
            file.write(
                make_tar_header(f"{number:09d}.jpg", 0) + block("g", record(b"k%d" % number, b"v"), tarfile.XGLTYPE)
            )
        file.write(TAR_END)
    tracemalloc.start()
    with path.open("rb") as file:
        assert sum(sample.image is not None for sample in group_samples(list_members(file, "many.tar"))) == 30_000
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


# Tars in a tar -------------------------------------------------------------------------------------------------------

INNER = {
    "n01440764": [("n01440764_10026.JPEG", b"tench" * 100), ("n01440764_10027.JPEG", b"another")],
    "n01443537": [("n01443537_1.JPEG", b"goldfish")],
}


def test_tars_in_a_tar_are_read_in_place() -> None:
    outer = [(f"{synset}.tar", tar_of(files)) for synset, files in INNER.items()]
    data = tar_of(
        [*outer, ("d/LICENSE.txt", b"text"), ("d/._x.tar", b"of a Mac"), ("d/Upper.TAR", tar_of([("./e/f", b"g")]))]
    )
    expected = [(f"{synset}/{name}", payload) for synset, files in INNER.items() for name, payload in files]
    assert contents(data, list_nested_members) == [
        *expected,
        ("d/LICENSE.txt", b"text"),
        ("d/._x.tar", b"of a Mac"),
        ("d/Upper/e/f", b"g"),
    ]


def test_only_one_level_of_tars_is_opened() -> None:
    innermost = tar_of([("a.jpg", b"1")])
    data = tar_of([("outer.tar", tar_of([("inner.tar", innermost)]))])
    assert contents(data, list_nested_members) == [("outer/inner.tar", innermost)]


@pytest.mark.parametrize("name", ["n01.tar.gz", "n01.tgz", "n01.TAR.XZ", "n01.tar.zst", "n01.tar"])
def test_compressed_tars_in_a_tar_are_refused(name: str) -> None:
    data = tar_of([("a.jpg", b"1"), (name, gzip.compress(tar_of([("b.jpg", b"2")])))])
    refused(
        data,
        rf"^x.tar: '{name}' is compressed\. Unpack x.tar, then give the folder of its tars as SRC\.$",
        list_nested_members,
    )


def test_damage_in_an_inner_tar_names_it_and_the_outer_offset() -> None:
    inner = bytearray(tar_of(INNER["n01440764"]))
    inner[1024] ^= 1
    data = tar_of([("n01440764.tar", bytes(inner))])
    refused(data, r"^x.tar, member 'n01440764.tar': damaged at offset 1536 \(no member's header\)", list_nested_members)
    data = tar_of([("n01440764.tar", bytes(inner[:700]))])  # the outer tar goes on, the inner one does not
    refused(data, r"^x.tar, member 'n01440764.tar': damaged at offset 512 \(cut off\)", list_nested_members)
    refused(
        tar_of([("n01440764.tar", b"")]),
        r"^x.tar, member 'n01440764.tar': damaged at offset 512 \(empty\)",
        list_nested_members,
    )


# Samples -------------------------------------------------------------------------------------------------------------


def grouped(*names: str) -> list[tuple[str, str | None, str | None]]:
    found = group_samples(Member(name, place, 1) for place, name in enumerate(names))
    return [(key, image and image.name, label and label.name) for key, image, label, _ in found]


def test_samples_are_consecutive_members_of_one_key() -> None:
    assert grouped("a.jpg", "a.cls", "b.cls", "b.jpg", "c.jpg", "a.png") == [
        ("a", "a.jpg", "a.cls"),
        ("b", "b.jpg", "b.cls"),
        ("c", "c.jpg", None),
        ("a", "a.png", None),
    ]


def test_extensions_in_order_of_preference_and_any_case() -> None:
    assert grouped("a.webp", "a.JSON", "a.PNG", "a.JPEG", "a.cls") == [("a", "a.JPEG", "a.cls")]
    assert grouped("a.webp", "a.json", "a.seg.png", "a.txt") == [("a", "a.webp", "a.json")]
    assert grouped("d.v2/a.jpg", "d.v2/a.cls", "e/a.cls") == [
        ("d.v2/a", "d.v2/a.jpg", "d.v2/a.cls"),
        ("e/a", None, "e/a.cls"),
    ]


def test_names_that_are_no_samples_are_passed_over() -> None:
    assert grouped("a.jpg", ".DS_Store", "d/._a.jpg", "README", "__meta.json__", "__all__", "a.cls") == [
        ("a", "a.jpg", "a.cls")
    ]
    assert grouped("notes.txt") == [("notes", None, None)]
    assert grouped() == []


def test_repeated_extension_loses_no_image() -> None:
    assert grouped("a.jpg", "a.cls", "a.jpg", "a.cls") == [("a", "a.jpg", "a.cls")] * 2
    assert grouped("a.jpg", "a.JPG") == [("a", "a.jpg", None), ("a", "a.JPG", None)]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage builder
def test_samples_of_webdatasets_writer_are_those_of_its_reader(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    path = tmp_path / "w.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(20):
            extra = {"json": {"label": number}} if number % 3 else {"cls": number}
            key = f"deep{number % 2}/{'long' * (number * 3)}{number}"
            writer.write(
                {"__key__": key, ("jpg", "png", "webp")[number % 3]: random.Random(0).randbytes(number * 100), **extra}
            )
    data = path.read_bytes()

    def payload(member: Member | None) -> bytes:
        assert member is not None
        return data[member.offset : member.offset + member.size]

    with path.open("rb") as file:
        found = [(s.key, payload(s.image), payload(s.label)) for s in group_samples(list_members(file, "w.tar"))]
    read = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    expected = []
    for sample in read:
        image, label = (next(sample[e] for e in of if e in sample) for of in (("jpg", "png", "webp"), ("cls", "json")))
        expected.append((sample["__key__"], image, label))
    assert len(found) == 20
    assert found == expected


# Labels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extension", "data", "label"),
    [
        ("cls", b"17\n", "17"),
        ("cls", b"\xef\xbb\xbf n01440764 ", "n01440764"),
        ("cls", "Süßes".encode(), "Süßes"),
        ("cls", b" \n", None),
        ("json", b'{"label": 3, "cls": 4}', "3"),
        ("json", b'{"label": null, "class_id": -1}', "-1"),
        ("json", b'{"cls": "cat"}', "cat"),
        ("json", b'{"class": "dog", "label_name": "x"}', "dog"),
        ("json", b'{"label_name": "x"}', "x"),
        ("json", b'{"class_name": "y", "label": ""}', None),
        ("json", b'{"caption": "a cat"}', None),
        ("json", b"[1, 2]", None),
        ("json", b"\xef\xbb\xbf{}", None),
    ],
)
def test_labels(extension: str, data: bytes, label: str | None) -> None:
    assert parse_label(extension, data) == label


@pytest.mark.parametrize(
    ("extension", "data"),
    [
        ("cls", b"\xff"),
        ("json", b"\xff"),
        ("json", b"{"),
        ("json", b""),
        ("json", b"[" * 100_000),
        ("json", b'{"label": ' + b"9" * 5000 + b"}"),
        ("json", b'{"label": 1.5}'),
        ("json", b'{"label": true}'),
        ("json", b'{"label": [1]}'),
    ],
)
def test_unreadable_labels(extension: str, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_label(extension, data)


# Compressed tars -----------------------------------------------------------------------------------------------------

COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}
LONG = tar_of([("a.jpg", random.Random(0).randbytes(300_000)), ("b.jpg", bytes(3_000_000))])


def plain_of(data: bytes) -> bytes:
    target = io.BytesIO()
    decompress(io.BytesIO(data), target, "x.tgz")
    return target.getvalue()


@pytest.mark.parametrize("compress", COMPRESS.values(), ids=COMPRESS)
def test_decompressed_tars_are_the_plain_ones(compress: Callable[[bytes], bytes]) -> None:
    assert is_compressed(compress(LONG)[:512])
    plain = plain_of(compress(LONG))
    assert plain == LONG
    assert plain_of(compress(LONG[:1000]) + compress(LONG[1000:])) == LONG  # as pigz and pbzip2 write


@pytest.mark.parametrize("compress", COMPRESS.values(), ids=COMPRESS)
def test_damaged_compressed_tars(compress: Callable[[bytes], bytes]) -> None:
    whole = compress(LONG)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 16
    for data in (bytes(flipped), whole[: len(whole) // 2], whole[:-1], whole[:9]):
        with pytest.raises(UserError, match=r"^x\.tgz: damaged compressed data \(.*\)\. Download the archive again\.$"):
            plain_of(data)


def test_zstd_is_refused_with_the_mend() -> None:
    data = b"\x28\xb5\x2f\xfd" + bytes(100)
    assert is_compressed(data)
    with pytest.raises(UserError, match=r"^x\.tgz is not compressed with gzip, bzip2 or xz\. Decompress it first"):
        plain_of(data)


def test_full_disk_is_not_taken_for_damage() -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        decompress(io.BytesIO(gzip.compress(LONG)), Full(), "x")


def test_tars_are_told_by_their_head() -> None:
    assert is_tar(PLAIN[:512])
    assert is_tar(tar_of([("x" * 300, b"")], tarfile.PAX_FORMAT))
    for head in (b"", b"PK\3\4" * 300, bytes(512), PLAIN[:511], gzip.compress(PLAIN)):
        assert not is_tar(head)
    assert not is_compressed(PLAIN[:512])
    assert not is_compressed(b"")


def test_sample_names_its_fields() -> None:
    member = Member("a.jpg", 512, 3)
    assert list(group_samples([member])) == [Sample(key="a", image=member, label=None)]
