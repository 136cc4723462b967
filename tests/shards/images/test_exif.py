"""EXIF orientation: read, counted, kept or applied. Pillow's own reading and turning are the reference."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipelines.decode_torch import decode as decode_for_training
from shards.__main__ import main
from shards.images.decode import decode, read_info
from shards.images.exif import make_exif, read_orientation
from shards.images.reencode import Changes, change_image
from shards.index import ShardIndex
from tests.shards.fuzz import chunk, encode, photo, whole_files

ORIENTATIONS = range(1, 9)
TAG = 0x0112
FORMATS = ("JPEG", "PNG", "WEBP")
FILES = whole_files()
PNGS = sorted(name for name in FILES if name.endswith(".png") and name not in ("moving.png", "tiny.png"))


def exif_of(orientation: int, order: str = "<") -> bytes:
    exif = Image.Exif()
    exif.endian = order
    exif[0x010F] = "a camera"
    exif[TAG] = orientation
    exif[0x0132] = "2024:01:01 00:00:00"
    return exif.tobytes()


def shown(data: bytes) -> np.ndarray:
    """What a viewer shows, [H, W, channels]."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def seen(data: bytes) -> np.ndarray:
    """What training sees, [H, W, channels]."""
    return decode_for_training(data).permute(1, 2, 0).numpy()


def with_exif(data: bytes, orientation: int) -> bytes:
    """A PNG file with EXIF data before its pixels."""
    return data[:33] + chunk(b"eXIf", exif_of(orientation).removeprefix(b"Exif\0\0")) + data[33:]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("format", FORMATS)
def test_the_orientation_is_read_from_every_type(format: str, orientation: int, order: str) -> None:
    data = encode(photo(), format, exif=exif_of(orientation, order))
    for judge in (decode, read_info):
        assert judge(data).orientation == orientation
        assert judge(data)[1:3] == (45, 61), "the sizes are those of the stored pixels"
    assert read_info(encode(photo(), format)).orientation == 1


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_other_numbers_mean_as_stored(orientation: int) -> None:
    assert read_orientation(exif_of(orientation)) == 1


def test_the_smallest_exif_data_are_read_by_pillow() -> None:
    for orientation in ORIENTATIONS[1:]:
        exif = Image.Exif()
        exif.load(make_exif(orientation))
        assert dict(exif) == {TAG: orientation}
        assert read_orientation(make_exif(orientation)) == orientation
    assert make_exif(1) == b""


@given(st.binary(max_size=60), st.integers(0, 80), st.integers(0, 2**32 - 1))
def test_damaged_exif_data_are_none(data: bytes, place: int, word: int) -> None:
    whole = exif_of(6)
    for damaged in (data, whole[:place], whole[:place] + struct.pack("<I", word) + whole[place + 4 :], b"II*\0" + data):
        assert read_orientation(damaged) in ORIENTATIONS


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("orientation", ORIENTATIONS[1:])
@pytest.mark.parametrize("name", PNGS)
def test_a_png_is_turned_without_loss(name: str, orientation: int) -> None:
    data = with_exif(FILES[name], orientation)
    info = read_info(data)
    assert info.orientation == orientation
    turned, counts = change_image(data, info, Changes(upright=True))
    assert counts.turned_upright == 1
    expected = shown(encode(Image.fromarray(seen(FILES[name])), "PNG", exif=exif_of(orientation)))
    assert np.array_equal(seen(turned), expected)
    assert decode(turned)[:4] == ("png", *expected.shape[:2], 1)


def test_sixteen_bits_keep_their_low_byte_when_they_are_turned() -> None:
    levels = np.arange(45 * 61, dtype=np.uint16).reshape(45, 61) * 20
    data = with_exif(encode(Image.fromarray(levels), "PNG"), 6)
    with Image.open(io.BytesIO(change_image(data, read_info(data), Changes(upright=True))[0])) as image:
        assert image.mode == "I;16"
        assert np.array_equal(np.asarray(image), np.rot90(levels, -1))


