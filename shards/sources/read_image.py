"""The bytes of one picture, wherever they lie: a file, a URL, a range of a tar, a member of a zip archive."""

from functools import partial

from shards.errors import UserError
from shards.layout import MAX_PICTURE_BYTES
from shards.sources import zips
from shards.sources.listing import STORED, WHOLE, Source
from shards.storage import files


def read(source: Source) -> bytes:
    """The bytes as listed.

    Raises UserError where they cannot be read or are not what was listed, and `zips.DamagedError` for a member that
    is damaged inside its zip archive.
    """
    if source.packed != STORED:
        if source.packed > MAX_PICTURE_BYTES:
            raise zips.DamagedError(f"larger than {MAX_PICTURE_BYTES} bytes in the zip")
        ranges = partial(files.read_range, source.path)
        return zips.payload(ranges, source.offset, source.packed, source.size, source.crc32)
    if source.offset == WHOLE:
        data = files.read_whole(source.path)
    else:
        data = files.read_range(source.path, source.offset, source.size)
    if len(data) != source.size:
        raise UserError(
            f"{source.path} changed while it was being packed; leave SRC alone and run the same command again"
        )
    return data
