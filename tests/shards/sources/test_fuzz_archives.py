"""Damaged tars and zips: members inside the file or one clear line; never a crash, a hang or much memory."""

import bz2
import gzip
import io
import lzma
import random
import re
import tarfile
import time
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import pytest

from shards.errors import UserError
from shards.layout import BLOCK, TAR_END, make_padding
from shards.sources import tars, webdataset, zips

MUTANTS = 300
MORE_MUTANTS = 2_000
MOST_MEMORY = 4 << 20  # bytes
XZ_MEMORY = 16 << 20  # bytes; what xz looks back to takes 8 of them
MOST_SECONDS = 2.0  # a mutant
NUMBERS = [
    b"\x80" + b"\xff" * 11,
    b"\xff" * 12,
    b"77777777777\0",
    b"-0000000001\0",
    b"\x80" + bytes(7) + b"\1\0\0\0",
    bytes(12),
]
PAX = [b"size=%s", b"path=%s", b"GNU.sparse.major=%s", b"comment=%s", b"hdrcharset=%s"]

Mutation = Callable[[random.Random, bytearray], None]


def tar_of(draws: random.Random, format: int, names: Iterable[str]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format, encoding="utf-8", errors="surrogateescape") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            data = draws.randbytes(draws.randrange(1500))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def whole_tars(draws: random.Random) -> Iterator[bytes]:
    """Tars of all formats, and one of tars."""
    names = ["a.jpg", "a.cls", "d/b.JPEG", "d/b.json"]
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        long = [] if format == tarfile.USTAR_FORMAT else ["x" * 200 + ".png", "猫\udcff" * 40 + ".webp"]
        yield tar_of(draws, format, names + long)
    inner = [(f"n0{n}.tar", tar_of(draws, tarfile.PAX_FORMAT, [f"n0{n}_{m}.JPEG" for m in range(3)])) for n in range(3)]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in inner:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    yield file.getvalue()


def flip(draws: random.Random, data: bytearray) -> None:
    for _ in range(draws.choice([1, 1, 8, 100])):
        if data:
            data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)


def cut(draws: random.Random, data: bytearray) -> None:
    del data[draws.randrange(len(data) + 1) :]


def splice(draws: random.Random, data: bytearray) -> None:
    unit = draws.choice([1, BLOCK])  # whole blocks moved about are the subtle damage
    start, end, at = (draws.randrange(len(data) + 1) // unit * unit for _ in range(3))
    piece = bytes(data[min(start, end) : max(start, end)])[: 20 * BLOCK]
    data[at : at + draws.choice([0, len(piece)])] = piece


def zeros(draws: random.Random, data: bytearray) -> None:
    at = draws.randrange(len(data) + 1) // BLOCK * BLOCK
    data[at : at + BLOCK] = bytes(len(data[at : at + BLOCK]))


def headers(data: bytes) -> list[int]:
    return [at for at in range(0, len(data) - BLOCK + 1, BLOCK) if data[at + 257 : at + 262] == b"ustar"]


def seal(data: bytearray, at: int) -> None:
    """Make a header's checksum right, so that damage gets past it."""
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + BLOCK])


def forge_header(draws: random.Random, data: bytearray) -> None:
    """A field of a header replaced, its checksum right."""
    if places := headers(data):
        at = draws.choice(places)
        if draws.random() < 0.5:
            data[at + 124 : at + 136] = draws.choice([*NUMBERS, b"%011o\0" % draws.randrange(5000)])
        elif draws.random() < 0.7:
            data[at + 156] = draws.choice(b"\0" + b"01234567xgXLKSDVMNZ\xff")
        else:
            field = at + draws.choice([0, 100, 108, 136, 257, 345, 386, 482, 483])
            data[field : field + 12] = draws.choice([*NUMBERS, draws.randbytes(12)])
        seal(data, at)


