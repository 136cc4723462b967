"""Read zip archives by offsets: what lies in one, and the bytes of one file, without unpacking the others."""

import contextlib
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from shards.errors import UserError

_LOCAL_HEADER = struct.Struct("<4s4xH16xHH")  # signature, method, lengths of the name and of the extra field
_SIGNATURE = b"PK\3\4"
_ENCRYPTED, _UTF8 = 1, 1 << 11  # flags
_DEFLATE_RATIO = 1032  # at best
_UNIX = 3  # system that an entry was made on: its attributes are a mode
_WINDOWS = (0, 6, 10, 11, 14)  # and its forerunners: some of their writers leave backslashes


class DamagedError(Exception):
    """One file in the archive is damaged. The message is the reason, in one line."""


class Member(NamedTuple):
    """A regular file in a zip archive."""

    name: str
    """path in the archive, without a leading "./\""""
    offset: int
    """bytes, of the local header in the archive"""
    packed: int
    """bytes, of the payload in the archive"""
    size: int
    """bytes, unpacked"""
    crc: int
    """CRC-32 of the unpacked bytes"""


def list_members(file: BinaryIO, name: str) -> Iterator[Member]:
    """Yield the regular files of a zip archive, in the order of its central directory.

    Folders and links are skipped. `name` is the archive's, for messages. Raises UserError where the archive is damaged
    or not a zip archive, and for a file that is encrypted or compressed by another method than deflate.
    """
    end = file.seek(0, os.SEEK_END)
    entries = _read_directory(file, name)
    # No archive of folders is without a slash, unless its writer took the backslash for it, on whatever system.
    no_slashes = not any("/" in entry.filename for entry in entries)
    for entry in entries:
        path = _decode_name(entry, backslashes=no_slashes or entry.create_system in _WINDOWS)
        if path.endswith("/") or (entry.create_system == _UNIX and stat.S_ISLNK(entry.external_attr >> 16)):
            continue
        _refuse_unreadable(entry, name)
        if entry.header_offset < 0 or entry.header_offset + _LOCAL_HEADER.size + entry.compress_size > end:
            raise UserError(
                f"{name}: {entry.filename!r} lies beyond the end of the archive. Download the archive again."
            )
        yield Member(path, entry.header_offset, entry.compress_size, entry.file_size, entry.CRC)


def read_member(read: Callable[[int, int], bytes], offset: int, packed: int, size: int, crc: int) -> bytes:
    """Return the bytes of one `Member`, given ``read(offset, size)`` on its archive.

    Takes `packed` + `size` bytes of memory, whatever the data would unpack to. Raises DamagedError.
    """
    header = read(offset, _LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or not header.startswith(_SIGNATURE):
        raise DamagedError("damaged in the zip: no header where the directory says")
    _, method, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    data = read(offset + _LOCAL_HEADER.size + name_length + extra_length, packed)
    if len(data) < packed:
        raise DamagedError("damaged in the zip: cut off")
    if method == zipfile.ZIP_DEFLATED:
        data = _inflate(data, size)
    elif method != zipfile.ZIP_STORED:
        raise DamagedError("damaged in the zip: another method than the directory says")
    if len(data) != size:
        raise DamagedError("damaged in the zip: size differs")
    if zlib.crc32(data) != crc:
        raise DamagedError("damaged in the zip: crc differs")
    return data


def _read_directory(file: BinaryIO, name: str) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.infolist()
    # zipfile raises all of these on a damaged directory.
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, OverflowError) as error:
        raise UserError(
            f"{name} is not a zip archive, or is damaged or cut off ({error}). Download the archive again."
        ) from error


def _refuse_unreadable(entry: zipfile.ZipInfo, name: str) -> None:
    fix = f"Unpack {name} and give the folder as SRC."
    if entry.flag_bits & _ENCRYPTED:
        raise UserError(f"{name}: {entry.filename!r} is encrypted. {fix}")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"{name}: {entry.filename!r} is compressed by method {entry.compress_type}. {fix}")


def _decode_name(entry: zipfile.ZipInfo, *, backslashes: bool) -> str:
    """Return a path with slashes, also in place of `backslashes`.

    It is read as UTF-8 even where the flag is missing, as in archives made by macOS, and else as code page 437.
    """
    name = entry.filename
    if not entry.flag_bits & _UTF8:
        with contextlib.suppress(UnicodeDecodeError):
            name = name.encode("cp437").decode("utf-8")
    if backslashes:
        name = name.replace("\\", "/")
    return name.removeprefix("./")


def _inflate(data: bytes, size: int) -> bytes:
    """Return what should unpack to `size` bytes; at most one byte more."""
    if size > _DEFLATE_RATIO * len(data):
        raise DamagedError("damaged in the zip: size differs")
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    except zlib.error as error:
        raise DamagedError(f"damaged in the zip: {error}") from error
