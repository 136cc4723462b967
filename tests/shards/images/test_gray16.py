"""12-bit values in 16-bit grayscale: counted with their largest value, and scaled when asked for."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from pipelines.decode_torch import decode as decode_for_training
from shards.__main__ import main
from shards.counts import Counts
from shards.images import decode as decode_module
from shards.images.decode import decode, read_info
from shards.images.gray16 import Gray16, scale_to_8_bits
from shards.images.reencode import Changes, change_image, convert_image
from shards.index import ShardIndex
from tests.shards.fuzz import encode, photo, png
from tests.shards.images.test_exif import with_exif

STRETCH, WINDOW = Gray16("stretch"), Gray16("window", 1000, 3000)
VALUES = arrays.arrays(np.uint16, st.tuples(st.integers(1, 9), st.integers(1, 9)))


def xray(seed: int, most: int = 4095) -> np.ndarray:
    """Smooth values of 12 bits, from 0 to `most`, [45, 61]."""
    gray = np.asarray(photo(seed=seed).convert("L")).astype(np.float64)
    return np.round((gray - gray.min()) / (gray.max() - gray.min()) * most).astype(np.uint16)


def levels_of(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "L"
        return np.asarray(image)


@given(VALUES)
def test_stretch_is_a_line_from_the_least_to_the_largest_value(values: np.ndarray) -> None:
    found = np.asarray(scale_to_8_bits(Image.fromarray(values), STRETCH))
    low, high = int(values.min()), int(values.max())
    exact = (values.astype(np.float64) - low) * 255 / max(high - low, 1)
    assert found.dtype == np.uint8
    assert np.array_equal(found, np.floor(exact + 0.5))
    assert (found.min(), found.max()) == (0, 255 if high > low else 0)


@given(VALUES, st.tuples(st.integers(0, 65535), st.integers(0, 65535)).filter(lambda pair: pair[0] < pair[1]))
def test_a_window_is_a_line_between_its_ends_and_flat_outside(values: np.ndarray, ends: tuple[int, int]) -> None:
    low, high = ends
    found = np.asarray(scale_to_8_bits(Image.fromarray(values), Gray16("window", low, high)))
    exact = (np.clip(values.astype(np.float64), low, high) - low) * 255 / (high - low)
    assert np.array_equal(found, np.floor(exact + 0.5))


def test_sixteen_bit_grayscale_is_known_and_its_largest_value_read() -> None:
    for interlaced in (False, True):
        data = png(xray(1)[..., None], interlaced)
        assert decode(data)[4:] == (True, 4095)
        assert read_info(data)[4:] == (True, 0)
    for data in (encode(photo(), "PNG"), png(np.zeros((4, 4, 3), np.uint16)), encode(photo().convert("L"), "PNG")):
        assert decode(data)[4:] == (False, 0)


def test_an_image_is_decoded_once_to_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    load = decode_module.load
    monkeypatch.setattr(decode_module, "load", lambda *rest, **options: calls.append(1) or load(*rest, **options))
    decode(png(xray(1)[..., None]))
    assert len(calls) == 1


@pytest.mark.parametrize("rule", [STRETCH, WINDOW])
def test_a_scaled_image_is_an_8_bit_png_that_training_sees_so(rule: Gray16) -> None:
    data = png(xray(1)[..., None])
    found, counts = change_image(data, decode(data), Changes(gray16=rule))
    assert counts == Counts(gray16_scaled=1, gray16_largest=4095)
    assert decode(found) == ("png", 45, 61, 1, False, 0)
    low, high = (0, 4095) if rule is STRETCH else (1000, 3000)
    expected = np.floor((np.clip(xray(1).astype(float), low, high) - low) * 255 / (high - low) + 0.5)
    assert np.array_equal(levels_of(found), expected)
    assert np.array_equal(decode_for_training(found)[0].numpy(), expected)
    assert decode_for_training(data).max() == 15, "without it, training sees the high byte of 4095"


def test_it_is_scaled_before_it_is_made_smaller_or_turned() -> None:
    data = with_exif(encode(Image.fromarray(xray(2)), "PNG"), 6)
    info = decode(data)
    stretched = Image.fromarray(np.floor(xray(2) * 255.0 / 4095 + 0.5).astype(np.uint8))
    turned, counts = change_image(data, info, Changes(gray16=STRETCH, upright=True))
    assert counts == Counts(turned_upright=1, gray16_scaled=1, gray16_largest=4095)
    assert np.array_equal(levels_of(turned), np.rot90(np.asarray(stretched), -1))
    small, _ = change_image(
        encode(Image.fromarray(xray(2)), "PNG"), info._replace(orientation=1), Changes(20, 100, gray16=STRETCH)
    )
    expected = np.asarray(stretched.resize((27, 20), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(levels_of(small) - expected).max() <= 2


@pytest.mark.parametrize("rule", [STRETCH, WINDOW])
def test_a_converted_tiff_is_scaled_too(rule: Gray16) -> None:
    tiff, same = encode(Image.fromarray(xray(3)), "TIFF"), png(xray(3)[..., None])
    for to in ("png", "jpeg"):
        found, counts = convert_image(tiff, "TIFF", Changes(gray16=rule, convert=to), 1 << 20)
        assert counts == Counts(converted=1, gray16_scaled=1, gray16_largest=4095)
        assert np.array_equal(levels_of(found), levels_of(change_image(same, decode(same), Changes(gray16=rule))[0]))


def test_other_images_keep_their_bytes() -> None:
    for data in (encode(photo(), "PNG"), encode(photo(), "JPEG"), png(np.zeros((4, 4, 3), np.uint16))):
        assert change_image(data, decode(data), Changes(gray16=STRETCH)) == (data, Counts())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Nine X-rays of 12 bits, one of which is a TIFF, and three photographs."""
    (tmp_path / "src" / "a").mkdir(parents=True)
    (tmp_path / "src" / "b").mkdir()
    for number in range(12):
        path = tmp_path / "src" / "ab"[number % 2] / f"{number}.png"
        is_photo = number % 4 == 3
        path.write_bytes(encode(photo(seed=number), "PNG") if is_photo else png(xray(number, 4095 - number)[..., None]))
    (tmp_path / "src" / "a" / "0.png").unlink()
    (tmp_path / "src" / "a" / "0.tif").write_bytes(encode(Image.fromarray(xray(0)), "TIFF"))
    return tmp_path / "src"


