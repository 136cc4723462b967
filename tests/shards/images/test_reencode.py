"""Large images re-encoded smaller."""

import contextlib
import io
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from pipelines.decode_torch import decode as decode_for_training
from shards.images.decode import decode, read_info
from shards.images.exif import make_exif
from shards.images.image_info import ImageInfo, UndecodableError
from shards.images.reencode import Changes, change_image
from tests.shards.fuzz import encode, photo, png, whole_files

FILES = {name: data for name, data in whole_files().items() if name not in ("moving.png", "tiny.jpg")}
KINDS = sorted(name for name in FILES if not name.startswith("tiny"))
GRAY = {"gray.jpg", "gray.png", "gray16.png", "gray alpha.png", "two levels.png", "interlaced gray16.png"}


def shrunk(data: bytes, short_side: int, quality: int = 90) -> bytes:
    return change_image(data, read_info(data), Changes(short_side, quality))[0]


def markers(data: bytes) -> list[int]:
    """Of the segments of a JPEG file up to its first scan."""
    found, place = [], 2
    while 0xDA not in found:
        found.append(data[place + 1])
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return found


@given(width=st.integers(1, 300), height=st.integers(1, 300), short_side=st.integers(1, 120))
def test_the_shorter_side_becomes_n_and_the_longer_follows_rounded(width: int, height: int, short_side: int):
    data = encode(Image.new("L", (width, height)), "PNG")
    found = shrunk(data, short_side)
    if min(width, height) <= short_side:
        assert found is data
        return
    small = decode(found)
    longer = max(width, height) * short_side / min(width, height)
    assert small.extension == "jpg"
    assert min(small[1:3]) == short_side
    assert max(small[1:3]) == math.floor(longer + 0.5)
    assert (small.width - small.height) * (width - height) >= 0, "turned"


@pytest.mark.parametrize("name", KINDS)
def test_levels_are_those_of_training_smaller_and_gray_stays_gray(name: str):
    data = FILES[name]
    with pytest.warns(UserWarning, match="Palette") if name == "clear palette.png" else contextlib.nullcontext():
        levels = decode_for_training(data).permute(1, 2, 0).numpy()
    image = Image.fromarray(levels[..., 0] if name in GRAY else levels).resize((27, 20), Image.Resampling.LANCZOS)
    exif = make_exif(read_info(data).orientation)
    assert shrunk(data, 20, quality=70) == encode(image, "JPEG", quality=70, subsampling=2, exif=exif)


@pytest.mark.parametrize("name", ["baseline.jpg", "progressive.jpg", "cmyk.jpg", "rgba.png", "lossless.webp"])
def test_the_result_is_baseline_420_of_the_asked_quality(name: str):
    data = shrunk(FILES[name], 30, quality=77)
    assert 0xC0 in markers(data)
    with Image.open(io.BytesIO(data)) as image, Image.open(io.BytesIO(encode(photo(), "JPEG", quality=77))) as like:
        assert [layer[1:3] for layer in image.layer] == [(2, 2), (1, 1), (1, 1)]
        assert image.quantization == like.quantization


def test_exif_profile_and_comment_stay_behind():
    exif = Image.Exif()
    exif[0x010E] = "a description"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encode(photo(), "JPEG", exif=exif, icc_profile=profile, comment=b"as you like", dpi=(300, 300))
    assert {0xE1, 0xE2, 0xFE} <= set(markers(data))
    found = shrunk(data, 20)
    assert set(markers(found)) == {0xE0, 0xDB, 0xC0, 0xC4, 0xDA}
    assert found == shrunk(encode(Image.open(io.BytesIO(data)), "PNG"), 20), "what stays behind changes the result"
    assert decode(found) == ImageInfo("jpg", 20, 27)


@pytest.mark.parametrize("name", KINDS)
def test_the_same_image_gives_the_same_bytes(name: str):
    assert shrunk(FILES[name], 20) == shrunk(bytes(bytearray(FILES[name])), 20)


def test_fine_patterns_become_gray_and_not_another_pattern():
    board = np.indices((300, 400)).sum(0) % 2 * 255
    with Image.open(io.BytesIO(shrunk(encode(Image.fromarray(board.astype(np.uint8)), "PNG"), 70))) as image:
        assert np.abs(np.asarray(image).astype(int) - 127.5).max() < 3


def test_sixteen_bits_lose_their_low_byte_and_no_more():
    levels = np.linspace(0, 65535, 400).astype(np.uint16)[None, :, None].repeat(300, 0)
    with Image.open(io.BytesIO(shrunk(png(levels), 150, quality=100))) as image:
        expected = np.linspace(0, 255, 200)
        assert np.abs(np.asarray(image) - expected).max() < 2


def test_an_image_too_long_for_a_jpeg_stays_as_it_is():
    strip = encode(Image.new("L", (131_004, 2)), "PNG")
    assert shrunk(strip, 1) is strip
    assert decode(shrunk(encode(Image.new("L", (131_000, 2)), "PNG"), 1)) == ImageInfo("jpg", 1, 65_500)


def test_a_damaged_image_is_refused():
    data = encode(photo(), "JPEG")
    with pytest.raises(UndecodableError, match="truncated"):
        change_image(data[:-200], read_info(data), Changes(20))
