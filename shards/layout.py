"""The format of a shard folder: names of files and samples, members of a tar, the record of a sample in the index.

A folder of shards holds ``NAME-000000.tar`` …, ``index.npy`` (one `RECORD` per sample, in the order of the shards),
``rejected.csv`` and ``duplicates.csv`` for people, and ``manifest.json``. The manifest is written last: a folder
without it is unfinished. Tars that ``make-shards index`` was run on keep the names that they have.
"""

import re
import tarfile
from pathlib import PurePosixPath

import numpy as np

FORMAT_VERSION = 2
INDEX_FILE = "index.npy"
MANIFEST_FILE = "manifest.json"
REJECTED_FILE = "rejected.csv"
DUPLICATES_FILE = "duplicates.csv"
PARTS_FOLDER = ".parts"  # exists while packing; a restart finds here what is done
PLAN_FILE = f"{PARTS_FOLDER}/plan.json"  # says which packing the folder belongs to
BLOCK = 512  # bytes; tar headers and payloads start on multiples of it
TAR_END = bytes(2 * BLOCK)
UNLABELED = -1
MAX_SHARDS = 1_000_000  # six digits in the file name
MAX_IMAGE_BYTES = 1 << 30  # one pread delivers it whole, and no photograph comes near
MAX_SIDE = 1_000_000  # pixels: libpng's limit, and about OpenCV's

RECORD = np.dtype(
    [
        ("shard", "<u4"),  # position in the manifest's list of shards
        ("offset", "<u8"),  # bytes, of the image's payload in the tar
        ("size", "<u4"),  # bytes
        ("height", "<u4"),  # pixels as stored: EXIF orientation is not applied
        ("width", "<u4"),  # pixels as stored
        ("label", "<i4"),  # position in the manifest's classes; -1: unlabeled
        ("crc32", "<u4"),  # zlib.crc32 of the payload
    ]
)


def make_shard_name(name: str, number: int) -> str:
    """Return the file name of a shard: ``train-000003.tar`` for name "train" and number 3."""
    return f"{name}-{number:06d}.tar"


def make_sample_key(number: int, path: str) -> str:
    """Return the tar key of the image at position `number` of the sorted sources.

    A key is ASCII, has no dots and at most 70 characters: readers of WebDataset cut a member's name at its first dot,
    and USTAR has 100 bytes for it.
    """
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", PurePosixPath(path).stem)
    return f"{number:09d}-{stem[:60]}"


def make_padding(size: int) -> bytes:
    """Return the zeros that follow a payload of `size` bytes in a tar."""
    return bytes(-size % BLOCK)


def count_member_bytes(size: int) -> int:
    """Return how many bytes a member with a payload of `size` bytes takes in a tar, with header and padding."""
    return BLOCK + size + -size % BLOCK


def make_tar_header(name: str, size: int) -> bytes:
    """Return a USTAR header, 512 bytes: mode 0644, owner 0, modification time 0.

    The time is an integer because anything else would need PAX headers.
    """
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
