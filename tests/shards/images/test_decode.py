"""What is kept as an image, and the reasons for the rest."""

import io
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from shards.images.decode import MAX_PIXELS, decode, read_info
from shards.images.image_info import ImageInfo, UndecodableError
from shards.layout import MAX_IMAGE_BYTES
from tests.shards import dali
from tests.shards.fuzz import chunk, encode, parts, photo, png, whole_files

FILES = whole_files()
JPEG, PROGRESSIVE = FILES["baseline.jpg"], FILES["progressive.jpg"]
PNG, PALETTE, TINY_PNG = FILES["rgb.png"], FILES["palette.png"], FILES["tiny.png"]
END = chunk(b"IEND", b"")
JUDGES = pytest.mark.parametrize("judge", [decode, read_info])
LEVELS = np.asarray(photo(10, 8))
ROWS = b"".join(b"\0" + row.tobytes() for row in LEVELS)


def reason(data: bytes, judge: Callable[..., ImageInfo] = decode, **options: int) -> str:
    with pytest.raises(UndecodableError) as caught:
        judge(data, **options)
    return str(caught.value)


def with_segment(marker: int, body: bytes, size: int | None = None) -> bytes:
    """A JPEG file with one more segment, right after its first bytes."""
    return JPEG[:2] + struct.pack(">BBH", 0xFF, marker, size or len(body) + 2) + body + JPEG[2:]


def with_last_scan_again(times: int) -> bytes:
    last_tables = PROGRESSIVE.rfind(b"\xff\xc4")
    return PROGRESSIVE[:-2] + PROGRESSIVE[last_tables:-2] * times + PROGRESSIVE[-2:]


def with_pixels(stream: bytes) -> bytes:
    """A PNG file of 10 × 8 pixels with this deflated stream."""
    magic, header, *_ = parts(png(LEVELS))
    return magic + header + chunk(b"IDAT", stream) + END


def without(kind: bytes, data: bytes) -> bytes:
    return b"".join(piece for piece in parts(data) if piece[4:8] != kind)


def doubled(kind: bytes, data: bytes) -> bytes:
    return b"".join(piece * 2 if piece[4:8] == kind else piece for piece in parts(data))


def unannounced_transparency(**options: bytes) -> bytes:
    """A WebP file without the flag for transparency that it has; and what it has is damaged."""
    clear = photo()
    clear.putalpha(photo(seed=2).convert("L"))
    webp = encode(clear, "WEBP", **options)
    flags, levels = webp[20] & ~0x10, webp.index(b"ALPH") + 10
    return webp[:20] + bytes([flags]) + webp[21:levels] + b"\xff" * 16 + webp[levels + 16 :]


def cut_exif_behind_the_end() -> bytes:
    """A WebP file whose EXIF data, which a flag announces, begin after its end."""
    webp = FILES["exif.webp"]
    end = webp.index(b"EXIF")
    return webp[:4] + struct.pack("<I", end - 8) + webp[8:end] + b"EXIF\xff\0\0\0abcd"


def with_ihdr(**fields: int) -> bytes:
    """A PNG file with other fields in its header, checksum right."""
    values = {"width": 10, "height": 8, "bits": 8, "color": 2, "compression": 0, "filters": 0, "interlaced": 0}
    magic, _, *rest = parts(png(LEVELS, interlaced=bool(fields.get("interlaced"))))
    return b"".join([magic, chunk(b"IHDR", struct.pack(">IIBBBBB", *(values | fields).values())), *rest])


def broken_after_the_last_row() -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, 15, 9, zlib.Z_FIXED)
    return (stream.compress(ROWS + b"abcdefgh" * 50) + stream.flush())[:-10] + bytes(40)


def claiming(extension: str, width: int, height: int) -> bytes:
    """A small file whose header claims another size."""
    if extension == "jpg":
        frame = JPEG.index(b"\xff\xc0")
        return JPEG[: frame + 5] + struct.pack(">HH", height, width) + JPEG[frame + 9 :]
    if extension == "png":
        return with_ihdr(width=width, height=height)
    webp = FILES["exif.webp"]
    return webp[:24] + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little") + webp[30:]


