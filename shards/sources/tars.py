"""What lies in a tar and at which offset, without unpacking: files, tars in a tar, the samples of WebDataset."""

import bz2
import gzip
import json
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

from shards.errors import UserError
from shards.layout import BLOCK

_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_EXTENSIONS = (*_PAX, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
# Whatever size such a header gives, no payload follows: some writers put that of the file behind a link there.
_BARE = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
_PAX_RECORD = re.compile(rb"([0-9]{1,7}) ([^=]+)=")
_FIELDS = (_PATH, _SIZE, _SPARSE) = (b"path", b"size", b"GNU.sparse.")  # no others are kept; the last is a prefix
_LARGEST_EXTENSION = 1 << 20  # bytes: a name and some attributes are a few kB
_TAR_NAME = re.compile(r"[^/.][^/]*\.tar", re.IGNORECASE)
_COMPRESSED_NAME = re.compile(r"[^/.][^/]*\.(tar\.(gz|bz2|xz|zst)|tgz|tbz2?|txz|tzst)", re.IGNORECASE)
_GZIP, _BZIP2, _XZ, _ZSTD = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"
_CHUNK = 1 << 20

_PICTURES = ("jpg", "jpeg", "png", "webp")
_LABELS = ("cls", "json")
_LABEL_KEYS = ("label", "cls", "class", "class_id", "label_name", "class_name")


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str  # path in the tar, without a leading "./"; bytes that are no UTF-8 are surrogates
    offset: int  # bytes, of the payload in the file that holds the tar
    size: int  # bytes, of the payload


class Sample(NamedTuple):
    """Members that WebDataset takes together."""

    key: str  # path of the members up to the first dot of the base name
    picture: Member | None
    label: Member | None


class _Area(NamedTuple):
    """Where in a file a tar lies."""

    file: BinaryIO
    name: str  # for messages
    start: int
    end: int

    def read(self, at: int, size: int) -> bytes:
        """The bytes from offset `at`. Raises UserError where the tar ends before the last of them."""
        data = b""
        if at + size <= self.end:
            self.file.seek(at)
            data = self.file.read(size)
        if len(data) < size:
            raise self.damaged(at, "cut off")
        return data

    def damaged(self, at: int, how: str) -> UserError:
        return UserError(f"{self.name}: damaged at offset {at}: {how}; get the archive anew")


def members(file: BinaryIO, name: str) -> Iterator[Member]:
    """The regular files of an uncompressed tar, in its order. Folders, links and devices are passed over.

    `name` is the tar's, for messages. `file` may be moved between members. Memory does not grow with their number.
    Raises UserError where the tar is damaged, cut off or goes on behind its end, and for a sparse file.
    """
    return _walk(_Area(file, name, 0, file.seek(0, os.SEEK_END)))


def nested(file: BinaryIO, name: str) -> Iterator[Member]:
    """As `members`, but for a member called ``PATH.tar`` its members, as ``PATH/…``; offsets are those of `file`.

    Raises UserError for a compressed tar among the members as well.
    """
    for member in members(file, name):
        base = member.name.rpartition("/")[2]
        if _COMPRESSED_NAME.fullmatch(base):
            raise _compressed_member(name, member)
        if not _TAR_NAME.fullmatch(base):
            yield member
            continue
        inner = _Area(file, f"{name}: {member.name!r}", member.offset, member.offset + member.size)
        if is_compressed(inner.read(inner.start, min(member.size, BLOCK))):
            raise _compressed_member(name, member)
        for file_in_inner in _walk(inner):
            yield file_in_inner._replace(name=f"{member.name[: -len('.tar')]}/{file_in_inner.name}")


def samples(members: Iterable[Member]) -> Iterator[Sample]:
    """Consecutive members of one key as a sample, those without a picture included.

    The extension is what follows the first dot of the base name, in any case. Pictures are jpg, else jpeg, png, webp;
    labels are cls, else json. An extension that comes twice begins another sample. Passed over: names without a dot,
    hidden ones, and ``__NAME__``.
    """
    key: str | None = None
    held: dict[str, Member] = {}
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not stem or not dot or (base.startswith("__") and base.endswith("__")):
            continue
        own, extension = folder + slash + stem, extension.lower()
        if key is not None and (own != key or extension in held):
            yield _sample(key, held)
            held.clear()
        key = own
        if extension in _PICTURES or extension in _LABELS:
            held[extension] = member
    if key is not None:
        yield _sample(key, held)


def label_text(extension: str, data: bytes) -> str | None:
    """The label in a "cls" member (its text) or a "json" member; None where there is none.

    In JSON it is the first of the keys label, cls, class, class_id, label_name and class_name that is there and not
    null: a whole number or text. Raises ValueError for what is no UTF-8, no JSON, or another kind of label.
    """
    text = data.decode("utf-8-sig")
    if extension == "cls":
        return text.strip() or None
    try:
        fields = json.loads(text)
    except RecursionError:
        raise ValueError("JSON too deep") from None
    values = (fields.get(key) for key in _LABEL_KEYS) if isinstance(fields, dict) else ()
    value = next((value for value in values if value is not None), "")
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("the label in the JSON is neither a whole number nor text")
    return str(value).strip() or None


def is_tar(head: bytes) -> bool:
    """Whether a file that begins with `head`, 512 bytes or more, is an uncompressed tar."""
    try:
        tarfile.TarInfo.frombuf(head[:BLOCK], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def label_of(file: BinaryIO, sample: Sample) -> str | None:
    """The label's text of a sample, read from its tar; None where it has none. Raises ValueError as `label_text`."""
    if sample.label is None:
        return None
    file.seek(sample.label.offset)
    return label_text(sample.label.name.rpartition(".")[2].lower(), file.read(sample.label.size))


def is_compressed(head: bytes) -> bool:
    """Whether a file that begins with `head` is compressed with gzip, bzip2, xz or zstd."""
    return head.startswith((_GZIP, _BZIP2, _XZ, _ZSTD))


def decompress(source: BinaryIO, target: BinaryIO, name: str) -> None:
    """Write what is in a gzip, bzip2 or xz file to `target`, a MiB at a time.

    Raises UserError where the file, called `name` in the message, is damaged or compressed with zstd.
    """
    with _opened(source, name) as plain:
        while chunk := _decompressed(plain, name):
            target.write(chunk)


def _walk(area: _Area) -> Iterator[Member]:
    shared: dict[bytes, bytes] = {}  # what PAX says of all members that follow
    own: dict[bytes, bytes] = {}  # and of the next one
    awaited = False  # whether there must be a next one
    at = area.start
    if at == area.end:
        raise area.damaged(at, "empty")
    while at < area.end and any(block := area.read(at, BLOCK)):
        header = _header(area, at, block)
        awaited = header.type in _EXTENSIONS and header.type != tarfile.XGLTYPE
        if header.type in _EXTENSIONS:
            size = header.size
            fields = _extension(area, at, header)
            (shared if header.type == tarfile.XGLTYPE else own).update(fields)
        else:
            fields, own = shared | own, {}
            name = fields[_PATH].decode("utf-8", "surrogateescape") if fields.get(_PATH) else header.name
            _refuse_sparse(area, name, header, fields)
            size = 0 if header.type in _BARE else _size(area, at, header, fields)
        following = at + BLOCK + size + -size % BLOCK
        if following > area.end:
            raise area.damaged(at, "cut off")
        if header.type in _FILES:
            yield Member(name.removeprefix("./"), at + BLOCK, size)
        elif header.type == tarfile.LNKTYPE and name.lower().endswith(_PICTURES):
            raise UserError(
                f"{area.name}: {name} is a hard link to another member, which cannot be read by itself; make the tar "
                "anew with --hard-dereference"
            )
        at = following
    if awaited:
        raise area.damaged(at, "a member is missing")
    _refuse_more(area, at)


def _header(area: _Area, at: int, block: bytes) -> tarfile.TarInfo:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise area.damaged(at, "no member's header") from error
    if header.size < 0:
        raise area.damaged(at, "a negative size")
    if block[257:265] == tarfile.GNU_MAGIC:  # which has times where USTAR has the prefix
        header.name = block[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
    return header


def _extension(area: _Area, at: int, header: tarfile.TarInfo) -> dict[bytes, bytes]:
    """What a PAX or GNU header says of a member that follows: `_FIELDS`."""
    if header.size > _LARGEST_EXTENSION:
        raise area.damaged(at, f"a header of {header.size} bytes")
    data = area.read(at + BLOCK, header.size)
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return {_PATH: data.partition(b"\0")[0]}
    fields: dict[bytes, bytes] = {}
    start = 0 if header.type in _PAX else len(data)  # of a link, nobody wants to know where it leads
    while start < len(data):
        match = _PAX_RECORD.match(data, start)
        end = start + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise area.damaged(at, "no PAX header")
        field = _SPARSE if match[2].startswith(_SPARSE) else match[2]
        if field in _FIELDS:
            fields[field] = data[match.end() : end - 1]
        start = end
    return fields


def _size(area: _Area, at: int, header: tarfile.TarInfo, fields: dict[bytes, bytes]) -> int:
    text = fields.get(_SIZE, b"")
    if not text:
        return header.size
    if not re.fullmatch(rb"[0-9]{1,20}", text):
        raise area.damaged(at, "no size")
    return int(text)


def _refuse_sparse(area: _Area, name: str, header: tarfile.TarInfo, fields: dict[bytes, bytes]) -> None:
    """What is stored without its holes cannot be read as one piece."""
    if header.type == tarfile.GNUTYPE_SPARSE or _SPARSE in fields:
        raise UserError(f"{area.name}: {name!r} is stored as a sparse file; make the tar anew without --sparse")


def _refuse_more(area: _Area, at: int) -> None:
    """A header that was overwritten with zeros looks like the end, but the other members still follow."""
    for start in range(at, area.end, _CHUNK):
        if area.read(start, min(_CHUNK, area.end - start)).lstrip(b"\0"):
            raise area.damaged(at, "zeros, but more follows (of tars joined by cat, give each by itself)")


def _compressed_member(name: str, member: Member) -> UserError:
    return UserError(f"{name}: {member.name!r} is compressed; unpack {name}, then give the folder of its tars as SRC")


def _sample(key: str, held: dict[str, Member]) -> Sample:
    picture, label = (
        next((held[extension] for extension in wanted if extension in held), None) for wanted in (_PICTURES, _LABELS)
    )
    return Sample(key, picture, label)


def _opened(source: BinaryIO, name: str) -> gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile:
    source.seek(0)
    head = source.read(BLOCK)
    source.seek(0)
    if head.startswith(_GZIP):
        return gzip.GzipFile(fileobj=source)
    if head.startswith(_BZIP2):
        return bz2.BZ2File(source)
    if head.startswith(_XZ):
        return lzma.LZMAFile(source)
    raise UserError(f"{name} is not compressed with gzip, bzip2 or xz; decompress it first (zstd: unzstd FILE)")


def _decompressed(plain: gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile, name: str) -> bytes:
    """The next MiB."""
    try:
        return plain.read(_CHUNK)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the data's
            raise
        raise UserError(f"{name}: damaged compressed data ({error}); get the archive anew") from error
