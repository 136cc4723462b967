"""What a file is by its name: an image, an archive, or something else."""

import os

# Listed as well, to be converted, or rejected by name and reason: shards hold JPEG, PNG and WebP.
_OTHERS = (
    ".gif", ".bmp", ".tif", ".tiff", ".pbm", ".pgm", ".ppm", ".pnm",
    ".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".jpx",
)  # fmt: skip
IMAGES = frozenset((".jpg", ".jpeg", ".jfif", ".png", ".webp", *_OTHERS))
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip", ".parquet")


def is_image(name: str) -> bool:
    """Return whether a file is an image by its name."""
    return os.path.splitext(name)[1].lower() in IMAGES


def is_archive(name: str) -> bool:
    """Return whether a file is an archive of images by its name."""
    return name.lower().endswith(ARCHIVES)