def pack(source: Path, out: Path, *flags: str) -> ShardIndex:
    assert main(["pack", *flags, str(source), str(out), "--shard-size", "20KB"]) == 0
    return ShardIndex(out)


def test_pack_counts_them_and_says_what_to_do(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pack(source, tmp_path / "out", "--workers", "1") as index:
        assert index.manifest.counts == Counts(gray16=8, gray16_largest=4094)
        assert "gray16" not in index.manifest.options
    words = "8 images of 16-bit grayscale, largest value 4,094 of 65,535. Of these the high byte is kept\n"
    advice = "They are nearly black in training. Pack with --gray16 stretch, or with --gray16 window LOW HIGH\n"
    assert words + advice in capsys.readouterr().out
    assert main(["info", str(tmp_path / "out")]) == 0
    assert "16-bit gray 8 images, largest value 4,094; the high byte is kept" in capsys.readouterr().out
    pack(source, tmp_path / "header", "--workers", "1", "--check", "header", "--convert", "png")
    printed = capsys.readouterr().out
    assert "9 images of 16-bit grayscale, largest value 4,095 of 65,535. Of these" in printed  # the TIFF's was decoded


def test_the_whole_range_is_no_reason_to_worry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for most, worries in ((16383, True), (16384, False), (65535, False)):
        folder = tmp_path / str(most) / "src"
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(png(xray(1, most)[..., None]))
        pack(folder, folder.parent / "out", "--workers", "1")
        assert ("nearly black" in capsys.readouterr().out) == worries


@pytest.mark.parametrize("rule", ["stretch", "window 1000 3000"])
def test_scaled_packings_are_the_same_whoever_packs_them(
    rule: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--gray16", *rule.split(), "--convert", "png", "--workers"]
    with pack(source, tmp_path / "1", *flags, "1") as one, pack(source, tmp_path / "3", *flags, "3") as three:
        assert one.fingerprint == three.fingerprint
        assert one.manifest == three.manifest
        assert one.manifest.counts == Counts(converted=1, gray16_scaled=9, gray16_largest=4095)
        assert one.manifest.options["gray16"] == rule
    assert "9 images of 16-bit grayscale made 8-bit, largest value 4,095 of 65,535\n" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "1"), "--workers", "1"]) == 0
    capsys.readouterr()
    assert main(["info", str(tmp_path / "1")]) == 0
    printed = capsys.readouterr().out
    assert f"gray16 {rule}\n" in printed
    assert "16-bit gray 9 images, largest value 4,095; made 8-bit" in printed


def test_smaller_images_lose_their_low_byte_and_are_counted(source: Path, tmp_path: Path) -> None:
    with pack(source, tmp_path / "out", "--workers", "1", "--max-short-side", "20", "--convert", "png") as index:
        assert index.manifest.counts == Counts(converted=1, gray16=9, gray16_largest=4095)


def test_the_flag_that_asks_for_what_is_done_anyway_changes_nothing(source: Path, tmp_path: Path) -> None:
    plain = pack(source, tmp_path / "1", "--workers", "1")
    asked = pack(source, tmp_path / "2", "--workers", "1", "--gray16", "high-byte")
    assert plain.fingerprint == asked.fingerprint


@pytest.mark.parametrize(
    "rule",
    ["window", "window 5", "window 5 5", "window 9 5", "window 0 65536", "window -1 5", "window a b", "fast", ""],
)
def test_other_rules_are_refused(rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["pack", "SRC", "OUT", "--gray16", rule])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("make-shards pack: argument --gray16: ")


def test_a_window_may_stand_anywhere(source: Path, tmp_path: Path) -> None:
    calls = (["--gray16", "window", "0", "4095"], ["--gray16=window 0 4095"], ["--gray16", "window 0 4095"])
    for number, flags in enumerate(calls):
        with pack(source, tmp_path / str(number), "--workers", "1", *flags) as index:
            assert index.manifest.options["gray16"] == "window 0 4095"