@pytest.mark.parametrize("orientation", ORIENTATIONS[1:])
@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_jpeg_and_webp_become_jpeg_of_the_asked_quality(format: str, orientation: int) -> None:
    data = encode(photo(), format, exif=exif_of(orientation))
    turned = change_image(data, read_info(data), Changes(quality=95, upright=True))[0]
    assert decode(turned)[:4] == ("jpg", *shown(data).shape[:2], 1)
    assert np.abs(seen(turned).astype(int) - shown(data)).mean() < 6
    with Image.open(io.BytesIO(turned)) as image, Image.open(io.BytesIO(encode(photo(), "JPEG", quality=95))) as like:
        assert image.quantization == like.quantization
        assert TAG not in image.getexif()


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_as_stored_keeps_its_bytes(format: str) -> None:
    for data in (encode(photo(), format), encode(photo(), format, exif=exif_of(1))):
        assert change_image(data, read_info(data), Changes(upright=True))[0] is data


@pytest.mark.parametrize("orientation", ORIENTATIONS[1:])
def test_a_smaller_image_keeps_the_tag_or_is_turned(orientation: int) -> None:
    data = encode(photo(), "JPEG", exif=exif_of(orientation), quality=95)
    for upright in (False, True):
        small = change_image(data, read_info(data), Changes(20, 95, upright))[0]
        info = decode(small)
        assert min(info[1:3]) == 20
        assert info.orientation == (1 if upright else orientation)
        expected = Image.fromarray(shown(data)).resize(shown(small).shape[1::-1], Image.Resampling.LANCZOS)
        assert np.abs(shown(small).astype(int) - np.asarray(expected)).mean() < 6


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Twelve images, half of which are to be turned."""
    for number in range(12):
        format = FORMATS[number % 3]
        path = tmp_path / "src" / f"c{number % 2}" / f"{number}.{format.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(photo(seed=number), format, exif=exif_of(6 if number < 6 else 1)))
    return tmp_path / "src"


def test_pack_counts_them_and_says_so(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["pack", str(source), out, "--workers", "1"]) == 0
    words = "6 images with an EXIF orientation, which training ignores. Pack with --upright to turn them"
    assert words in capsys.readouterr().out.split("\n")
    assert main(["info", out]) == 0
    assert "EXIF        6 images to be turned, which training does not do (--upright)" in capsys.readouterr().out
    with ShardIndex(out) as index:
        assert index.manifest.counts.to_dict() == {"turned_in_training": 6}
        assert (index.heights.tolist(), index.widths.tolist()) == ([45] * 12, [61] * 12)


def test_upright_turns_them_and_the_manifest_says_so(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outs = [str(tmp_path / f"out{workers}") for workers in (1, 3)]
    for out, workers in zip(outs, (1, 3), strict=True):
        call = ["pack", str(source), out, "--upright", "--quality", "90", "--shard-size", "8KB"]
        assert main([*call, "--workers", str(workers)]) == 0
        printed = capsys.readouterr().out
        assert "6 images turned upright, as the EXIF orientation says\n" in printed
        assert "which training ignores" not in printed
        assert main(["check", out, "--workers", "1"]) == 0
    manifests = [(Path(out) / "manifest.json").read_bytes() for out in outs]
    assert manifests[0] == manifests[1]
    with ShardIndex(outs[0]) as index:
        assert index.manifest.counts.to_dict() == {"turned_upright": 6}
        assert index.manifest.options["upright"] is True
        assert (
            sorted(zip(index.heights.tolist(), index.widths.tolist(), strict=True)) == [(45, 61)] * 6 + [(61, 45)] * 6
        )
    capsys.readouterr()
    assert main(["info", outs[0]]) == 0
    printed = capsys.readouterr().out
    assert "upright     6 images turned as their EXIF orientation said" in printed
    assert "upright True" in printed


def test_smaller_images_are_still_counted(source: Path, tmp_path: Path) -> None:
    call = ["pack", str(source), str(tmp_path / "out"), "--workers", "1", "--max-short-side", "20"]
    assert main(call) == 0
    with ShardIndex(tmp_path / "out") as index:
        assert index.manifest.counts.to_dict() == {"turned_in_training": 6}


def test_without_any_the_manifest_is_that_of_older_programs(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "1.jpg").write_bytes(encode(photo(), "JPEG"))
    assert main(["pack", str(tmp_path / "src"), str(tmp_path / "out"), "--workers", "1"]) == 0
    text = (tmp_path / "out" / "manifest.json").read_text()
    assert "counts" not in text
    assert "upright" not in text