@JUDGES
@pytest.mark.parametrize("name", [name for name in FILES if name != "moving.png"])
def test_a_whole_file_has_the_extension_of_its_bytes_and_the_size_of_its_first_image(judge, name: str):
    size = (2, 3) if name.startswith("tiny") else (45, 61)
    assert judge(FILES[name])[:3] == (name.rpartition(".")[2], *size)


@JUDGES
@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_a_decompression_bomb_is_refused_by_its_header_with_the_numbers(judge, extension: str):
    bomb = claiming(extension, 16_000, 12_000)
    began = time.monotonic()
    found = reason(bomb, judge)
    assert time.monotonic() - began < 0.5
    assert found == (f"16000 x 12000 pixels, 192000000 in total, more than the {MAX_PIXELS} of --max-pixels")


@JUDGES
@pytest.mark.parametrize("name", ["baseline.jpg", "rgb.png", "lossy.webp", "moving.webp"])
def test_the_limit_of_pixels_is_what_is_still_kept(judge, name: str):
    assert judge(FILES[name], max_pixels=61 * 45).width == 61
    assert "more than the 2744 of --max-pixels" in reason(FILES[name], judge, max_pixels=61 * 45 - 1)


@pytest.mark.parametrize("name", ["baseline.jpg", "rgb.png", "lossy.webp"])
def test_pillows_own_limit_does_not_count_and_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode(FILES[name]).width == 61
    assert Image.MAX_IMAGE_PIXELS == 100
    reason(FILES[name][:-50])
    assert Image.MAX_IMAGE_PIXELS == 100


def test_pillows_limit_is_left_as_it_was_by_many_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    failures = []

    def work() -> None:
        for _ in range(100):
            try:
                decode(TINY_PNG), decode(FILES["lossy.webp"])
            except UndecodableError as error:
                failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert not failures
    assert Image.MAX_IMAGE_PIXELS == 100


@JUDGES
def test_sides_that_dali_does_not_decode_are_refused(judge):
    for extension in ("png", "webp"):
        found = reason(claiming(extension, 1_000_001, 2), judge)
        assert found == "1000001 x 2 pixels; each side must be 1 to 1000000"
    for extension in ("jpg", "png"):
        assert "0 x 5 pixels" in reason(claiming(extension, 0, 5), judge)
    widest = encode(Image.new("L", (1_000_000, 1)), "PNG")
    assert judge(widest) == ImageInfo("png", 1, 1_000_000)


