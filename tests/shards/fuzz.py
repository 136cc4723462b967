"""Image files of every kind that shards hold, and damage to them: pure functions of a seed."""

import functools
import io
import struct
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

Damage = Callable[[np.random.Generator, bytes, bytes], bytes]  # draws, a file, another one → the damaged file

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_GRAY, _RGB, _RGBA = 0, 2, 6  # PNG's color types


def photo(width: int = 61, height: int = 45, seed: int = 0) -> Image.Image:
    """A smooth RGB image with some noise: it compresses as photographs do."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width][..., None] / 20
    waves = 128 + 90 * np.sin(rng.uniform(0.5, 4, 3) * x + rng.uniform(0.5, 4, 3) * y + rng.uniform(0, 6, 3))
    return Image.fromarray((waves + rng.normal(0, 8, waves.shape)).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    """The bytes of an image as Pillow writes it."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@functools.cache
def whole_files() -> dict[str, bytes]:
    """Undamaged files of up to 22 kB by what they are; all but the animated PNG file are kept."""
    image = photo()
    return {**_jpegs(image), **_pngs(image), **_webps(image)}


def _jpegs(image: Image.Image) -> dict[str, bytes]:
    rotated = Image.Exif()
    rotated[0x0112] = 6  # orientation
    return {
        "baseline.jpg": encode(image, "JPEG"),
        "progressive.jpg": encode(image, "JPEG", progressive=True),
        "gray.jpg": encode(image.convert("L"), "JPEG"),
        "cmyk.jpg": encode(image.convert("CMYK"), "JPEG"),
        "full chroma.jpg": encode(image, "JPEG", subsampling=0, quality=95),
        "restarts.jpg": encode(image, "JPEG", restart_marker_blocks=2),
        "exif.jpg": encode(image, "JPEG", exif=rotated, comment=b"as you like", dpi=(72, 72)),
        "two images.jpg": encode(image, "MPO", save_all=True, append_images=[photo(30, 20, seed=1)]),
        "tiny.jpg": encode(photo(3, 2), "JPEG"),
    }


def _pngs(image: Image.Image) -> dict[str, bytes]:
    levels = np.asarray(image)
    deep = levels.astype(np.uint16) * 257 + np.arange(levels.shape[1], dtype=np.uint16)[None, :, None]
    clear = image.copy()
    clear.putalpha(photo(seed=2).convert("L"))
    palette = image.quantize(64)
    return {
        "rgb.png": encode(image, "PNG"),
        "gray.png": encode(image.convert("L"), "PNG"),
        "gray16.png": encode(Image.fromarray(deep[..., 0]), "PNG"),
        "rgb16.png": png(deep),
        "palette.png": encode(palette, "PNG"),
        "clear palette.png": encode(palette, "PNG", transparency=bytes(range(64))),
        "clear color.png": encode(image, "PNG", transparency=(1, 2, 3)),
        "rgba.png": encode(clear, "PNG"),
        "rgba16.png": png(np.dstack([deep, deep[..., :1]])),
        "gray alpha.png": encode(clear.convert("LA"), "PNG"),
        "two levels.png": encode(image.convert("1"), "PNG"),
        "interlaced.png": png(levels, interlaced=True),
        "interlaced gray16.png": png(deep[..., :1], interlaced=True),
        "moving.png": encode(image, "PNG", save_all=True, append_images=[photo(seed=1)]),
        "tiny.png": encode(photo(3, 2), "PNG"),
    }


def _webps(image: Image.Image) -> dict[str, bytes]:
    clear = image.copy()
    clear.putalpha(photo(seed=2).convert("L"))
    return {
        "lossy.webp": encode(image, "WEBP"),
        "lossless.webp": encode(image, "WEBP", lossless=True),
        "lossy alpha.webp": encode(clear, "WEBP"),
        "lossless alpha.webp": encode(clear, "WEBP", lossless=True),
        "exif.webp": encode(image, "WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"),
        "moving.webp": encode(image, "WEBP", save_all=True, append_images=[photo(seed=1)]),
        "tiny.webp": encode(photo(3, 2), "WEBP"),
    }


