"""List what lies in a tar and at which offset, without unpacking it: files, and the files of tars in a tar."""

import bz2
import gzip
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from shards.errors import UserError
from shards.layout import BLOCK

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_EXTENSION_HEADERS = (*_PAX, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
# Whatever size such a header gives, no payload follows: some writers put that of the file behind a link there.
_BARE = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
_PAX_RECORD = re.compile(rb"([0-9]{1,7}) ([^=]+)=")
_FIELDS = (_PATH, _SIZE, _SPARSE) = (b"path", b"size", b"GNU.sparse.")  # no others are kept; the last is a prefix
_LARGEST_EXTENSION = 1 << 20  # bytes: a name and some attributes are a few kB
_TAR_NAME = re.compile(r"[^/.][^/]*\.tar", re.IGNORECASE)
_COMPRESSED_NAME = re.compile(r"[^/.][^/]*\.(tar\.(gz|bz2|xz|zst)|tgz|tbz2?|txz|tzst)", re.IGNORECASE)
_GZIP, _BZIP2, _XZ, _ZSTD = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"
_CHUNK = 1 << 20


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    """path in the tar, without a leading "./"; bytes that are not UTF-8 are surrogates"""
    offset: int
    """bytes, of the payload in the file that holds the tar"""
    size: int
    """bytes, of the payload"""


class _Area(NamedTuple):
    """Where in a file a tar lies."""

    file: BinaryIO
    """the file"""
    name: str
    """name of the tar, for messages"""
    start: int
    """offset in the file, bytes"""
    end: int
    """offset in the file, bytes"""

    def read(self, at: int, size: int) -> bytes:
        """Return `size` bytes from offset `at`. Raises UserError where the tar ends before the last of them."""
        data = b""
        if at + size <= self.end:
            self.file.seek(at)
            data = self.file.read(size)
        if len(data) < size:
            raise self.make_error(at, "cut off")
        return data

    def make_error(self, at: int, how: str) -> UserError:
        """Return the exception for damage at offset `at`."""
        return UserError(f"{self.name}: damaged at offset {at} ({how}). Download the archive again.")


def list_members(file: BinaryIO, name: str) -> Iterator[Member]:
    """Yield the regular files of an uncompressed tar, in its order. Folders, links and devices are skipped.

    `name` is the tar's, for messages. `file` may be moved between members. Memory does not grow with their number.
    Raises UserError where the tar is damaged, cut off or goes on behind its end, and for a sparse file.
    """
    return _walk(_Area(file, name, 0, file.seek(0, os.SEEK_END)))


def list_nested_members(file: BinaryIO, name: str) -> Iterator[Member]:
    """Yield what `list_members` does, but instead of a member ``PATH.tar`` its members, as ``PATH/…``.

    All offsets are those in `file`. Raises UserError for a compressed tar among the members as well.
    """
    for member in list_members(file, name):
        base = member.name.rpartition("/")[2]
        if _COMPRESSED_NAME.fullmatch(base):
            raise _make_compressed_error(name, member)
        if not _TAR_NAME.fullmatch(base):
            yield member
            continue
        inner = _Area(file, f"{name}, member {member.name!r}", member.offset, member.offset + member.size)
        if is_compressed(inner.read(inner.start, min(member.size, BLOCK))):
            raise _make_compressed_error(name, member)
        for file_in_inner in _walk(inner):
            yield file_in_inner._replace(name=f"{member.name[: -len('.tar')]}/{file_in_inner.name}")


def is_tar(head: bytes) -> bool:
    """Return whether a file that begins with `head`, 512 bytes or more, is an uncompressed tar."""
    try:
        tarfile.TarInfo.frombuf(head[:BLOCK], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def is_compressed(head: bytes) -> bool:
    """Return whether a file that begins with `head` is compressed with gzip, bzip2, xz or zstd."""
    return head.startswith((_GZIP, _BZIP2, _XZ, _ZSTD))


def decompress(source: BinaryIO, target: BinaryIO, name: str) -> None:
    """Write what is in a gzip, bzip2 or xz file to `target`, one MiB at a time.

    Raises UserError where the file, called `name` in the message, is damaged or compressed with zstd.
    """
    with _open_compressed(source, name) as plain:
        while chunk := _read_chunk(plain, name):
            target.write(chunk)


def _walk(area: _Area) -> Iterator[Member]:
    shared: dict[bytes, bytes] = {}  # PAX fields of all members that follow
    own: dict[bytes, bytes] = {}  # PAX fields of the next member
    expects_member = False
    at = area.start
    if at == area.end:
        raise area.make_error(at, "empty")
    while at < area.end and any(block := area.read(at, BLOCK)):
        header = _parse_header(area, at, block)
        expects_member = header.type in _EXTENSION_HEADERS and header.type != tarfile.XGLTYPE
        if header.type in _EXTENSION_HEADERS:
            size = header.size
            (shared if header.type == tarfile.XGLTYPE else own).update(_read_extension(area, at, header))
        else:
            fields, own = shared | own, {}
            name = fields[_PATH].decode("utf-8", "surrogateescape") if fields.get(_PATH) else header.name
            _refuse_sparse(area, name, header, fields)
            size = 0 if header.type in _BARE else _read_size(area, at, header, fields)
        following = at + BLOCK + size + -size % BLOCK
        if following > area.end:
            raise area.make_error(at, "cut off")
        if header.type in _FILES:
            yield Member(name.removeprefix("./"), at + BLOCK, size)
        elif header.type == tarfile.LNKTYPE:
            _refuse_hard_link(area, name)
        at = following
    if expects_member:
        raise area.make_error(at, "a member is missing")
    _refuse_more(area, at)


def _parse_header(area: _Area, at: int, block: bytes) -> tarfile.TarInfo:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise area.make_error(at, "no member's header") from error
    if header.size < 0:
        raise area.make_error(at, "a negative size")
    if block[257:265] == tarfile.GNU_MAGIC:  # which has times where USTAR has the prefix
        header.name = block[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
    return header


def _read_extension(area: _Area, at: int, header: tarfile.TarInfo) -> dict[bytes, bytes]:
    """Return the `_FIELDS` that a PAX or GNU header gives for a member that follows."""
    if header.size > _LARGEST_EXTENSION:
        raise area.make_error(at, f"a header of {header.size} bytes")
    data = area.read(at + BLOCK, header.size)
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return {_PATH: data.partition(b"\0")[0]}
    fields: dict[bytes, bytes] = {}
    start = 0 if header.type in _PAX else len(data)  # the target of a link is not needed
    while start < len(data):
        match = _PAX_RECORD.match(data, start)
        end = start + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise area.make_error(at, "no PAX header")
        field = _SPARSE if match[2].startswith(_SPARSE) else match[2]
        if field in _FIELDS:
            fields[field] = data[match.end() : end - 1]
        start = end
    return fields


def _read_size(area: _Area, at: int, header: tarfile.TarInfo, fields: dict[bytes, bytes]) -> int:
    text = fields.get(_SIZE, b"")
    if not text:
        return header.size
    if not re.fullmatch(rb"[0-9]{1,20}", text):
        raise area.make_error(at, "no size")
    return int(text)


def _refuse_sparse(area: _Area, name: str, header: tarfile.TarInfo, fields: dict[bytes, bytes]) -> None:
    """Raise UserError for a file that is stored without its holes, since it cannot be read as one piece."""
    if header.type == tarfile.GNUTYPE_SPARSE or _SPARSE in fields:
        raise UserError(f"{area.name}: {name!r} is stored as a sparse file. Make the tar again without --sparse.")


def _refuse_hard_link(area: _Area, name: str) -> None:
    """Raise UserError for an image that is a hard link."""
    if name.lower().endswith(IMAGE_EXTENSIONS):
        raise UserError(
            f"{area.name}: {name} is a hard link to another member, which cannot be read by itself. Make the tar again "
            "with --hard-dereference."
        )


def _refuse_more(area: _Area, at: int) -> None:
    """Raise UserError where anything but zeros follows the end.

    A header that was overwritten with zeros looks like the end, but the other members still follow.
    """
    for start in range(at, area.end, _CHUNK):
        if area.read(start, min(_CHUNK, area.end - start)).lstrip(b"\0"):
            raise area.make_error(at, "zeros, but more data follows; of tars joined by cat, give each by itself")


def _make_compressed_error(name: str, member: Member) -> UserError:
    return UserError(f"{name}: {member.name!r} is compressed. Unpack {name}, then give the folder of its tars as SRC.")


def _open_compressed(source: BinaryIO, name: str) -> gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile:
    source.seek(0)
    head = source.read(BLOCK)
    source.seek(0)
    if head.startswith(_GZIP):
        return gzip.GzipFile(fileobj=source)
    if head.startswith(_BZIP2):
        return bz2.BZ2File(source)
    if head.startswith(_XZ):
        return lzma.LZMAFile(source)
    raise UserError(f"{name} is not compressed with gzip, bzip2 or xz. Decompress it first (zstd: unzstd FILE).")


def _read_chunk(plain: gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile, name: str) -> bytes:
    """Return the next MiB."""
    try:
        return plain.read(_CHUNK)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the data
            raise
        raise UserError(f"{name}: damaged compressed data ({error}). Download the archive again.") from error
