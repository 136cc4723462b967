"""Read the bytes of one image wherever they are: in a file, at a URL, in a tar, in a zip archive."""

from functools import partial

from shards.errors import UserError
from shards.layout import MAX_IMAGE_BYTES
from shards.sources import zips
from shards.sources.listing import NOT_COMPRESSED, WHOLE_FILE, ImageSource
from shards.storage import files


def read_image(source: ImageSource) -> bytes:
    """Return the bytes of a listed image.

    Raises UserError where they cannot be read or are not what was listed. Raises `zips.DamagedError` for a member that
    is damaged inside its zip archive.
    """
    if source.packed != NOT_COMPRESSED:
        if source.packed > MAX_IMAGE_BYTES:
            raise zips.DamagedError(f"larger than {MAX_IMAGE_BYTES} bytes in the zip")
        read = partial(files.read_range, source.path)
        return zips.read_member(read, source.offset, source.packed, source.size, source.crc32)
    if source.offset == WHOLE_FILE:
        data = files.read_whole(source.path)
    else:
        data = files.read_range(source.path, source.offset, source.size)
    if len(data) != source.size:
        raise UserError(f"{source.path} changed while it was being packed. Leave SRC alone and run the command again.")
    return data