def chunk(kind: bytes, body: bytes) -> bytes:
    """One chunk of a PNG file, its checksum right."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(levels: np.ndarray, interlaced: bool = False, before: bytes = b"", pieces: int = 3) -> bytes:
    """A PNG file of [H, W, channels] uint8 or uint16, which Pillow does not write in all forms that it reads.

    `before` is put before the pixels, which lie in about `pieces` chunks.
    """
    height, width, channels = levels.shape
    header = struct.pack(
        ">IIBBBBB", width, height, 8 * levels.itemsize, {1: _GRAY, 3: _RGB, 4: _RGBA}[channels], 0, 0, interlaced
    )
    steps = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    passes = [levels[top::down, left::right] for top, left, down, right in (steps if interlaced else [(0, 0, 1, 1)])]
    rows = [b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for each in passes if each.size for row in each]
    pixels = zlib.compress(b"".join(rows))
    size = len(pixels) // pieces + 1
    parts = [chunk(b"IDAT", pixels[start : start + size]) for start in range(0, len(pixels), size)]
    return b"".join([_PNG_MAGIC, chunk(b"IHDR", header), before, *parts, chunk(b"IEND", b"")])


def mutant(seed: int, files: Sequence[bytes]) -> bytes:
    """One of `files` with one to three damages; the same for the same seed and files."""
    rng = np.random.Generator(np.random.PCG64(seed))
    data = files[rng.integers(len(files))]
    for _ in range(rng.integers(1, 4)):
        data = DAMAGES[rng.integers(len(DAMAGES))](rng, data, files[rng.integers(len(files))])
    return repaired_png(data) if rng.integers(4) else data  # a wrong checksum hides all other damage


def _run(rng: np.random.Generator, data: bytes) -> slice:
    """Where a short piece of `data` lies: mostly a few bytes, at times most of it."""
    start = int(rng.integers(len(data) + 1))
    return slice(start, start + 1 + int(len(data) ** rng.random()))


def _flip_bits(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    levels = np.frombuffer(data, np.uint8).copy()
    if len(levels):
        for place in rng.integers(len(levels), size=rng.integers(1, 9)):
            levels[place] ^= 1 << int(rng.integers(8))
    return levels.tobytes()


def _cut_end(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    return data[: int(rng.integers(len(data) + 1))]


def _cut_few(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """Without the last few bytes: what a download that broke off at its very end looks like."""
    return data[: len(data) - int(rng.integers(1, 20))]


def _cut_out(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    piece = _run(rng, data)
    return data[: piece.start] + data[piece.stop :]


def _splice(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """A piece of the other file, over what was there or between it."""
    piece = other[_run(rng, other)]
    start = int(rng.integers(len(data) + 1))
    return data[:start] + piece + data[start + len(piece) * int(rng.integers(2)) :]


def _join(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """The head of one file with the tail of another."""
    return data[: int(rng.integers(len(data) + 1))] + other[int(rng.integers(len(other) + 1)) :]


def _zero(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    piece = _run(rng, data)
    return data[: piece.start] + bytes(len(data[piece])) + data[piece.stop :]


def _double(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    piece = _run(rng, data)
    return data[: piece.stop] + data[piece] + data[piece.stop :]


def _append(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    return data + other[_run(rng, other)]


def _edit_header(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """One byte of a header's field set to a telling value."""
    places = header_places(data)
    if not places:
        return data
    place = places[rng.integers(len(places))]
    value = int(rng.choice([0, 1, 2, 3, 4, 8, 16, 0x7F, 0x80, 0xFF, int(rng.integers(256))]))
    return data[:place] + bytes([value]) + data[place + 1 :]


def _rearrange(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """One segment or chunk left out, doubled, moved, or put in from the other file."""
    pieces, others = parts(data), parts(other)
    if len(pieces) < 2 or len(others) < 2:
        return data
    piece = pieces.pop(int(rng.integers(1, len(pieces))))
    for new in ([], [piece], [piece, piece], [others[int(rng.integers(1, len(others)))], piece])[rng.integers(4)]:
        pieces.insert(int(rng.integers(1, len(pieces) + 1)), new)
    return b"".join(pieces)


def _edit_rows(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """The rows of a PNG file damaged before they are deflated; other files as they are."""
    pieces = parts(data)
    pixels = [place for place, piece in enumerate(pieces) if piece[4:8] == b"IDAT"]
    try:
        rows = zlib.decompress(b"".join(pieces[place][8:-4] for place in pixels))
    except zlib.error:
        return data
    damage = (_flip_bits, _cut_end, _cut_few, _cut_out, _zero, _double)[rng.integers(6)]
    stream = zlib.compress(damage(rng, rows, other), int(rng.integers(10)))
    stream = stream[: len(stream) - int(rng.integers(6))] if rng.integers(4) == 0 else stream
    return b"".join([*pieces[: pixels[0]], chunk(b"IDAT", stream), *pieces[pixels[-1] + 1 :]])


DAMAGES: tuple[Damage, ...] = (
    *(_flip_bits, _cut_end, _cut_few, _cut_out, _splice, _join, _zero, _double, _append),
    *(_rearrange, _rearrange, _edit_rows, _edit_header, _edit_header, _edit_header),  # these get furthest
)


def header_places(data: bytes) -> list[int]:
    """Offsets of the bytes that say how to decode: the beginning of every segment or chunk."""
    places: list[int] = []
    start = 0
    for piece in parts(data):
        places += range(start, start + min(len(piece), 40))
        start += len(piece)
    return places


def parts(data: bytes) -> list[bytes]:
    """A file cut where its segments or chunks begin, as far as they can be followed; the first part is its magic."""
    if data.startswith(b"\xff\xd8"):
        return _parts(data, 2, lambda place: 2 + int.from_bytes(data[place + 2 : place + 4], "big"))
    if data.startswith(_PNG_MAGIC):
        return _parts(data, 8, lambda place: 12 + int.from_bytes(data[place : place + 4], "big"))
    if data.startswith(b"RIFF"):
        return _parts(data, 12, lambda place: 8 + (int.from_bytes(data[place + 4 : place + 8], "little") + 1) // 2 * 2)
    return [data]


def _parts(data: bytes, start: int, size: Callable[[int], int]) -> list[bytes]:
    cuts = [0, start]
    while cuts[-1] + 12 < len(data) and data[cuts[-1] : cuts[-1] + 2] != b"\xff\xda":
        cuts.append(cuts[-1] + size(cuts[-1]))
    return [data[start:end] for start, end in zip(cuts, [*cuts[1:], len(data)], strict=True) if start < len(data)]


def repaired_png(data: bytes) -> bytes:
    """The same with the checksums of its chunks made right, so that damage gets past them; other files as they are."""
    if not data.startswith(_PNG_MAGIC):
        return data
    magic, *chunks = parts(data)
    return magic + b"".join(chunk(piece[4:8], piece[8:-4]) if len(piece) >= 12 else piece for piece in chunks)