def forge_extension(draws: random.Random, data: bytearray) -> None:
    """A PAX or GNU header put before some member: absurd values, or absurd lengths."""
    value = draws.choice([b"-1", b"0", b"9" * 30, b"600", b"", b"\xff\xfe", b"x" * 3000, b"1e9", b"BINARY"])
    text = draws.choice(PAX) % value
    length = draws.choice([len(text) + 3 + len(str(len(text) + 3)), 0, 1, 10**6, 10**18, draws.randrange(3000)])
    record = b"%d %s\n" % (length, text)
    info = tarfile.TarInfo("forged")
    info.type = draws.choice([tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
    info.size = draws.choice([len(record), len(record), 8 << 30, 0, len(record) // 2])
    whole = info.tobuf(tarfile.GNU_FORMAT) + record + make_padding(len(record))
    at = draws.choice(headers(data) or [0])
    data[at:at] = whole * draws.choice([1, 1, 2, 300])


TAR_MUTATIONS = [flip, cut, splice, zeros, forge_header, forge_header, forge_extension]


def mutant(draws: random.Random, whole: list[bytes], mutations: list[Mutation]) -> bytes:
    data = bytearray(draws.choice(whole))
    for _ in range(draws.randrange(1, 4)):
        draws.choice(mutations)(draws, data)
    return bytes(data)


def refusal(error: Exception, start: str | tuple[str, ...]) -> str:
    assert str(error).startswith(start)
    assert "\n" not in str(error)
    return "refused"


def read_tar(data: bytes) -> str:
    """What became of it."""
    for of in (tars.list_members, tars.list_nested_members):
        outcome, found = "whole", []
        try:
            for member in of(io.BytesIO(data), "x.tar"):
                found.append(member)
        except UserError as error:
            outcome = refusal(error, ("x.tar: ", "x.tar, member '"))
        assert all(BLOCK <= member.offset <= member.offset + member.size <= len(data) for member in found)
        groups = list(webdataset.group_samples(found))
        assert sum(group.image is not None for group in groups) <= len(found)
    return outcome


def read_zip(data: bytes) -> str:
    try:
        found = list(zips.list_members(io.BytesIO(data), "x.zip"))
    except UserError as error:
        return refusal(error, "x.zip")
    outcome = "whole"
    for member in found:
        try:
            assert len(zips.read_member(lambda offset, size: data[offset : offset + size], *member[1:])) == member.size
        except zips.DamagedError as error:
            refusal(error, "damaged in the zip: ")
            outcome = "partly"
    return outcome


def read_compressed(data: bytes) -> str:
    try:
        tars.decompress(io.BytesIO(data), io.BytesIO(), "x.tgz")
    except UserError as error:
        return refusal(error, "x.tgz")
    return "whole"


def survive(
    read: Callable[[bytes], str], mutants: Iterator[bytes], count: int, memory: int = MOST_MEMORY
) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    tracemalloc.start()
    try:
        for data in (next(mutants) for _ in range(count)):
            tracemalloc.reset_peak()
            held, began = tracemalloc.get_traced_memory()[0], time.process_time()
            outcomes[read(data)] += 1
            assert time.process_time() - began < MOST_SECONDS
            assert tracemalloc.get_traced_memory()[1] - held < memory
    finally:
        tracemalloc.stop()
    return outcomes


def tar_mutants(seed: int) -> Iterator[bytes]:
    draws = random.Random(seed)
    whole = list(whole_tars(draws))
    while True:
        yield mutant(draws, whole, TAR_MUTATIONS)


def zip_mutants(seed: int) -> Iterator[bytes]:
    draws = random.Random(seed)
    whole = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as archive:
            for number in range(5):
                with archive.open(f"猫/{number}.jpg", "w", force_zip64=number == 3) as member:
                    member.write(draws.randbytes(300) + bytes(draws.randrange(100_000)))
        whole.append(file.getvalue())
    while True:
        yield mutant(draws, whole, [flip, cut, splice, flip_directory, flip_directory])


def flip_directory(draws: random.Random, data: bytearray) -> None:
    places = [match.start() for match in re.finditer(rb"PK[\x01\x03\x05][\x02\x04\x06]", data)]
    if places:
        at = draws.choice(places) + draws.randrange(60)
        data[at : at + 4] = draws.choice([b"\xff" * 4, bytes(4), draws.randbytes(4), b"\xff\xff\xff\x7f"])


def compressed_mutants(seed: int) -> Iterator[bytes]:
    draws = random.Random(seed)
    whole = [compress(next(whole_tars(draws))) for compress in (gzip.compress, bz2.compress, lzma.compress)]
    while True:
        yield mutant(draws, whole, [flip, cut, splice])


def check_all(seed: int, count: int) -> None:
    found = survive(read_tar, tar_mutants(seed), count)
    assert min(found["whole"], found["refused"]) > count / 20  # else the fuzz does not look where it should
    found = survive(read_zip, zip_mutants(seed), count)
    assert min(found["whole"], found["partly"], found["refused"]) > count / 50
    found = survive(read_compressed, compressed_mutants(seed), count, XZ_MEMORY)
    assert found["refused"] > count / 2


def test_damaged_archives() -> None:
    check_all(0, MUTANTS)


@pytest.mark.slow
def test_many_damaged_archives() -> None:
    check_all(1, MORE_MUTANTS)


def test_undamaged_archives_are_whole() -> None:
    assert {read_tar(data) for data in whole_tars(random.Random(0))} == {"whole"}
    assert read_tar(b"x" + TAR_END) == "refused"
