"""Small archives in memory, and images that take long."""

import io
import tarfile
import zipfile
from pathlib import Path

from PIL import Image


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    """A tar of these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def zip_of(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip archive of these files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def make_slow_images(root: Path, count: int, side: int) -> Path:
    """Class folders with images of few bytes, `side` pixels wide and more high, that take a while to decode."""
    for number in range(count):
        folder = root / f"class{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (side, side + number), (number, 2, 3))
        image.save(folder / f"{number}.webp", lossless=True, method=0, quality=0)
    return root