# What Pillow decodes and DALI refuses, with the reason given for it here.
FORGIVEN = {
    "bytes between segments": (JPEG[:20] + b"ab" + JPEG[20:], "no marker at byte 20"),
    "restart marker in the header": (JPEG[:2] + b"\xff\xd0" + JPEG[2:], "marker FFD0"),
    "segment without a length": (with_segment(0xE5, b"", 1), "marker FFE5 of 1 bytes"),
    "EXIF data longer than their segment": (with_segment(0xE1, b"Exif\0\0II*\0", 7), "no marker at byte 11"),
    "no end": (PNG[:-12], "the file ends too early"),
    "wrong checksum of pixels": (PNG[:-13] + b"~" + PNG[-12:], "wrong checksum of the chunk"),
    "rows missing": (with_pixels(zlib.compress(ROWS[: 31 * 4])), "do not end with its last row"),
    "pixels without an end": (with_pixels(zlib.compress(ROWS)[:-4]), "do not end with its last row"),
    "no palette": (without(b"PLTE", PALETTE), "two palettes, or none"),
    "two palettes": (doubled(b"PLTE", PALETTE), "two palettes, or none"),
    "palette after the pixels": (without(b"IEND", without(b"PLTE", PALETTE)) + parts(PALETTE)[2] + END, "none before"),
    "empty palette": (PALETTE.replace(parts(PALETTE)[2], chunk(b"PLTE", b"")), "chunk of a wrong length"),
    "background of three bytes": (png(LEVELS, before=chunk(b"bKGD", b"abc")), "chunk of a wrong length"),
    "unknown critical chunk": (png(LEVELS, before=chunk(b"ABCD", b"")), "unknown chunk"),
    "chunk of an odd name": (png(LEVELS, before=chunk(b"ab1D", b"")), "unknown chunk"),
    "chunk of a reserved name": (png(LEVELS, before=chunk(b"abcd", b"")), "unknown chunk"),
    "large private chunk": (png(LEVELS, before=chunk(b"abCd", bytes(8_000_000))), "8000000 bytes that are not pixels"),
    "side beyond libpng's limit": (encode(Image.new("L", (1_000_001, 1)), "PNG"), "1000001 x 1 pixels"),
    "unknown compression": (with_ihdr(compression=1), "unknown compression or interlacing"),
    "unknown interlacing": (with_ihdr(interlaced=2), "unknown compression or interlacing"),
    "transparency without its flag": (unannounced_transparency(), "transparency that it does not announce"),
    "the same after an odd length": (unannounced_transparency(icc_profile=b"odd"), "that it does not announce"),
    "EXIF data behind the end": (cut_exif_behind_the_end(), "EXIF data are missing"),
    "EXIF after an odd length": (encode(photo(), "WEBP", exif=b"Exif\0\0II*\0", icc_profile=b"odd"), "odd length"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGIVEN)
def test_what_pillow_forgives_and_dali_does_not_is_refused(name: str):
    data, expected = FORGIVEN[name]
    with Image.open(io.BytesIO(data)) as image:
        image.load()
    assert expected in reason(data)


def test_dali_refuses_what_pillow_forgives():
    """Else a rule has had its day."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    answers = dali.ask([data for data, _ in FORGIVEN.values()])
    assert not [name for name, answer in zip(FORGIVEN, answers, strict=True) if isinstance(answer, tuple)]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty file"),
        (JPEG[:100], "the file ends too early"),
        (JPEG[:-100], "image file is truncated"),
        (JPEG[:-2], "image file is truncated"),
        (PNG[:-100], "the file ends too early"),
        (FILES["lossy.webp"][:-100], "could not create decoder object"),
        (JPEG.replace(b"\xff\xc0", b"\xff\xc9"), "lossless, hierarchical or arithmetic-coded JPEG (marker FFC9)"),
        (JPEG.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "JPEG of 3 components of 12 bits"),
        (with_segment(0xC0, b"\x08\0\x05\0\x05\x01\x01\x11\0"), "2 frames before the first scan"),
        (JPEG.replace(b"\xff\xc0", b"\xff\xe5"), "0 frames before the first scan"),
        (with_last_scan_again(260), "JPEG of more than 256 scans"),
        (FILES["moving.png"], "animated PNG"),
        (png(LEVELS, before=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 24)))), "inflates to more than Pillow"),
        (png(LEVELS, before=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 24)))), "inflates to more than Pillow"),
        (with_pixels(zlib.compress(ROWS + bytes(1 << 20))), "do not end with its last row"),
        (with_pixels(zlib.compress(ROWS[:-3])), "truncated"),
        (with_pixels(broken_after_the_last_row()), "do not end with its last row"),
        (without(b"IDAT", PNG), "no pixels"),
        (with_ihdr(bits=3), "3 bits in color type 2"),
        (b"RIFF\x10\0\0\0WEBPVP8 \x04\0\0\0abcd", "WebP file of less than 32 bytes"),
        (encode(photo(), "GIF"), "GIF image; shards hold JPEG, PNG and WebP. Pack with --convert"),
        (encode(photo(), "BMP"), "BMP image; shards hold JPEG, PNG and WebP. Pack with --convert"),
        (encode(photo(), "TIFF"), "TIFF image; shards hold JPEG, PNG and WebP. Pack with --convert"),
        (
            encode(photo(), "JPEG2000"),
            "JPEG 2000 image; shards hold JPEG, PNG and WebP. Pack with --convert",
        ),
        (
            b"\0\0\0\x20ftypheic" + bytes(40),
            "HEIF image; shards hold JPEG, PNG and WebP. Pack with --convert",
        ),
        (b"<html>", "not a JPEG, PNG or WebP image"),
    ],
)
def test_a_refused_file_has_a_reason_in_one_line(data: bytes, expected: str):
    found = reason(data)
    assert expected in found
    assert found.isprintable()


def test_a_damaged_png_header_is_refused_even_where_pixels_are_not_looked_at():
    wide = bytearray(PNG)
    wide[19] ^= 1
    assert reason(bytes(wide), read_info) == "damaged PNG header"


def test_a_file_too_large_for_one_read_is_refused_unread(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shards.images.decode.MAX_IMAGE_BYTES", len(JPEG) - 1)
    assert reason(JPEG) == f"larger than {len(JPEG) - 1} bytes"
    assert MAX_IMAGE_BYTES == 1 << 30


@pytest.mark.parametrize(
    "data",
    [
        JPEG[:2] + b"\xff\xff\xff" + JPEG[2:],
        with_segment(0xE1, b"Exif\0\0II*\0 nonsense"),
        with_last_scan_again(200),
        JPEG + bytes(1000) + JPEG,
        PROGRESSIVE + b"\xff\xda" * 1000,
        png(LEVELS, before=chunk(b"tEXt", b"Comment\0any") * 2000),
        png(np.random.default_rng(0).integers(0, 256, (1600, 1700, 3), np.uint8), pieces=1),
        PNG + b"more",
        with_pixels(zlib.compress(ROWS) + b"more"),
        FILES["lossy.webp"] + b"more",
        FILES["lossy.webp"][:27] + bytes([FILES["lossy.webp"][27] | 0x40]) + FILES["lossy.webp"][28:],  # a scale
    ],
    ids=lambda data: f"{len(data)} bytes",
)
def test_odd_but_decodable_files_are_kept(data: bytes):
    assert decode(data).height > 0
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    assert dali.ask([data]) == [(decode(data).height, decode(data).width)]


@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    channels=st.sampled_from([1, 3, 4]),
    deep=st.booleans(),
    interlaced=st.booleans(),
    pieces=st.integers(1, 5),
)
def test_png_files_of_every_small_size_and_kind_are_kept(
    height: int, width: int, channels: int, deep: bool, interlaced: bool, pieces: int
):
    levels = np.full((height, width, channels), 200, np.uint16 if deep else np.uint8)
    assert decode(png(levels, interlaced, pieces=pieces))[:3] == ("png", height, width)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_png_files_of_few_bits_are_kept(bits: int):
    for width in range(1, 18):
        image = Image.new("P", (width, 3))
        image.putpalette(bytes(3 << bits))
        data = encode(image, "PNG")
        assert data[24] == bits
        assert decode(data) == ImageInfo("png", 3, width)


def test_pixels_are_inflated_no_further_than_the_image_reaches(monkeypatch: pytest.MonkeyPatch):
    inflated = []

    class Counting:
        def __init__(self) -> None:
            self._stream = zlib.decompressobj()
            self.eof = False

        def decompress(self, piece: memoryview) -> bytes:
            inflated.append(len(self._stream.decompress(piece)))
            return bytes(inflated[-1])

    monkeypatch.setattr(
        "shards.images.png.zlib", SimpleNamespace(decompressobj=Counting, crc32=zlib.crc32, error=zlib.error)
    )
    assert "do not end with its last row" in reason(with_pixels(zlib.compress(ROWS + bytes(64 << 20))))
    assert sum(inflated) < 20 << 20


def test_damage_that_libjpeg_papers_over_is_kept_and_what_ends_too_early_is_not():
    whole = encode(photo(300, 200), "JPEG")
    middle = len(whole) // 2
    smeared = whole[:middle] + bytes(100) + whole[middle + 100 :]
    ended = whole[:middle] + b"\xff\xd9"
    assert decode(smeared) == decode(ended) == decode(whole) == ImageInfo("jpg", 200, 300)
    assert "truncated" in reason(whole[:middle])


def test_want_of_memory_is_not_the_files_fault(monkeypatch: pytest.MonkeyPatch):
    def load(self: ImageFile.ImageFile) -> None:
        raise OSError("out of memory when reading image file")  # what Pillow says for its code -9

    assert Image.core.getcodecstatus(-9) == "out of memory"
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(MemoryError):
        decode(JPEG)
